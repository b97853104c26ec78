"""What decides how a data set is tokenised: its files, the template, the tokenizer, the tiling."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import llavakit
from llavakit import (
    DataError,
    Dataset,
    LlavaError,
    LlavaModel,
    PromptTemplate,
    Run,
    Turn,
    Use,
    digest,
)
from llavakit.contracts.data import IMAGE
from llavakit_plugins.datasets.stored_files import find_files, is_elsewhere, is_pattern

_FORMAT = 1  # of what is written; count it up where that changes
_MOST_LISTED = 4096  # files of a folder whose sizes and times count one by one
_KEPT = ("index",)  # options that name a folder for what is known of the data
_HASHED = 1 << 26  # bytes of the largest file whose content counts, and not its size and time
_ADDRESS = re.compile(r"[/*?{]")  # in what names data that is no file of this machine

_PROBE = (
    Turn("human", f"{IMAGE}\nWhat is it?"),
    Turn("gpt", "A cat."),
    Turn("human", "Its colour?"),
    Turn("gpt", "Red."),
)


def key_of(
    run: Run,
    use: Use[Dataset],
    model: LlavaModel,
    template: PromptTemplate,
    max_length: int,
    stamps: list[Any] | None = None,
) -> str:
    """Return the same text for data that would be tokenised the same, and only for that.

    `stamps` are those of its files, where they are known.
    """
    views = model.views
    facts = [
        _FORMAT,
        llavakit.__version__,
        use.model_dump(mode="json"),
        stamps_of(run, use) if stamps is None else stamps,
        facts_of(template),
        _rendered(template, model.language.tokenizer),
        _tokenizer(model.language.tokenizer),
        None if views.tiling is None else facts_of(views.tiling),
        [*views.view, views.upright],
        min(max_length, model.language.max_length),
    ]
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def stamps_of(run: Run, use: Use[Dataset]) -> list[Any]:
    """Return what changes with the files and folders that the options of a data set name.

    Most are lists that begin with the file's path or address.
    Data of another place, such as the hub, may change unseen: then it is tokenised for one attempt
    at the step, which `--resume` goes on with.
    """
    stamps: list[Any] = []
    unseen = False
    for text in _texts(use.options):
        path = Path(text)
        if text.startswith("@"):
            step, _, rest = text[1:].partition("/")
            path = run.earlier.get(step, Path()) / rest
        try:
            stamps.append(_stamp(path))
        except (OSError, ValueError):  # no path, as a rule
            stored = _stored(text, use)
            stamps += stored
            unseen |= not stored and _ADDRESS.search(text) is not None
    if unseen or not stamps:
        begun = run.directory / "begun.json"
        stamps.append(begun.stat().st_mtime_ns if begun.exists() else time.time_ns())
    return stamps


def _stored(text: str, use: Use[Dataset]) -> list[Any]:
    """Return what changes with files named by a pattern or an address; nothing where unknown."""
    if not is_pattern(text) and not is_elsewhere(text):
        return []
    storage = use.options.get("storage")
    try:
        files = find_files((text,), storage if isinstance(storage, dict) else {})
    except DataError:  # no name of files, or what reads them says what is wrong
        return []
    # a server that tells nothing of when a file was changed tells too little
    known = all(file.stamp for file in files)
    return [[file.address, file.size, file.stamp] for file in files] if known else []


def _stamp(path: Path) -> list[Any]:
    path = Path(os.path.abspath(path))
    state = path.stat()
    if path.is_file():
        small = state.st_size <= _HASHED  # no start waits for many gigabytes to be read
        return [str(path), digest(path) if small else [state.st_size, state.st_mtime_ns]]
    listed: list[Any] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_file():
                found = entry.stat()
                listed.append([entry.name, found.st_size, found.st_mtime_ns])
            if len(listed) > _MOST_LISTED:  # images, and they are no rows
                return [str(path), state.st_mtime_ns]
    return [str(path), sorted(listed)]


def _texts(value: object) -> list[str]:
    """Return every text in options that may name data."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [item for key, item in value.items() if key not in _KEPT]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return []


def facts_of(component: Any) -> list[Any]:
    """Return what tells one component from another: its class and its options."""
    options = getattr(component, "options", None)
    stated = options.model_dump(mode="json") if isinstance(options, BaseModel) else repr(options)
    kind = type(component)
    return [kind.__module__, kind.__qualname__, stated]


def _rendered(template: PromptTemplate, tokenizer: Any) -> Any:
    """Return how a template renders a conversation: its own text may have changed."""
    try:
        segments = template.segments(_PROBE, tokenizer)
    except LlavaError as error:
        return str(error)
    return [[segment.text, segment.supervised, segment.markup] for segment in segments]


def _tokenizer(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = "" if backend is None else backend.to_str()
    return [
        type(tokenizer).__qualname__,
        sha256(state.encode()).hexdigest(),
        getattr(tokenizer, "chat_template", None),
    ]
