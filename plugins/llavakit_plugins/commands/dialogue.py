"""A dialogue on a terminal: what was said, the commands that change it, and its file."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from llavakit import (
    VIDEO,
    ImageSource,
    Sample,
    Segment,
    Turn,
    Video,
    Visuals,
    did_you_mean,
    open_image,
    printable,
    printable_json,
    shown,
    tokenise,
    write_text,
)
from llavakit.contracts.data import IMAGE
from llavakit.contracts.errors import LlavaError
from llavakit_plugins.media import clip
from llavakit_plugins.media.addresses import local_path

HELP = """\
/image FILE    show an image with the next question; `<image>` in it says where, else in front
/video FILE    show a video, or a folder of frames; `<video>` says where
/system TEXT   set the system text; without TEXT, the template's own again
/reset         begin again, with the images and the system text that chat was started with
/save FILE     write the dialogue as a row of training data (JSON)
/help          this list
Ctrl-C stops an answer, Ctrl-D ends the chat. A space in front lets a question begin with `/`."""


class Dialogue:
    """What was said to a model so far. Images are named as they were given."""

    def __init__(
        self,
        model: Any,
        options: Mapping[str, Any],
        images: Sequence[str | Video],
        system: str | None,
        fetch: Callable[[str], ImageSource],
    ) -> None:
        """`fetch` gives what the model reads of an image that is named; videos are as they are."""
        self._model, self._options, self._fetch = model, options, fetch
        self._start = (images, system)
        self._images: list[tuple[str, ImageSource]] = []  # of the dialogue, in order
        self._new: list[tuple[str, ImageSource]] = []  # for the next question
        self._turns: list[Turn] = []
        self._system = system
        self.reset()

    def reset(self) -> None:
        images, self._system = self._start
        self._images, self._turns = [], []
        self._new = [
            (str(one.source), one)
            if isinstance(one, Video)
            else (local_path(one), self._fetch(one))
            for one in images
        ]

    def ask(self, question: str) -> Generator[str]:
        """Yield the answer in pieces. A question that cannot be asked changes nothing.

        An answer that is stopped counts as far as it came.
        """
        if re.search("[\udc80-\udcff]", question):  # how Python reads bytes that are no UTF-8
            raise LlavaError(
                "the question is no text in UTF-8; check the encoding of the terminal, or of the "
                "file it comes from"
            )
        # new images go in front, as in LLaVA's training data;
        # a mark in the question says another place
        new = self._new
        if VIDEO in question:
            visuals = Visuals([image for _, image in new], "the question")
            question = visuals.place(question)
            new = [next(one for one in new if one[1] is image) for image in visuals.all]
        elif IMAGE not in question:
            question = f"{IMAGE}\n" * len(new) + question
        # new lists, so that a question that fails leaves the dialogue as it was
        turns = [*self._turns, Turn("human", question)]
        images = [*self._images, *new]
        asked = Sample("prompt", tuple(turns), tuple(i for _, i in images), system=self._system)
        pieces = self._model.stream(asked, **self._options)
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        except (KeyboardInterrupt, GeneratorExit):  # stopped, here or where the piece is shown
            if answer:
                self._add(turns, images, answer)
            raise
        self._add(turns, images, answer)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(tokenise([Segment(text)], self._model.tokenizer, begin=False)[0])

    def run(self, line: str) -> str:
        """Do what a line that begins with `/` says; return what to tell."""
        name, _, text = line[1:].partition(" ")
        text = text.strip()
        commands: dict[str, Callable[[str], str]] = {
            "image": self._show,
            "video": self._show_video,
            "system": self._set_system,
            "reset": self._begin_again,
            "save": self._save,
            "help": lambda _: HELP,
        }
        if name not in commands:
            hint = did_you_mean(name, commands, "`/help` lists all", "/{}".format)
            raise LlavaError(f"there is no command `/{name:.40}`; {hint}")
        return commands[name](text)

    def _add(self, turns: list[Turn], images: list[tuple[str, ImageSource]], answer: str) -> None:
        # a model may write the placeholder, and an answer has no image
        self._turns = [*turns, Turn("gpt", answer.replace(IMAGE, "< image>"))]
        self._images, self._new = images, []

    def _show_video(self, text: str) -> str:
        video = Video(_file(text, "/video needs a file: /video clip.mp4"))
        found = clip(video, "the next question")
        self._new.append((str(video.source), video))
        return (
            f"{found.width} x {found.height} pixels, {found.frames} frames, for the next question"
        )

    def _show(self, text: str) -> str:
        name = _file(text, "/image needs a file: /image photo.jpg")
        image = self._fetch(name)
        width, height = open_image(image, "the next question").size
        self._new.append((local_path(name), image))
        return f"{width} x {height} pixels, for the next question"

    def _set_system(self, text: str) -> str:
        self._system = text or None
        return "system text set" if text else "the template's own system text"

    def _begin_again(self, text: str) -> str:
        self.reset()
        return "the dialogue begins again"

    def _save(self, text: str) -> str:
        path = Path(os.path.expanduser(text))
        if not text:
            raise LlavaError("/save needs a file: /save dialogue.json")
        # `lexists` also finds a link that leads nowhere, which writing would replace
        if os.path.lexists(path):
            raise LlavaError(f"{path} is there already; name another file")
        row = {"id": path.stem, "messages": list(self._messages())}
        write_text(path, printable_json(json.dumps([row], ensure_ascii=False, indent=1)) + "\n")
        return f"written to {path}"

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self._system is not None:
            yield {"role": "system", "content": self._system}
        images = iter(self._images)
        for turn in self._turns:
            if turn.role == "gpt" or IMAGE not in turn.text:
                role = {"human": "user", "gpt": "assistant"}[turn.role]
                yield {"role": role, "content": turn.text}
                continue
            parts: list[dict[str, str]] = []
            for number, text in enumerate(turn.text.split(IMAGE)):
                if number:
                    name, image = next(images)
                    sort = "video" if isinstance(image, Video) else "image"
                    parts.append({"type": sort, sort: name})
                if text.strip("\n"):
                    parts.append({"type": "text", "text": text.strip("\n")})
            yield {"role": "user", "content": parts}


def _file(text: str, missing: str) -> str:
    """Return the path that a command names."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":  # as terminals paste them
        text = text[1:-1]
    if not text:
        raise LlavaError(missing)
    return os.path.expanduser(text)


