"""The contract of a language model: its forward pass over a packed stream, loss and gradients.

Decoding with a cache, and the tokenizer, are in `language_model_decoding`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.contracts.interfaces import PromptTemplate
from llavakit.contracts.networks import LanguageModel
from llavakit.contracts.packing import Packing, Rows
from llavakit.registry import Registry
from llavakit.testing.contract import hold, holding
from llavakit.testing.language_model_decoding import DecodingContract
from llavakit.testing.network import hold_close

_PACKED = (
    "attend with `llavakit.packed_attention`, which keeps to the samples' boundaries; carry no "
    "state (recurrence, convolution) over `packing.starts`"
)


class LanguageModelContract(DecodingContract):
    """Checks a `LanguageModel` in float32, its tokenizer set."""

    kind = LanguageModel

    def test_hidden_states_and_head_have_the_widths_it_says(self) -> None:
        model = self.build().eval()
        with torch.no_grad():
            embeds, hidden = model.embed(self.ids(model)), self.outputs(model)
        total = sum(self.lengths)
        for name, found in (("embed", embeds), ("hidden", hidden)):
            hold(
                tuple(found.shape) == (total, model.width),
                f"`{name}` gives [T, width], {(total, model.width)}", tuple(found.shape),
                f"fix `{name}` or `width`",
            )  # fmt: skip
        hold(
            model.head.in_features == model.width,
            f"a head on hidden states of `width`, {model.width}", model.head.in_features,
            "fix `head` or `width`",
        )  # fmt: skip
        hold(model.max_length > 1, "a longest length", model.max_length, "fix `max_length`")
        table = model.embedding_VE
        if table is not None:
            hold(
                torch.equal(table[self.ids(model)], embeds),
                "`embed` looks up in `embedding_VE`", "it gives something else",
                "return None from `embedding_VE` where `embed` does more",
            )  # fmt: skip

    def test_a_sample_sees_nothing_of_its_neighbours(self) -> None:
        model = self.build().eval()
        with torch.no_grad():
            embeds, packed = model.embed(self.ids(model)), self.outputs(model)
            for start, end in pairwise(Packing.of(self.lengths).starts):
                alone = model.hidden(embeds[start:end], Packing.of([end - start]))
                hold_close(
                    packed[start:end],
                    alone,
                    f"a sample (rows {start} to {end}) gives the same alone as among others",
                    _PACKED,
                )

    def test_a_token_sees_nothing_of_later_ones(self) -> None:
        model = self.build().eval()
        ids = self.ids(model)[:12]
        other = ids.clone()
        other[8:] = (other[8:] + 1) % model.head.out_features
        with torch.no_grad():
            first, second = (model.hidden(model.embed(i), Packing.of([12])) for i in (ids, other))
        hold_close(
            first[:8], second[:8], "a token sees nothing of later ones",
            "attend causally: `llavakit.packed_attention` does",
        )  # fmt: skip
        hold(
            not torch.allclose(first[8:], second[8:]),
            "other tokens give other hidden states", "the same", "use the embeddings in `hidden`",
        )  # fmt: skip

    def test_the_order_of_tokens_matters(self) -> None:
        model = self.build().eval()
        ids = torch.arange(1, 7) % model.head.out_features
        with torch.no_grad():
            first = model.hidden(model.embed(ids), Packing.of([6]))[-1]
            second = model.hidden(model.embed(ids[[1, 0, 2, 3, 4, 5]]), Packing.of([6]))[-1]
        hold(
            not torch.allclose(first, second, atol=1e-6),
            "the order of tokens matters", "the last row is the same for two orders",
            "look at `packing.position_ids_T`",
        )  # fmt: skip

    def test_selected_rows_are_those_of_the_whole(self) -> None:
        model = self.build().eval()
        rows = Rows(torch.tensor([0, 3, 6, 9, 19]), (3, 0, 2))
        with torch.no_grad():
            embeds = model.embed(self.ids(model))
            few = model.hidden(embeds, Packing.of(self.lengths), rows)
            hold_close(
                few, self.outputs(model)[rows.index_M],
                "`hidden` with `rows` gives these rows of the whole",
                "select `rows.index_M` at the end, or where nothing else needs the others",
            )  # fmt: skip

    def test_the_loss_is_the_summed_cross_entropy_of_its_logits(self) -> None:
        model = self.build().eval()
        change = (
            "leave `loss` out, or give the cross-entropy of what `logits` gives, summed (the "
            "trainer divides), as one float32"
        )
        with torch.no_grad():
            hidden = self.outputs(model)
        for kept in (len(hidden), 3):  # a mean differs from a sum by the number of rows
            rows = hidden[:kept].clone().requires_grad_()
            copy = hidden[:kept].clone().requires_grad_()
            targets = torch.arange(kept) % model.head.out_features
            with holding("`loss` takes hidden states and targets", change):
                found = model.loss(rows, targets)
            expected = F.cross_entropy(model.logits(copy).float(), targets, reduction="sum")
            hold(
                found.dtype == torch.float32 and found.ndim == 0,
                "one float32", f"{found.dtype} of shape {tuple(found.shape)}", change,
            )  # fmt: skip
            promise = (
                f"the loss of {kept} rows is {expected.item():.5f}, the sum of the cross-entropy "
                "of `logits`"
            )
            hold(
                torch.allclose(found, expected, atol=1e-3, rtol=1e-4),
                promise, f"{found.item():.5f}", change,
            )  # fmt: skip
            found.backward()
            expected.backward()
            assert copy.grad is not None  # it is ours
            hold(rows.grad is not None, "the loss has a gradient", "none", change)
            if rows.grad is not None:
                hold_close(rows.grad, copy.grad, "the gradient of that sum", change)

    def test_every_block_is_called_as_a_module(self) -> None:
        model = self.build().eval()
        called = [0] * len(model.blocks)
        hooks = [
            block.register_forward_pre_hook(_counting(called, number))
            for number, block in enumerate(model.blocks)
        ]
        with torch.no_grad():
            self.outputs(model)
        for hook in hooks:
            hook.remove()
        missed = [number for number, times in enumerate(called) if times != 1]
        hold(
            not missed,
            "`hidden` calls each module of `blocks` once: FSDP gathers its weights then",
            f"calls of the blocks {missed}: {[called[number] for number in missed]}",
            "call `block(...)`, not `block.forward(...)` or parts of it; return () where there are "
            "no such modules",
        )

    def test_gradient_reaches_every_parameter_and_the_embeddings(self) -> None:
        gradients: list[Tensor] = []
        model = self.build().train()
        model.requires_grad_(True)
        for recompute in (False, True):
            model.zero_grad()
            model.recompute = recompute
            embeds = model.embed(self.ids(model))
            embeds.retain_grad()
            model.logits(model.hidden(embeds, Packing.of(self.lengths))).square().sum().backward()
            dead = [name for name, p in model.named_parameters() if p.grad is None]
            hold(
                not dead,
                "a gradient reaches every parameter", f"none reaches {dead}",
                "use each in the forward pass, or remove it",
            )  # fmt: skip
            if embeds.grad is None:
                hold(
                    False, "a gradient reaches the embeddings, and so the connector", "none",
                    "detach nothing in `hidden`",
                )  # fmt: skip
            else:
                gradients.append(embeds.grad)
        hold_close(
            *gradients, "`recompute` changes no gradient", "checkpoint without random numbers"
        )

    def test_adapters_are_merged_into_the_weights(self) -> None:
        model = self.build().eval()
        change = (
            "return from `merged` a model with the adapters' product added into its weights, and "
            "no adapters: its options without them, all of its parameters in `trainable`"
        )
        with torch.no_grad():
            for _, parameter in model.trainable():  # new adapters add nothing yet
                if parameter.is_floating_point():
                    draw = torch.Generator().manual_seed(parameter.numel())
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
            expected = model.logits(self.outputs(model))
            with holding("`merged` gives a model", change):
                merged = model.merged().eval()
            found = merged.logits(self.outputs(merged))
        hold_close(found, expected, "`merged` computes what the model computes", change)
        learning = {name for name, _ in merged.trainable()}
        kept = sorted({name for name, _ in merged.named_parameters()} - learning)
        hold(
            not kept,
            "`merged` has no adapters: exporters write what it returns",
            f"it still trains {sorted(learning)[:2]} beside {kept[:2]}", change,
        )  # fmt: skip

    def test_its_usual_template_is_installed(self) -> None:
        name = self.build().default_template
        with holding(
            f"its `default_template`, `{name}`, is installed", "name one of `llava-run plugins`"
        ):
            Registry.installed().get(PromptTemplate, name)


def _counting(called: list[int], number: int) -> Callable[..., None]:
    def count(*_: object) -> None:
        called[number] += 1

    return count
