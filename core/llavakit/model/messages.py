"""Messages, as people and services write them, become a Sample: one reader for every way of asking
and for every data set. Without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from llavakit.contracts.data import IMAGE, ImageSource, Message, Role, Sample, Turn
from llavakit.contracts.errors import DataError
from llavakit.contracts.model import Asked

_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_NAMES = {"human": "user", "gpt": "assistant"}
_SOURCES = ("image", "url", "path", "base64", "image_url")  # keys of an image, as others write it

Source = Callable[[Any], ImageSource]  #: Returns the image that a part names, or raises DataError.


def read_messages(
    messages: object,
    images: Sequence[ImageSource] = (),
    *,
    where: str = "the messages",
    source: Source = lambda given: given,
    id: str = "prompt",
    kind: str = "",
) -> Sample:
    """Return the sample that messages are: `[{"role": ..., "content": ...}]`.

    Roles are system (first, at most once), then user and assistant in turn. Content is a text or a
    list of parts, a line each: `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`
    as transformers has it (`url`, `path` and `base64`, too), or OpenAI's `image_url`. A part
    without a source, and `<image>` in a user's text, stand for the next of `images`. `source` is
    called with what a part names, and decides what may be read. Raises DataError, which begins
    with `where`.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where} are no list of `role` and `content`: got {messages!r:.80}")
    given, shown = iter(images), list[ImageSource]()
    system, turns = None, list[Turn]()
    for number, message in enumerate(messages, start=1):
        place = f"{where}: message {number}"
        if isinstance(message, Message):
            parts = [{"type": "image", "image": image} for image in message.images]
            text = [{"type": "text", "text": message.content}] if message.content else []
            message = {"role": message.role, "content": [*parts, *text]}
        if not isinstance(message, Mapping):
            raise DataError(f"{place} needs a `role` and a `content`, got {message!r:.80}")
        role = _ROLES.get(str(message.get("role")))
        expected = ("human", "gpt")[len(turns) % 2]
        first = not turns and system is None
        if role != expected and not (role == "system" and first):
            known = f"`{message.get('role')!s:.40}`".encode("unicode_escape").decode()
            raise DataError(
                f"{place} is from {known}, expected `{_NAMES[expected]}`; a system text stands "
                "first, and then the user and the assistant take turns"
            )
        found: list[ImageSource] = []
        human = role == "human"
        lines = _lines(message.get("content"), place, source, given, found, shows=human)
        text_ = "\n".join(lines)
        if found and not human:
            raise DataError(f"{place} has an image, which only a user's may; remove it")
        shown += found
        if role == "system":
            system = text_
        else:
            turns.append(Turn(cast("Role", role), text_))
    shown += given  # each of them needs a place: `check` says so
    sample = Sample(id, tuple(turns), tuple(shown), kind, system)
    sample.check(where)
    return sample


def _lines(
    content: object,
    place: str,
    source: Source,
    given: Iterator[ImageSource],
    found: list[ImageSource],
    *,
    shows: bool,
) -> Iterator[str]:
    """Yield the text of each part, and add the images that they show to `found`."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise DataError(
            f"{place} needs a `content`, a text or a list of parts, got {content!r:.80}"
        )
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
            if shows:
                found += [_next(given, place) for _ in range(part["text"].count(IMAGE))]
        elif kind in ("image", "image_url"):
            named = next((part[key] for key in _SOURCES if part.get(key) is not None), None)
            if isinstance(named, Mapping):  # OpenAI's {"url": ..., "detail": ...}
                named = named.get("url", "")
            if part.get("base64") is not None and named is part["base64"]:
                named = f"data:image;base64,{named}"
            found.append(_next(given, place) if named is None else source(named))
            yield IMAGE
        else:
            raise DataError(
                f"{place} has a part that is neither text nor image, or lacks its text: "
                f"{part!r:.80}; remove it"
            )


def _next(given: Iterator[ImageSource], place: str) -> ImageSource:
    image = next(given, None)
    if image is None:
        raise DataError(f"{place} has an image more than are given with it; give that, too")
    return image


def read_asked(asked: Asked, images: Sequence[ImageSource] = ()) -> Sample:
    """Return what is asked as a sample that ends with a question.

    A prompt is one question; one without placeholders gets one for each image in front.
    """
    if isinstance(asked, str):
        if IMAGE not in asked:
            asked = f"{IMAGE}\n" * len(images) + asked  # where the original puts them
        sample = Sample("prompt", (Turn("human", asked),), tuple(images))
    elif isinstance(asked, Sample):
        sample = asked
    else:
        sample = read_messages(asked, images)
    sample.check()
    if sample.turns[-1].role != "human":
        raise DataError("the last message is the assistant's; end with what the user asks")
    return sample
