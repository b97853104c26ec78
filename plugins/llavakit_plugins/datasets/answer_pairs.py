"""Both answers of preferences, one behind the other, as training compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llavakit import Build, DataError, Dataset, Options, Sample, Turn, Use


class AnswerPairsOptions(Options):
    data: Use[Dataset]
    """Samples that have a `rejected` answer, too."""


class AnswerPairs(Dataset):
    """Each sample of a data set of preferences twice: with its answer, and with the rejected one.

    The step `prefer` makes this of its data by itself.
    """

    name = "answer-pairs"
    Options = AnswerPairsOptions

    def __init__(self, options: AnswerPairsOptions, *, build: Build) -> None:
        self.options = options
        self._data = build(options.data)
        if len(self._data):
            self[0]  # for its error: before anything is tokenised

    def __len__(self) -> int:
        return 2 * len(self._data)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample = self._data[index // 2]
        if not sample.rejected or not sample.turns or sample.turns[-1].role != "gpt":
            raise DataError(
                f"sample `{sample.id:.200}` has no two answers to prefer one of; give its row "
                "`chosen` and `rejected`"
            )
        chosen = replace(sample, rejected=None)
        if index % 2 == 0:
            return chosen
        worse = replace(chosen, turns=(*sample.turns[:-1], Turn("gpt", sample.rejected)))
        worse.check()
        return worse

    def notes(self) -> Sequence[str]:
        return self._data.notes()
