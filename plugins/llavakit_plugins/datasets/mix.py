"""Several data sets as one, end to end; training shuffles them together (paper, section 4.2)."""

from __future__ import annotations

from llavakit import Build, Dataset, Options, Sample, Use


class MixOptions(Options):
    parts: tuple[Use[Dataset], ...]


class Mix(Dataset):
    """The parts' samples, one part behind the other."""

    name = "mix"
    Options = MixOptions

    def __init__(self, options: MixOptions, *, build: Build) -> None:
        self.parts = [build(part) for part in options.parts]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Sample:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)
