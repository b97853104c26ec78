"""What `llava-run score` runs: scorers of files that hold answers or reviews already."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llavakit import Component, Table


@dataclass(frozen=True)
class FileScore:
    """What came of scoring files."""

    data: Mapping[str, Any]  #: Everything, for programs: what `--json` prints. No NaN, no infinity.
    tables: Sequence[Table]  #: The same for people.
    notes: Sequence[str] = ()  #: What was left out or could not be read, in sentences.


class FileScorer(Component):
    """Scores files without a model: `llava-run score NAME`.

    A `Benchmark` names its scorers in `scorers`. The fields of `Options` are the command's flags:
    `max_words` is `--max-words`; a `Use[Kind]` takes a component's name, its options by `--set`.
    """

    positional: ClassVar[tuple[str, ...]] = ()  #: Required options without a flag, in order.

    @abstractmethod
    def score(self) -> FileScore:
        """Read the files and score them. Raises DataError where they cannot be scored."""
