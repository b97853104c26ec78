"""Questions of `llava-run predict`: LLaVA's question files, messages, conversations, data sets.

Rows stay in their file; each is read when it is asked, so that a million of them with their images
need no memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

from llavakit import DataError, Dataset, Message, Question, Sample, Video, and_more
from llavakit.contracts.data import IMAGE, ImageSource
from llavakit.contracts.model import Asked
from llavakit_plugins.datasets.conversation_rows import RowReader
from llavakit_plugins.datasets.image_files import check_image, whole_images
from llavakit_plugins.datasets.json_stream import Row, read_lines, read_list
from llavakit_plugins.datasets.streaming import LINES, StoredRows
from llavakit_plugins.datasets.text_files import open_text
from llavakit_plugins.evaluation.questions import question_row
from llavakit_plugins.media import check_video


@dataclass(frozen=True)
class Dialogue(Question):
    """A question behind other turns, or with a system text of its own."""

    sample: Sample = field(default_factory=lambda: Sample("", ()))
    """All of it, up to the question."""

    @property
    def history(self) -> list[dict[str, str]]:
        """What stands before the question, as messages."""
        system = [] if self.sample.system is None else [("system", self.sample.system)]
        turns = [
            ("user" if turn.role == "human" else "assistant", turn.text)
            for turn in self.sample.turns[:-1]
        ]
        return [{"role": role, "content": text} for role, text in (*system, *turns)]


def question_of(sample: Sample, where: str) -> Question:
    """Return what a sample asks last; the answer behind it, where there is one, is the truth.

    Raises DataError where it asks nothing.
    """
    turns, truth = sample.turns, ""
    if turns and turns[-1].role == "gpt":
        turns, truth = turns[:-1], turns[-1].text
    if not turns:
        raise DataError(f"{where}: sample `{sample.id:.200}` asks nothing; remove it")
    shown = sum(turn.text.count(IMAGE) for turn in turns)
    plain = len(turns) == 1 and sample.system is None
    # those of turns behind the question belong to no mark that is shown
    images = sample.images[:shown]
    facts = (sample.id, turns[-1].text, images, truth, sample.kind)
    asked = Sample(sample.id, turns, images, sample.kind, sample.system)
    return Question(*facts) if plain else Dialogue(*facts, sample=asked)


def asked_of(question: Question) -> tuple[Asked, Sequence[ImageSource]]:
    """Return what a model of ours is asked: a prompt with its images, or a whole dialogue."""
    if isinstance(question, Dialogue):
        return question.sample, ()
    return question.prompt, question.images


def messages_of(question: Question) -> tuple[Message, ...]:
    """Return what a chat model is asked: each user's message with the images of its marks.

    Images stand in front of the text, as the protocol of chat models has no place within it.
    """
    images = iter(question.images)
    if not isinstance(question, Dialogue):
        return (Message("user", _unmarked(question.prompt), tuple(images)),)
    sample = question.sample
    found = [] if sample.system is None else [Message("system", sample.system)]
    for turn in sample.turns:
        if turn.role == "gpt":
            found.append(Message("assistant", turn.text))
        else:
            shown = tuple(islice(images, turn.text.count(IMAGE)))
            found.append(Message("user", _unmarked(turn.text), shown))
    return tuple(found)


def _unmarked(text: str) -> str:
    # with the newline that LLaVA's files have beside the mark: the text alone would begin with it
    return text.replace(f"{IMAGE}\n", "").replace(f"\n{IMAGE}", "").replace(IMAGE, "").strip()


class _Lazy(Sequence[Question]):
    """Questions that are made when they are looked at."""

    def __init__(self, make: Callable[[int], Question], indices: Sequence[int]) -> None:
        self._make, self._indices = make, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | Sequence[Question]:
        if isinstance(index, slice):
            return _Lazy(self._make, self._indices[index])
        return self._make(self._indices[index])


def of_dataset(data: Dataset, where: str, limit: int | None = None) -> Sequence[Question]:
    """Return the last question of each sample of a data set."""
    count = len(data) if limit is None else min(limit, len(data))
    return _Lazy(lambda index: question_of(data[index], where), range(count))


def of_file(path: Path, images: Path | None, limit: int | None = None) -> Sequence[Question]:
    """Return the questions of a file: a JSON list, or one object per line.

    A row has `question_id`, `text` and perhaps `image`, as LLaVA's question files, or `messages`,
    or `conversations`. `images` is the folder of its images, by default the file's. Raises
    DataError for a row that is no question, an id that occurs twice, and for images that are
    missing or broken: all of it before the first question is asked.
    """
    reader = RowReader(str(path), path.parent if images is None else images)
    rows, ids, used = StoredRows(path), set[str](), dict[str, str]()
    doubled: list[str] = []
    for number, row in enumerate(_rows(path)):
        if number == limit:
            break
        question = _question(row.value, number, reader)
        if row.doubled is not None:
            raise DataError(
                f"question `{question.id}` of {path}: `{row.doubled:.80}` is there more than once; "
                "keep one of it"
            )
        identity = str(question.id)
        if identity in ids:
            doubled.append(identity)
        ids.add(identity)
        for image in question.images:
            if isinstance(image, Video):
                check_video(image, f"question `{identity}` of {path}")
            if isinstance(image, Path):
                used.setdefault(str(image), identity)
        rows.append(row)
    if not len(rows):
        raise DataError(f"{path} holds no questions; choose another file")
    if doubled:
        raise DataError(
            f"{path}: {and_more(doubled, 5, '`{}`'.format)} occur more than once; give each "
            "question an id of its own"
        )
    _check(used, path)
    return _Lazy(lambda index: _question(rows[index], index, reader), array("l", range(len(rows))))


def _rows(path: Path) -> Iterable[Row]:
    """Return the rows of a file; its first character tells a list from lines, as its name may."""
    if path.suffix.lower() in LINES:
        return read_lines(path)
    with open_text(path) as file:
        # 64 KiB: more white space than that in front of a list is not looked through
        is_list = file.read(1 << 16).lstrip().startswith(b"[")
    return read_list(path) if is_list else read_lines(path)


def _question(row: Mapping[str, Any], number: int, reader: RowReader) -> Question:
    if "messages" in row or "conversations" in row:
        given = row.get("id", row.get("question_id"))
        question = question_of(reader.sample({**row, "id": given}, number), reader.data)
        # a number stays one, as of other rows: programs that read the answers join by it
        return replace(question, id=given) if type(given) is int else question
    return question_row(row, f"{reader.data}, row {number + 1}", reader.folder).question


def _check(images: Mapping[str, str], path: Path) -> None:
    """Raise DataError for images that cannot be used: hours of work may depend on them."""
    broken = []
    for (image, identity), whole in zip(images.items(), whole_images(images), strict=True):
        if not whole:
            try:
                check_image(image, f"question `{identity}` of {path}")
            except DataError as error:
                broken.append(str(error))
    if broken:
        more = f" ({len(broken) - 1} more cannot be used)" if len(broken) > 1 else ""
        raise DataError(f"{broken[0]}{more}")
