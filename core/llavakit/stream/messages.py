"""One reader of messages, for every way of asking and for data sets. Without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from llavakit.contracts.data import IMAGE, ImageSource, Role, Sample, Turn, Video
from llavakit.contracts.errors import DataError
from llavakit.contracts.model import Asked

_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_PARTS = ("image", "image_url", "video", "video_url")
_NAMED = (*_PARTS, "url", "path")
VIDEO = "<video>"  #: Where a video goes in a question; a sample has `<image>` there, too.
_HTML = re.compile(r"(?si)(?!\s*<video>|.*<video>\s*$).*(html|\btag|\belement|</video|<source)")


class Visuals:
    """Images and videos that wait for their placeholders; errors begin with `where`."""

    def __init__(self, given: Sequence[ImageSource], where: str) -> None:
        self._where, self.shown = where, list[Any]()  #: In order; None: a mark too many.
        self.videos = [one for one in given if isinstance(one, Video)]  #: Those left.
        self.images = [one for one in given if not isinstance(one, Video)]

    def place(self, text: str) -> str:
        """Return a question with `<image>` for both. DataError for a `<video>` too many."""
        return re.sub(f"{IMAGE}|{VIDEO}", self._show, text)

    def _show(self, mark: re.Match[str]) -> str:
        # without images left, an `<image>` shows a video: so LLaVA-Video's data has it
        left = self.videos if mark[0] == VIDEO or not self.images else self.images
        if mark[0] == VIDEO and not left:
            if _HTML.match(mark.string):
                return VIDEO
            raise DataError(f"{self._where}: a `{VIDEO}` has no video to show: give or remove it")
        self.shown.append(left.pop(0) if left else None)
        return IMAGE

    @property
    def all(self) -> tuple[ImageSource, ...]:
        """What the placeholders show, and what has none."""
        return (*(one for one in self.shown if one is not None), *self.images, *self.videos)


def read_messages(
    messages: object,
    images: Sequence[ImageSource] = (),
    *,
    where: str = "the messages",
    source: Callable[[Any], ImageSource] = lambda named: named,
    video: Callable[[Any], Video] | None = None,
    id: str = "prompt",
    kind: str = "",
) -> Sample:
    """Return the sample that messages are: `[{"role": ..., "content": ...}]`.

    Roles are system (first, at most once), then user and assistant in turn. Content is a text or a
    list of parts, a line each: `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`
    as transformers has it (`url`, `path` and `base64`, too), or OpenAI's `image_url`; `video` too.
    A part that names nothing, and marks in a user's text, stand for the next of `images`. `source`
    (of videos, `video`) gets what a part names, and decides what may be read. Raises DataError.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where} are no list of `role` and `content`: got {messages!r:.80}")
    visuals, moving = Visuals(images, where), video or (lambda named: Video(source(named)))
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
                lines.append(visuals.place(part["text"]) if role == "human" else part["text"])
            elif sort in _PARTS and role == "human":
                named = next((part[key] for key in _NAMED if part.get(key) is not None), None)
                named = named.get("url", "") if isinstance(named, dict) else named  # OpenAI's
                if named is None and part.get("base64") is not None:
                    named = f"data:{sort};base64,{part['base64']}"
                moves = sort.startswith("video")
                if named is None:
                    visuals.place(VIDEO if moves else IMAGE)
                else:
                    visuals.shown.append((moving if moves else source)(named))
                lines.append(IMAGE)
            else:
                raise DataError(
                    f"{where}: message {number} has a part that is no text, and no image or video "
                    f"of the user's: {part!r:.80}; fix or remove it"
                )
        if role == "system":
            system = "\n".join(lines)
        else:
            turns.append(Turn(cast("Role", role), "\n".join(lines)))
    if any(one is None for one in visuals.shown):
        raise DataError(f"{where} show more images than are given with them; give those, too")
    sample = Sample(id, tuple(turns), visuals.all, kind, system)
    sample.check(where.removeprefix(f"sample `{id:.200}` of "))
    return sample


def read_asked(asked: Asked, images: Sequence[ImageSource] = ()) -> Sample:
    """Return what is asked as a sample that ends with a question.

    A prompt is one question; one without placeholders gets one for each image in front.
    """
    if isinstance(asked, Sample):
        sample = asked
    elif isinstance(asked, str):
        if VIDEO in asked:
            visuals = Visuals(images, "the prompt")
            asked, images = visuals.place(asked), visuals.all
        elif IMAGE not in asked:
            asked = f"{IMAGE}\n" * len(images) + asked  # where the original puts them
        sample = Sample("prompt", (Turn("human", asked),), tuple(images))
    else:
        sample = read_messages(asked, images)
    sample.check()
    if sample.turns[-1].role != "human":
        raise DataError("the last message is the assistant's; end with what the user asks")
    return sample