def talk(dialogue: Dialogue, *, verbose: bool = False) -> None:
    """Ask for questions and print answers, until the input ends."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):  # not on every system
            import readline  # noqa: F401  # `input` has line editing and history then
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                print(shown(dialogue.run(line.rstrip())), file=sys.stderr)
            else:
                answer(dialogue, line.strip(), verbose=verbose)
        except LlavaError as error:  # of this line; the next may do
            print(f"error: {shown(str(error))}", file=sys.stderr)
        except KeyboardInterrupt:  # of an answer; at the prompt it ends the chat
            print(" [stopped]")


def answer(dialogue: Dialogue, question: str, *, verbose: bool = False) -> None:
    """Print an answer as it comes, with its control characters spelt out."""
    begun = time.monotonic()
    first, text = 0.0, ""
    with closing(dialogue.ask(question)) as pieces:
        for piece in pieces:
            first = first or time.monotonic() - begun
            text += piece
            print(printable(piece), end="", flush=True)
    print(flush=True)
    if verbose:
        # the first token is left out of the rate: before it the prompt is read
        seconds = time.monotonic() - begun - first
        count = dialogue.count(text)
        rate = f"{(count - 1) / seconds:.1f} tokens/s" if count > 1 and seconds else "no rate"
        print(f"[{count} tokens, {rate}, first after {first:.2f} s]", file=sys.stderr, flush=True)
