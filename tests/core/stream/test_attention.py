"""Packed attention against the formula written out in float64, and its kernels' choice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from llavakit.contracts.packing import KVCache, Packing, Scoring
from llavakit.stream.attention import packed_attention
from llavakit_plugins.language import varlen

LENGTHS = (5, 1, 9)
HEADS, GROUPS, WIDTH = 4, 2, 8
SCORINGS: list[dict[str, Any]] = [
    {},
    {"scale": 0.7},
    {"window": 3},
    {"softcap": 0.5},
    {"window": 3, "softcap": 0.5, "scale": 0.7},
    {"sinks_H": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    {"window": 2, "sinks_H": torch.tensor([0.3, -1.0, 2.0, 0.0])},
]


def stream() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows = sum(LENGTHS)
    return tuple(  # type: ignore[return-value]
        torch.randn(rows, heads, WIDTH, generator=draw) for heads in (HEADS, GROUPS, GROUPS)
    )


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = WIDTH**-0.5,
    window: int = 1000,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """One row, one head, one visible column at a time."""
    found = torch.zeros(q.shape, dtype=torch.float64)
    start = 0
    for length in LENGTHS:
        for row in range(length):
            for head in range(HEADS):
                group = head * GROUPS // HEADS
                seen = range(max(0, row - window + 1), row + 1)
                scores = [
                    float(q[start + row, head].double() @ k[start + c, group].double()) * scale
                    for c in seen
                ]
                if softcap is not None:
                    scores = [
                        float(torch.tanh(torch.tensor(s / softcap))) * softcap for s in scores
                    ]
                sink = [] if sinks_H is None else [float(sinks_H[head])]
                weights = torch.tensor(scores + sink, dtype=torch.float64).softmax(0)
                for weight, c in zip(weights, seen, strict=False):
                    found[start + row, head] += weight * v[start + c, group].double()
        start += length
    return found.float()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_stream_gives_what_the_formula_gives(scoring: dict[str, Any]) -> None:
    q, k, v = stream()
    found = packed_attention(q, k, v, Packing.of(LENGTHS), layer=0, **scoring)
    torch.testing.assert_close(found, written_out(q, k, v, **scoring), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_decoding_gives_what_the_formula_gives(scoring: dict[str, Any]) -> None:
    """A stream of prompts, then one row a sequence, then rows of unequal number."""
    q, k, v = stream()
    expected = written_out(q, k, v, **scoring)
    starts = [0, 5, 6]
    cache = KVCache(1, LENGTHS)

    def read(lengths: list[tuple[int, int]]) -> None:
        rows = torch.cat([torch.arange(starts[s] + a, starts[s] + b) for s, (a, b) in
                          enumerate(lengths)])  # fmt: skip
        places = torch.cat([torch.arange(a, b) for a, b in lengths])
        ends = torch.tensor([b - a for a, b in lengths]).cumsum(0).tolist()
        packing = Packing((0, *ends), places, cache)
        found = packed_attention(q[rows], k[rows], v[rows], packing, layer=0, **scoring)
        torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=1e-5)
        cache.advance(packing)

    read([(0, 3), (0, 1), (0, 6)])
    cache.select([0, 2])
    starts[:] = [0, 6]
    read([(3, 4), (6, 7)])
    read([(4, 5), (7, 9)])


def test_a_step_of_decoding_asks_for_no_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, CUDA's fast kernels take none: without them keys and values would be copied for
    each query head, at each token."""
    asked: list[tuple[bool, torch.Size]] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def note(q: Tensor, *args: Any, **options: Any) -> Tensor:
        asked.append((options["enable_gqa"], q.shape))
        return own(q, *args, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", note)
    cache, (q, k, v) = KVCache(1, [9, 9, 9]), stream()
    prompt = Packing((0, 4, 5, 13), torch.tensor([*range(4), 0, *range(8)]), cache)
    for packing in (prompt, Packing((0, 1, 2, 3), torch.tensor([4, 1, 8]), cache)):
        asked.clear()
        rows = packing.starts[-1]
        packed_attention(q[:rows], k[:rows], v[:rows], packing, layer=0)
        cache.advance(packing)
    assert asked == [(False, torch.Size([3, GROUPS, HEADS // GROUPS, WIDTH]))]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_flex_attention_gives_what_the_formula_gives(scoring: dict[str, Any]) -> None:
    """Uncompiled, on the CPU: the same masks and scores as the compiled kernel's."""
    from torch.nn.attention import flex_attention as flex

    q, k, v = stream()
    packing = Packing.of(LENGTHS)
    made: list[object] = []

    def create(*args: Any, **options: Any) -> Any:
        made.append(args)
        return flex.create_block_mask(*args, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        for _ in range(2):
            found = varlen.flex_attention(
                q, k, v, packing, Scoring(**scoring), flex.flex_attention, create
            )
    torch.testing.assert_close(found, written_out(q, k, v, **scoring), atol=1e-5, rtol=1e-5)
    assert len(made) == 1, "the mask of a stream is made once, for all layers"


@pytest.mark.parametrize("scoring", [Scoring(softcap=2.0), Scoring(window=4, softcap=2.0)])
def test_a_soft_cap_is_compiled_once_for_streams_of_any_length(scoring: Scoring) -> None:
    """FlexAttention's compiler takes a number of Python's for one that each call may change, and
    cannot lower it: "unbacked_bindings"."""
    from torch.nn.attention import flex_attention as flex

    graphs: list[Any] = []

    def record(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    attend = torch.compile(flex.flex_attention, dynamic=True, backend=record)
    draw = torch.Generator().manual_seed(0)
    for lengths in ((20, 7), (31, 2, 9), (64,)):
        q, k, v = (torch.randn(sum(lengths), 2, 16, generator=draw) for _ in range(3))
        packing = Packing.of(lengths)
        found = varlen.flex_attention(q, k, v, packing, scoring, attend, flex.create_block_mask)
        options = {"window": scoring.window, "softcap": scoring.softcap}
        expected = packed_attention(q, k, v, packing, layer=0, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    code = "".join(graph.print_readable(print_output=False) for graph in graphs)
    assert "tanh" in code
    assert ".item()" not in code, "a number that the compiler cannot name"
    assert len(graphs) == 1


def test_no_kernel_is_chosen_that_ignores_what_a_layer_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)
    plain, window, cap = Scoring(), Scoring(window=4), Scoring(softcap=1.0)
    sinks = Scoring(sinks_H=torch.zeros(4))
    asked = (plain, window, cap, sinks)
    flash, torchs, flex = (
        varlen.flash_attention, varlen.torch_attention, varlen.compiled_flex_attention,
    )  # fmt: skip

    def chosen(width: int, values: int | None = None) -> list[object]:
        return [varlen.choose(s, width, values or width, gpu) for s in asked]

    monkeypatch.setattr(varlen, "_has_flash_attn", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    varlen.is_recent.cache_clear()
    assert chosen(64) == [None] * 4  # none of them runs on Turing
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    varlen.is_recent.cache_clear()
    assert chosen(64) == [flash, flash, flash, flex]
    monkeypatch.setattr(varlen, "_has_flash_attn", lambda: False)
    assert chosen(64) == [torchs, torchs, flex, flex]
    assert chosen(20) == [flex] * 4  # torch's takes multiples of 8
    assert chosen(512) == [flex] * 4
    assert chosen(12) == [None] * 4
    assert chosen(64, 32) == [None] * 4  # values narrower than keys: one by one
    varlen.is_recent.cache_clear()
