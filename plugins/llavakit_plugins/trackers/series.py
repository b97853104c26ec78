"""What these trackers have in common: events become series of numbers, answers and last figures."""

from __future__ import annotations

import json
import tomllib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llavakit import DataError, Options, Tracker, open_image, peek_json, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

_EDGE = 256  # pixels of an image's longer side, as it is sent
_FINISHED = ("done", "kept", "taken")

Value = str | int | float | bool


class TrackerOptions(Options):
    images: bool = True
    """Whether the images of validation answers are recorded beside them."""


@dataclass(frozen=True)
class Answer:
    """An answer to the first question of a held-out sample."""

    id: str
    text: str  #: Question, answer and what is true, a line each.
    image: Path | None

    def thumbnail(self) -> Image | None:
        """Return the image, small, or None where there is none that can be read."""
        if self.image is None:
            return None
        with suppress(DataError):
            image = open_image(self.image, f"sample `{self.id}`").convert("RGB")
            image.thumbnail((_EDGE, _EDGE))
            return image
        return None


@dataclass(frozen=True)
class Start:
    """A run as it begins: what its folder says of it."""

    folder: Path
    name: str
    settings: Mapping[str, Value]  #: The recipe and the environment, `steps.0.train.connector`.
    recipe: str  #: As TOML.


def read_start(folder: Path) -> Start:
    """Return what recipe.toml and environment.json say; neither holds a key or password."""
    text, table = "", dict[str, Any]()
    with suppress(OSError, ValueError):
        text = (folder / "recipe.toml").read_text(encoding="utf-8")
        table = tomllib.loads(text)
    environment = peek_json(folder / "environment.json")
    settings = dict(_flat(table, "")) | dict(_flat(environment, "environment."))
    return Start(folder, str(table.get("name", folder.resolve().name)), settings, text)


def _flat(value: Any, key: str) -> Iterator[tuple[str, Value]]:
    """Yield the values of tables within tables, named by the way to each."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}{name}.")
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, item in enumerate(value, start=1):
            yield from _flat(item, f"{key}{number}.")
    elif isinstance(value, str | int | float | bool):
        yield key.rstrip("."), value
    elif value is not None:
        yield key.rstrip("."), json.dumps(value)


class SeriesTracker(Tracker):
    """A tracker of numbers over steps. A step's folder, `02-finetune`, names its series."""

    library: ClassVar[tuple[str, str]] = ("", "")  #: The module that it needs, and its extra.
    Options = TrackerOptions
    options: TrackerOptions

    @classmethod
    def missing(cls, options: Any) -> str | None:
        module, extra = cls.library
        if not module or find_spec(module) is not None:
            return None
        return (
            f"the tracker `{cls.name}` needs {module}, which is not installed; "
            f"`pip install 'llavakit[{extra}]'`"
        )

    def same_run(self, folder: Path, new: str) -> str:
        """Return what the library knows the run by: `new`, or what it was before it was resumed."""
        known = folder / f".{self.name}-run"
        if not known.is_file():
            write_text(known, f"{new}\n")
        return known.read_text(encoding="utf-8").strip()

    def begin(self, directory: Path) -> None:
        self.start(read_start(directory))
        self._folder = directory

    def record(self, event: Mapping[str, Any]) -> None:
        step, name = str(event["step"]), event["event"]
        if "at" in event:
            self.numbers(step, int(event["at"]), dict(_numbers(event)))
            answers = event.get("answers")
            if isinstance(answers, Sequence) and answers:
                self.answers(step, int(event["at"]), [_answer(answer) for answer in answers])
        elif name in _FINISHED and step:
            found = peek_json(self._folder / step / "artifact.json").get("metrics")
            self.results(step, dict(_numbers(found if isinstance(found, Mapping) else event)))

    @abstractmethod
    def start(self, start: Start) -> None:
        """Begin to record, or go on, where the run is one that was recorded before."""

    @abstractmethod
    def numbers(self, step: str, at: int, numbers: Mapping[str, float]) -> None:
        """Record numbers of a step of the recipe after `at` optimisation steps."""

    def answers(self, step: str, at: int, answers: Sequence[Answer]) -> None:
        """Record answers to held-out samples; here not at all."""

    @abstractmethod
    def results(self, step: str, numbers: Mapping[str, float]) -> None:
        """Record what a finished step reports."""


def _numbers(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield an event's numbers by name; learning rates by part are `lr_connector`."""
    for name, value in event.items():
        if name == "lrs" and isinstance(value, Mapping):
            for part, rate in value.items():
                yield f"lr_{part}", float(rate)
        # True is a number in Python, and no measurement
        elif name in ("time", "at") or isinstance(value, bool):
            continue
        elif isinstance(value, int | float):
            yield name, float(value)


def _answer(told: Mapping[str, Any]) -> Answer:
    lines = [f"{name}: {told[name]}" for name in ("question", "answer", "truth") if told.get(name)]
    image = told.get("image")
    return Answer(str(told.get("id", "")), "\n".join(lines), Path(image) if image else None)
