"""Best-fit bins, and the invariants of the packed stream."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llavakit.stream.batch import pack
from llavakit.stream.encode import IMAGE_ID, Encoded
from llavakit_plugins.training.best_fit import best_fit

lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, 80), max_size=40), st.just(capacity))
)


@given(lengths_and_capacity)
@settings(deadline=None)
def test_every_item_lies_in_one_bin_that_holds_it(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    bins = best_fit(lengths, capacity)
    assert sorted(index for items in bins for index in items) == list(range(len(lengths)))
    for items in bins:
        assert items == sorted(items)
        assert sum(lengths[index] for index in items) <= capacity or len(items) == 1


@given(lengths_and_capacity)
@settings(deadline=None)
def test_little_room_is_wasted(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    bins = best_fit(lengths, capacity)
    loads = [sum(lengths[index] for index in items) for items in bins]
    fitting = [load for load in loads if load <= capacity]
    if len(fitting) > 1:  # or two of them would have been one
        assert sum(sorted(fitting)[:2]) > capacity
    optimum = -(-sum(fitting) // capacity)
    assert len(fitting) <= 11 / 9 * optimum + 1 or len(fitting) <= 1.7 * optimum + 1


@given(lengths_and_capacity)
@settings(deadline=None)
def test_each_item_goes_to_the_fullest_bin_that_has_room(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    expected: list[int] = []
    for length in sorted(lengths, reverse=True):
        fullest = max((load for load in expected if load + length <= capacity), default=0)
        if fullest:
            expected.remove(fullest)
        expected.append(fullest + length)
    bins = best_fit(lengths, capacity)
    assert sorted(sum(lengths[i] for i in items) for items in bins) == sorted(expected)


def test_bins_of_lengths_like_the_papers_are_nearly_full() -> None:
    draw = np.random.default_rng(0)
    lengths = (256 + draw.gamma(2.0, 80.0, 4000)).astype(int).clip(max=2048).tolist()
    bins = best_fit(lengths, 8192)
    assert len(bins) <= 1.01 * sum(lengths) / 8192 + 1


samples = st.lists(
    st.builds(
        lambda ids, supervised, cut: (ids, supervised[: len(ids)], cut),
        st.lists(st.one_of(st.integers(1, 50), st.just(IMAGE_ID)), min_size=1, max_size=12),
        st.lists(st.booleans(), min_size=12, max_size=12),
        st.one_of(st.none(), st.integers(1, 30)),
    ),
    min_size=1,
    max_size=6,
)


@given(samples, st.integers(1, 5))
@settings(deadline=None)
def test_the_stream_is_its_samples_end_to_end(
    drawn: list[tuple[list[int], list[bool], int | None]], visual_tokens: int
) -> None:
    encoded, expected_rows, expected_targets, expected_visual = [], [], [], []
    start = 0
    starts = [0]
    for ids, supervised, cut in drawn:
        flags = np.array(supervised) & (np.array(ids) != IMAGE_ID)
        encoded.append(Encoded(np.array(ids, dtype=np.int64), flags, cut))
        rows: list[tuple[int, bool]] = []  # written out by hand, one token at a time
        for token, flag in zip(ids, flags.tolist(), strict=True):
            rows += [(-1, False)] * visual_tokens if token == IMAGE_ID else [(token, flag)]
        rows = rows[:cut]
        for place, (token, flag) in enumerate(rows):
            if token == -1:
                expected_visual.append(start + place)
            if flag and place:
                expected_targets.append((start + place - 1, token))
        expected_rows += [max(token, 0) for token, _ in rows]
        start += len(rows)
        starts.append(start)
    numbers = list(range(10, 10 + len(drawn)))
    batch = pack(encoded, numbers, visual_tokens)
    assert batch.token_ids_T.tolist() == expected_rows
    assert batch.packing.starts == tuple(starts)
    assert batch.packing.lengths == tuple(b - a for a, b in pairwise(starts))
    positions = [place for length in batch.packing.lengths for place in range(length)]
    assert batch.packing.position_ids_T.tolist() == positions
    assert batch.packing.last_rows_S.tolist() == [end - 1 for end in starts[1:]]
    assert batch.visual_rows_N.tolist() == expected_visual
    targets = list(
        zip(batch.supervised_rows.index_M.tolist(), batch.targets_M.tolist(), strict=True)
    )
    assert targets == expected_targets
    assert sum(batch.supervised_rows.counts) == len(expected_targets)
    assert batch.samples == tuple(numbers)
    images = [(n, i) for n, (ids, _, _) in zip(numbers, drawn, strict=True)
              for i in range(ids.count(IMAGE_ID))]  # fmt: skip
    assert list(batch.images) == images
    kept = batch.visual_kept_N
    whole = len(images) * visual_tokens
    if kept is None:
        assert len(expected_visual) == whole
    else:
        assert len(kept) == len(expected_visual) < whole
        assert kept.tolist() == sorted(set(kept.tolist()))
    lengths = [item.length(visual_tokens) for item in encoded]
    assert lengths == list(batch.packing.lengths)
    counts = [int(item.expand(visual_tokens).supervised[1:].sum()) for item in encoded]
    assert counts == list(batch.supervised_rows.counts)


def test_the_number_of_samples_must_fit() -> None:
    one = Encoded(np.array([1, 2]), np.array([False, True]))
    with pytest.raises(ValueError, match="zip"):
        pack([one], [0, 1], 4)
