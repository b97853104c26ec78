"""The JSON of the LLaVA papers: a list of `{id, image, conversations}`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llavakit import DataError, Dataset, InputPath, Options, Sample, Turn
from llavakit.images import check_image, inside

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_CHARACTERS_A_TOKEN = 4.2  # of English under LLaMA's tokenizer, roughly: for plans only


class Expected(BaseModel):
    """What a plan reckons with while the file is not there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    """Mean text tokens a sample."""


class ConversationsOptions(Options):
    path: InputPath
    images: InputPath | None = None
    """The folder that `image` is relative to; the file's own where absent."""
    kind: str = ""
    """What sort of response the file teaches, for losses by sort."""
    limit: int | None = Field(default=None, ge=1)
    """Use only so many samples from the start."""
    expect: Expected | None = None


class Conversations(Dataset):
    """LLaVA's training JSON, as it is.

    As in the original, a first turn from `gpt` is dropped. A row may have several images: then
    `image` is a list, in the order of the placeholders.

    Raises DataError where the file, a row, or an image's path cannot be used.
    """

    name = "conversations"
    Options = ConversationsOptions

    def __init__(self, options: ConversationsOptions) -> None:
        folder = options.images or options.path.parent
        rows = read_rows(options.path)[: options.limit]
        self.samples = [
            _sample(row, number, options, folder) for number, row in enumerate(rows, start=1)
        ]
        _check_images(self.samples, options.path)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @classmethod
    def expect(cls, options: ConversationsOptions) -> tuple[int, int] | None:
        if options.path.is_file():
            rows = read_rows(options.path)[: options.limit]
            text = sum(len(str(row.get("conversations"))) for row in rows)
            return len(rows), round(text / _CHARACTERS_A_TOKEN / max(1, len(rows)))
        if options.expect is None:
            return None
        return min(options.expect.samples, options.limit or 10**12), options.expect.tokens


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a JSON list. Raises DataError with line and column where it is broken."""
    try:
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply to read; mend the file") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}; mend the file"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is not a list of objects; LLaVA's training JSON is one list")
    if not rows:
        raise DataError(f"{path} holds no samples; choose another file")
    return rows


def _sample(
    row: Mapping[str, Any], number: int, options: ConversationsOptions, folder: Path
) -> Sample:
    identity = str(row.get("id", f"#{number}"))
    where = f"sample `{identity}` of {options.path}"
    turns: list[Turn] = []
    conversations = row.get("conversations")
    if not isinstance(conversations, list):
        raise DataError(f"{where} has no list `conversations`; add it")
    for turn in conversations:
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise DataError(
                f"{where}: a turn needs `from` (human or gpt) and `value` (text), got {turn!r:.80}"
            )
        if turns or role == "human":
            turns.append(Turn(role, turn["value"]))  # type: ignore[arg-type]
    names = row.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: `image` is a path, or a list of paths, got {names!r:.80}")
    images = tuple(inside(folder, name, where) for name in names)
    sample = Sample(identity, tuple(turns), images, options.kind)
    sample.check(str(options.path))
    return sample


def _check_images(samples: list[Sample], path: Path) -> None:
    """Raise DataError naming images that cannot be used, before hours of work depend on them."""
    wanted = {image: sample.id for sample in samples for image in sample.images}
    images = {image: identity for image, identity in wanted.items() if isinstance(image, Path)}
    missing, damaged = [], []
    for image, identity in images.items():
        if not os.path.isfile(image):  # unlike Path.is_file, false for any impossible name
            missing.append(f"{image} (sample `{identity}`)")
            continue
        try:
            check_image(image, f"sample `{identity}`")
        except DataError as error:
            damaged.append(str(error))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"{path}: {len(missing)} of {len(wanted)} images are missing: "
            f"{', '.join(missing[:3])}{more}; check the images folder"
        )
    if damaged:
        more = f" ({len(damaged) - 1} more cannot be used)" if len(damaged) > 1 else ""
        raise DataError(f"{path}: {damaged[0]}{more}")
