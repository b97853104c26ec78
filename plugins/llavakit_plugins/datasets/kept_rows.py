"""Rows of a file or table, of which those that cannot be used may be left out."""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence
from typing import Any

from llavakit import Dataset


class KeptRows(Dataset):
    """A data set over `_rows`; the numbers of those that are used take eight bytes each."""

    _rows: Any
    _numbers: Sequence[int] | None = None  #: Of the rows that are used, from 0; None for all.

    def __len__(self) -> int:
        return len(self._rows) if self._numbers is None else len(self._numbers)

    def _leave_out(self, bad: Container[int]) -> None:
        self._numbers = array("q", (n for n in range(len(self._rows)) if n not in bad))

    def _number(self, index: int) -> int:
        """Return the number of the row that is the sample at `index`. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index if self._numbers is None else self._numbers[index]
