"""The contract of a language model."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from llavakit.contracts.interfaces import PromptTemplate, Segment
from llavakit.contracts.networks import LanguageModel
from llavakit.contracts.packing import KVCache, Packing, Rows
from llavakit.registry import Registry
from llavakit.stream.encode import tokenise
from llavakit.testing.network import NetworkContract

_assert_close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-3)


class LanguageModelContract(NetworkContract[LanguageModel]):
    """Checks a `LanguageModel` in float32, its tokenizer set."""

    kind = LanguageModel
    lengths: tuple[int, ...] = (7, 1, 12)  #: Samples of the packed stream that it is tried with.

    def ids(self, network: LanguageModel) -> Tensor:
        """Return the token ids of the stream, the same each time."""
        draw = torch.Generator().manual_seed(0)
        vocabulary = network.head.out_features
        return torch.randint(0, vocabulary, (sum(self.lengths),), generator=draw)

    def outputs(self, network: LanguageModel) -> Tensor:
        return network.hidden(network.embed(self.ids(network)), Packing.of(self.lengths))

    def test_hidden_states_and_head_have_the_widths_it_says(self) -> None:
        model = self.build().eval()
        with torch.no_grad():
            embeds, hidden = model.embed(self.ids(model)), self.outputs(model)
        total = sum(self.lengths)
        assert tuple(embeds.shape) == (total, model.width), "`embed` gives [T, width]"
        assert tuple(hidden.shape) == (total, model.width), "`hidden` gives [T, width]"
        assert model.head.in_features == model.width
        assert model.max_length > 1
        table = model.embedding_VE
        if table is not None:
            assert torch.equal(table[self.ids(model)], embeds), "`embed` is not a look-up in it"

    def test_a_sample_sees_nothing_of_its_neighbours(self) -> None:
        model = self.build().eval()
        with torch.no_grad():
            embeds, packed = model.embed(self.ids(model)), self.outputs(model)
            starts = Packing.of(self.lengths).starts
            for start, end in pairwise(starts):
                alone = model.hidden(embeds[start:end], Packing.of([end - start]))
                _assert_close(packed[start:end], alone)

    def test_a_token_sees_nothing_of_later_ones(self) -> None:
        model = self.build().eval()
        ids = self.ids(model)[:12]
        other = ids.clone()
        other[8:] = (other[8:] + 1) % model.head.out_features
        with torch.no_grad():
            first, second = (model.hidden(model.embed(i), Packing.of([12])) for i in (ids, other))
        _assert_close(first[:8], second[:8])
        assert not torch.allclose(first[8:], second[8:]), "the text changes nothing"

    def test_the_order_of_tokens_matters(self) -> None:
        model = self.build().eval()
        ids = torch.arange(1, 7) % model.head.out_features
        with torch.no_grad():
            first = model.hidden(model.embed(ids), Packing.of([6]))[-1]
            second = model.hidden(model.embed(ids[[1, 0, 2, 3, 4, 5]]), Packing.of([6]))[-1]
        assert not torch.allclose(first, second, atol=1e-6), "position_ids are not looked at"

    def test_selected_rows_are_those_of_the_whole(self) -> None:
        model = self.build().eval()
        rows = Rows(torch.tensor([0, 3, 6, 9, 19]), (3, 0, 2))
        with torch.no_grad():
            embeds = model.embed(self.ids(model))
            few = model.hidden(embeds, Packing.of(self.lengths), rows)
            _assert_close(few, self.outputs(model)[rows.index_M])

    def test_the_cache_gives_what_the_whole_text_gives(self) -> None:
        model = self.build().eval()
        ids = list(self.ids(model).split(list(self.lengths)))
        extra = 3
        following = torch.arange(len(ids) * extra).view(len(ids), extra) % model.head.out_features
        layers, _, _ = model.cache_shape()
        with torch.no_grad():
            cache = KVCache(layers, [len(i) + extra for i in ids])
            prompt = Packing.of(self.lengths)
            prompt = Packing(prompt.starts, prompt.position_ids_T, cache)
            found = [model.hidden(model.embed(torch.cat(ids)), prompt)[prompt.last_rows_S]]
            cache.advance(prompt)
            for place in range(extra):
                step = Packing(tuple(range(len(ids) + 1)), torch.tensor(cache.lengths), cache)
                found.append(model.hidden(model.embed(following[:, place]), step))
                cache.advance(step)
            for number, text in enumerate(ids):
                whole = torch.cat([text, following[number]])
                expected = model.hidden(model.embed(whole), Packing.of([len(whole)]))
                mine = torch.stack([hidden[number] for hidden in found])
                _assert_close(mine, expected[-extra - 1 :])

    def test_gradient_reaches_every_parameter_and_the_embeddings(self) -> None:
        gradients = []
        model = self.build().train()
        model.requires_grad_(True)
        for recompute in (False, True):
            model.zero_grad()
            model.recompute = recompute
            embeds = model.embed(self.ids(model))
            embeds.retain_grad()
            model.logits(model.hidden(embeds, Packing.of(self.lengths))).square().sum().backward()
            dead = [name for name, p in model.named_parameters() if p.grad is None]
            assert not dead, f"no gradient reaches {dead}"
            assert embeds.grad is not None, "no gradient reaches the embeddings, nor the connector"
            gradients.append(embeds.grad)
        _assert_close(*gradients)

    def test_the_tokenizer_is_fast_and_within_the_vocabulary(self) -> None:
        model = self.build()
        ids, supervised = tokenise([Segment("a b", supervised=True)], model.tokenizer)
        assert supervised.any()
        assert ids.max() < model.head.out_features, "the tokenizer knows more than the head"

    def test_the_tokenizer_is_the_same_when_it_is_read_again(self, tmp_path: Path) -> None:
        model = self.build()
        model.save(tmp_path)
        again = type(model).load(self.stated(), tmp_path).tokenizer
        end = model.tokenizer.eos_token or ""
        for text in ("a b", f"a{end}b", f"a: b {end}\n c", "a  b\n\n"):
            before, after = (reader(text)["input_ids"] for reader in (model.tokenizer, again))
            assert after == before, f"{text!r} has other tokens behind `save` and `load`"

    def test_its_usual_template_is_installed(self) -> None:
        assert Registry.installed().get(PromptTemplate, self.build().default_template)
