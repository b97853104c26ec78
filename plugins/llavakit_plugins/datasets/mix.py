"""Several data sets as one, end to end; training shuffles them together (arXiv 2304.08485, section
4.2)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from llavakit import Build, DataError, Dataset, Options, Registry, Sample, Use

_MOST = 1000  # times that a part is used: the indices of all of them are held


class MixOptions(Options):
    parts: tuple[Use[Dataset], ...] = Field(min_length=1)
    weights: tuple[float, ...] | None = None
    """How often each part is used in an epoch: 2 means twice, 0.5 means half of it, drawn with
    `seed`; by default once."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_weight_a_part(self) -> MixOptions:
        if self.weights is not None:
            if len(self.weights) != len(self.parts):
                raise ValueError(f"give `weights` one number for each of {len(self.parts)} parts")
            if min(self.weights) <= 0:
                raise ValueError("`weights` are above 0; leave a part out that is not wanted")
            if max(self.weights) > _MOST:
                raise ValueError(f"`weights` are up to {_MOST:,}; make more `epochs` of the data")
        return self


class Mix(Dataset):
    """The samples of all parts, one part after the other, each as often as its weight says."""

    name = "mix"
    Options = MixOptions

    def __init__(self, options: MixOptions, *, build: Build) -> None:
        self.parts = [build(part) for part in options.parts]
        weights = options.weights or (1.0,) * len(self.parts)
        self._chosen = [
            # a seed of its own for each part: two parts of equal size then draw different rows
            _choose(len(part), weight, options.seed + number)
            for number, (part, weight) in enumerate(zip(self.parts, weights, strict=True))
        ]
        for number, (part, chosen) in enumerate(zip(self.parts, self._chosen, strict=True), 1):
            if len(part) and not len(chosen):
                raise DataError(
                    f"part {number} of `mix` is left out: {weights[number - 1]} times its "
                    f"{len(part)} samples is less than one; raise its weight, or remove the part"
                )
        self._ends = list(accumulate(map(len, self._chosen)))

    @classmethod
    def expect(cls, options: MixOptions) -> tuple[int, int] | None:
        registry = Registry.installed()
        parts = [registry.chosen(part).expect(registry.options(part)) for part in options.parts]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        weights = options.weights or (1.0,) * len(parts)
        samples = [round(part[0] * weight) for part, weight in zip(known, weights, strict=True)]
        tokens = sum(part[1] * count for part, count in zip(known, samples, strict=True))
        return sum(samples), round(tokens / max(1, sum(samples)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        offset = index - (self._ends[part] - len(self._chosen[part]))
        return self.parts[part][int(self._chosen[part][offset])]

    def notes(self) -> Sequence[str]:
        return [note for part in self.parts for note in part.notes()]


def _choose(samples: int, weight: float, seed: int) -> Any:
    """Return the indices of one epoch: all samples for each whole repetition, and a random draw for
    the fraction."""
    times = int(weight)
    rest = round((weight - times) * samples)
    if not rest:
        return np.tile(np.arange(samples), times) if times != 1 else range(samples)
    drawn = np.random.default_rng(seed).choice(samples, rest, replace=False)
    # sorted, because a part that reads from its file in order is faster; training shuffles anyway
    return np.concatenate([np.tile(np.arange(samples), times), np.sort(drawn)])
