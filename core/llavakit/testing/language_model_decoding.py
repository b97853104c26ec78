"""The part of a language model's contract about decoding, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llavakit.contracts.interfaces import Segment
from llavakit.contracts.networks import LanguageModel
from llavakit.contracts.packing import KVCache, Packing
from llavakit.stream.encode import tokenise
from llavakit.testing.contract import hold, holding
from llavakit.testing.network import NetworkContract, hold_close

_CACHE = (
    "keep all that goes from one call to the next in `packing.cache`: keys and values through "
    "`llavakit.packed_attention`, a recurrent state in `cache.states`, which `cache.select` keeps "
    "in order; never on `self`"
)


class DecodingContract(NetworkContract[LanguageModel]):
    """Checks decoding with a key-value cache, end tokens and the tokenizer."""

    lengths: tuple[int, ...] = (7, 1, 12)  #: Samples of the packed stream that it is tried with.

    def ids(self, network: LanguageModel) -> Tensor:
        """Return the token ids of the stream, the same each time."""
        draw = torch.Generator().manual_seed(0)
        vocabulary = network.head.out_features
        return torch.randint(0, vocabulary, (sum(self.lengths),), generator=draw)

    def outputs(self, network: LanguageModel) -> Tensor:
        return network.hidden(network.embed(self.ids(network)), Packing.of(self.lengths))

    def _following(self, model: LanguageModel, extra: int) -> Tensor:
        """Return what is decoded behind each sample, `[S, extra]`."""
        count = len(self.lengths) * extra
        return torch.arange(count).view(-1, extra) % model.head.out_features

    def _begin(self, model: LanguageModel, extra: int) -> tuple[KVCache, Tensor]:
        """Return a cache with the samples in it, and the hidden state behind each."""
        layers, _, _ = model.cache_shape()
        cache = KVCache(layers, [length + extra for length in self.lengths])
        prompt = Packing.of(self.lengths)
        prompt = Packing(prompt.starts, prompt.position_ids_T, cache)
        last = model.hidden(model.embed(self.ids(model)), prompt)[prompt.last_rows_S]
        cache.advance(prompt)
        return cache, last

    def _step(self, model: LanguageModel, cache: KVCache, tokens_S: Tensor) -> Tensor:
        step = Packing(tuple(range(len(tokens_S) + 1)), torch.tensor(cache.lengths), cache)
        hidden = model.hidden(model.embed(tokens_S), step)
        cache.advance(step)
        return hidden

    def _expect(
        self, model: LanguageModel, found: Sequence[Tensor], sequence: int, promise: str
    ) -> None:
        """Compare what decoding gave behind one sample with what its whole text gives."""
        ids = self.ids(model).split(list(self.lengths))[sequence]
        whole = torch.cat([ids, self._following(model, 3)[sequence]])
        expected = model.hidden(model.embed(whole), Packing.of([len(whole)]))[len(ids) - 1 :]
        hold_close(torch.stack(list(found)), expected[: len(found)], promise, _CACHE)

    def test_the_cache_gives_what_the_whole_text_gives(self) -> None:
        model = self.build().eval()
        following = self._following(model, 3)
        with torch.no_grad(), holding("it decodes with a cache", _CACHE):
            cache, last = self._begin(model, 3)
            found = [last] + [self._step(model, cache, following[:, n]) for n in range(3)]
            for sequence in range(len(self.lengths)):
                mine = [hidden[sequence] for hidden in found]
                promise = "token by token with the cache it gives what the whole text gives"
                self._expect(model, mine, sequence, promise)

    def test_sequences_that_are_left_go_on_as_they_were(self) -> None:
        """`cache.select` keeps some, in another order: as where others of a batch have ended."""
        model = self.build().eval()
        following = self._following(model, 3)
        with torch.no_grad(), holding("it decodes with a cache", _CACHE):
            cache, last = self._begin(model, 3)
            first = self._step(model, cache, following[:, 0])
            kept = [2, 0]
            cache.select(kept)
            after = [self._step(model, cache, following[kept, n]) for n in (1, 2)]
            for row, sequence in enumerate(kept):
                mine = [last[sequence], first[sequence], *(hidden[row] for hidden in after)]
                self._expect(
                    model, mine, sequence,
                    f"after `cache.select({kept})` sequence {sequence} goes on as it was",
                )  # fmt: skip

    def test_two_caches_know_nothing_of_each_other(self) -> None:
        model = self.build().eval()
        following = self._following(model, 3)
        with torch.no_grad(), holding("it decodes with a cache", _CACHE):
            one, last = self._begin(model, 3)
            found = [last]
            for number in range(3):
                layers, _, _ = model.cache_shape()
                stray = Packing.of([4])
                stray = Packing(stray.starts, stray.position_ids_T, KVCache(layers, [4]))
                model.hidden(model.embed(self.ids(model)[:4]), stray)  # another conversation
                found.append(self._step(model, one, following[:, number]))
            for sequence in range(len(self.lengths)):
                mine = [hidden[sequence] for hidden in found]
                promise = "a conversation goes on as it was while another is answered"
                self._expect(model, mine, sequence, promise)

    def test_an_answer_can_end(self) -> None:
        model = self.build()
        ends = model.end_ids
        hold(
            ends and all(0 <= end < model.head.out_features for end in ends),
            "`end_ids` are tokens of the vocabulary, at least one: else no answer ends",
            f"{sorted(ends)} of {model.head.out_features}",
            "set the tokenizer's eos_token, or say in `end_ids` which tokens end an answer",
        )  # fmt: skip

    def test_the_tokenizer_is_fast_and_within_the_vocabulary(self) -> None:
        model = self.build()
        with holding(
            "a tokenizer of transformers' that is fast (says which characters a token stands for)",
            "set `tokenizer` in `build`, a PreTrainedTokenizerFast",
        ):
            ids, supervised = tokenise([Segment("a b", supervised=True)], model.tokenizer)
        hold(
            supervised.any(), "it knows which tokens are learned", "none of `a b`",
            "use a tokenizer with offsets",
        )  # fmt: skip
        hold(
            ids.max() < model.head.out_features,
            f"ids below the head's {model.head.out_features} rows", f"id {ids.max()}",
            "make the head larger, or the tokenizer smaller",
        )  # fmt: skip

    def test_the_tokenizer_is_the_same_when_it_is_read_again(self, tmp_path: Path) -> None:
        model = self.build()
        change = "write the tokenizer in `save` (`save_pretrained`), and read it in `load`"
        model.save(tmp_path)
        with holding("`load` reads what `save` wrote", change):
            context = self._context(type(model))
            again = type(model).load(self.stated(), tmp_path, **context).tokenizer
        end = model.tokenizer.eos_token or ""
        for text in ("a b", f"a{end}b", f"a: b {end}\n c", "a  b\n\n"):
            before, after = (reader(text)["input_ids"] for reader in (model.tokenizer, again))
            hold(
                after == before,
                f"{text!r} has the same tokens behind `save` and `load`", f"{after}, not {before}",
                change,
            )  # fmt: skip
