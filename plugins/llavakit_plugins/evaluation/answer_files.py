"""Files of answers as they are written: one JSON object per line, in LLaVA's format.

Where several processes answer together, each writes the lines of its own share to a file of its
own beside the main one, `NAME.rank1` and so on; the main process takes them over at the end, and
at the beginning those that a killed attempt left. All processes see the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from glob import escape
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from llavakit import DataError, JsonLines, Question, write_text
from llavakit.contracts.data import ImageFile, ImageSource
from llavakit.contracts.run import ProcessGroup
from llavakit_plugins.datasets.rows import read_lines
from llavakit_plugins.evaluation.question_files import Dialogue

Row = dict[str, Any]


class AnswerFile:
    """The answers to questions; each is on the disk before it counts.

    With `resume`, the answers of an interrupted attempt are read; half a line that a killed process
    left is dropped. Raises DataError for a line that is not an answer of this run.
    """

    def __init__(
        self,
        path: Path,
        model_id: str,
        *,
        resume: bool,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.path, self._model_id = path, model_id
        self.process_group = process_group or ProcessGroup()
        self._known: dict[bytes, str] = {}
        if self.process_group.is_main:
            if not resume:
                for part in self._parts():
                    part.unlink()
                write_text(path, "")
            self._lines = JsonLines(path)
            if resume:
                self._read(path)
                self._take_over()
        self.process_group.any(False)  # the others begin when the main one has read what is there
        if not self.process_group.is_main:
            own = path.with_name(f"{path.name}.rank{self.process_group.rank}")
            write_text(own, "")
            self._lines = JsonLines(own)

    def get(self, question: Question) -> str | None:
        """Return the answer to a question with the same id, prompt and images, or None."""
        return self._known.get(_key(row_of(question, "", ""))) if self._known else None

    def append(self, questions: Sequence[Question], answers: Sequence[str]) -> None:
        """Append answers and wait until they are on disk."""
        rows = [self.row(q, a) for q, a in zip(questions, answers, strict=True)]
        self._lines.append(rows)
        self._note(rows)

    def join(self) -> None:
        """Wait for the other processes; the main one then has the answers of all."""
        self.process_group.any(False)
        if self.process_group.is_main and self.process_group.size > 1:
            self._take_over()

    def row(self, question: Question, answer: str, **more: Any) -> Row:
        """Return one line; `more` are further facts about the question."""
        return row_of(question, answer, self._model_id, **more)

    def _parts(self) -> Iterator[Path]:
        return iter(sorted(self.path.parent.glob(f"{escape(self.path.name)}.rank*")))

    def _take_over(self) -> None:
        """Move what other processes answered to the main file."""
        for part in self._parts():
            JsonLines(part)  # cuts half a line
            # the lines reach the disk before the part is removed; a kill between the two leaves
            # both, and the answers are then read twice, which changes nothing
            self._lines.append(self._read(part))
            part.unlink()

    def _read(self, path: Path) -> list[Row]:
        rows = []
        for where, row in read_lines(path):
            images = row.get("image")
            images = images if isinstance(images, list) else [None]
            texts = [row.get("prompt"), row.get("text"), *images]
            if not all(isinstance(text, str) for text in texts):
                raise DataError(
                    f"{where}: not an answer that this run wrote; remove the line, and its "
                    "question is asked again"
                )
            rows.append(dict(row))
        self._note(rows)
        return rows

    def _note(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._known[_key(row)] = row["text"]


def row_of(question: Question, answer: str, model_id: str, **more: Any) -> Row:
    """Return one line of a file: the keys of the original LLaVA, and further facts."""
    names = names_of(question.images)
    # the original draws a random `answer_id`;
    # this one depends on the answer alone, so that two runs write equal files
    facts = json.dumps([model_id, question.id, question.prompt, names, answer])
    history = {"history": question.history} if isinstance(question, Dialogue) else {}
    return {
        "question_id": question.id,
        **history,
        "prompt": question.prompt,
        "image": names,
        "text": answer,
        "truth": question.truth,
        "category": question.category,
        "answer_id": sha256(facts.encode()).hexdigest()[:22],
        "model_id": model_id,
        "metadata": {},
        **more,
    }


def _key(row: Row) -> bytes:
    """Return what tells a question from others; texts of a million would fill the memory."""
    facts = [str(row.get("question_id")), row["prompt"], row["image"], row.get("history", [])]
    return blake2b(json.dumps(facts).encode(), digest_size=16).digest()


def names_of(images: Sequence[ImageSource]) -> list[str]:
    """Return the images' paths; an image that is not a file has no lasting name and gives ""."""
    # paths first: Python 3.11 takes long to find whether a class is as a Protocol says
    return [str(image) if isinstance(image, Path | ImageFile) else "" for image in images]
