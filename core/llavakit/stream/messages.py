"""One reader of messages, for every way of asking and for data sets. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from llavakit.contracts.data import IMAGE, ImageSource, Role, Sample, Turn
from llavakit.contracts.errors import DataError
from llavakit.contracts.model import Asked

_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_IMAGES = {"image": "", "url": "", "path": "", "base64": "data:image;base64,", "image_url": ""}


def read_messages(
    messages: object,
    images: Sequence[ImageSource] = (),
    *,
    where: str = "the messages",
    source: Callable[[Any], ImageSource] = lambda named: named,
    id: str = "prompt",
    kind: str = "",
) -> Sample:
    """Return the sample that messages are: `[{"role": ..., "content": ...}]`.

    Roles are system (first, at most once), then user and assistant in turn. Content is a text or a
    list of parts, a line each: `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`
    as transformers has it (`url`, `path` and `base64`, too), or OpenAI's `image_url`. A part that
    names nothing, and `<image>` in a user's text, stand for the next of `images`. `source` is
    called with what a part names, and decides what may be read. Raises DataError.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where} are no list of `role` and `content`: got {messages!r:.80}")
    given, shown = iter(images), list[Any]()
    system, turns = None, list[Turn]()
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {"role": message}
        role = _ROLES.get(str(fields.get("role")))
        expected = "user" if len(turns) % 2 == 0 else "assistant"
        if role != _ROLES[expected] and (role != "system" or turns or system is not None):
            raise DataError(
                f"{where}: message {number} is from {fields.get('role')!r:.40}, expected "
                f"`{expected}`: a system text stands first, then user and assistant take turns"
            )
        content, lines = fields.get("content"), list[str]()
        parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts if isinstance(parts, list | tuple) else [parts]:
            sort = str(part.get("type")) if isinstance(part, dict) else None
            if sort == "text" and isinstance(part.get("text"), str):
                lines.append(part["text"])
                count = part["text"].count(IMAGE) if role == "human" else 0
                shown += [next(given, None) for _ in range(count)]
            elif sort in ("image", "image_url") and role == "human":
                lines.append(IMAGE)
                named = _named(part, source)
                shown.append(next(given, None) if named is None else named)
            else:
                raise DataError(
                    f"{where}: message {number} has a part that is no text, and no image of the "
                    f"user's: {part!r:.80}; fix or remove it"
                )
        if role == "system":
            system = "\n".join(lines)
        else:
            turns.append(Turn(cast("Role", role), "\n".join(lines)))
    if any(image is None for image in shown):
        raise DataError(f"{where} show more images than are given with them; give those, too")
    # an image that is left has no placeholder: `check` says so
    sample = Sample(id, tuple(turns), (*shown, *given), kind, system)
    sample.check(where)
    return sample


def _named(part: dict[str, Any], source: Callable[[Any], ImageSource]) -> ImageSource | None:
    for key, prefix in _IMAGES.items():
        named = part.get(key)
        named = named.get("url", "") if isinstance(named, dict) else named  # OpenAI's
        if named is not None:
            return source(f"{prefix}{named}" if prefix else named)
    return None


def read_asked(asked: Asked, images: Sequence[ImageSource] = ()) -> Sample:
    """Return what is asked as a sample that ends with a question.

    A prompt is one question; one without placeholders gets one for each image in front.
    """
    if isinstance(asked, Sample):
        sample = asked
    elif isinstance(asked, str):
        if IMAGE not in asked:
            asked = f"{IMAGE}\n" * len(images) + asked  # where the original puts them
        sample = Sample("prompt", (Turn("human", asked),), tuple(images))
    else:
        sample = read_messages(asked, images)
    sample.check()
    if sample.turns[-1].role != "human":
        raise DataError("the last message is the assistant's; end with what the user asks")
    return sample
