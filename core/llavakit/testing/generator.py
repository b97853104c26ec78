"""The contract of a generator."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llavakit.contracts.data import (
    IMAGE,
    Box,
    ImageContext,
    ResponseKind,
    Sample,
    Turn,
)
from llavakit.contracts.interfaces import Generator
from llavakit.testing.contract import Contract, hold, holding
from llavakit.testing.samples import make_picture

KIND = r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}"  #: How a sort of response may be called.


class GeneratorContract(Contract[Generator]):
    """Checks a `Generator`. Build one that works without a network."""

    kind = Generator
    kinds: Sequence[ResponseKind] | None = None  #: Those to try, by default the component's own.
    repeatable: bool = True  #: Whether the same context gives the same text.

    def tried(self) -> Sequence[ResponseKind]:
        """Return the sorts of response to ask for: names that files can have."""
        kinds = type(self.build()).kinds if self.kinds is None else self.kinds
        for kind in kinds:
            hold(
                re.fullmatch(KIND, kind),
                "a sort of response is named by letters, digits, `-` and `_`: it names a file",
                repr(kind), "give it another name in `kinds`",
            )  # fmt: skip
        hold(kinds, "at least one sort of response", "none", "name them in `kinds`")
        return kinds

    def context(self) -> ImageContext:
        """Return what it is told of an image."""
        return ImageContext(
            id="scene-1",
            image="scene-1.png",
            captions=("a red bus and a blue car on a grey street", "a bus left of a car"),
            boxes=(Box("bus", (0.1, 0.2, 0.4, 0.6)), Box("car", (0.6, 0.3, 0.9, 0.6))),
        )

    def other_context(self) -> ImageContext:
        """Return what it is told of another image, of which other things are true."""
        return ImageContext(
            id="scene-2",
            image="scene-2.png",
            captions=("two white horses in a green field", "horses beside a tree"),
            boxes=(
                Box("horse", (0.2, 0.5, 0.4, 0.9)),
                Box("horse", (0.5, 0.5, 0.7, 0.9)),
                Box("tree", (0.7, 0.1, 1.0, 0.8)),
            ),
        )

    def told(self, generator: Generator) -> str | None:
        """Return what the newest `generate` told its chat model; None where it has none.

        Then the text itself must depend on the context.
        """
        return None

    def test_it_writes_whole_conversations_about_one_image(self) -> None:
        for kind in self.tried():
            turns = tuple(self.build().generate(self.context(), kind))
            with holding(
                f"{kind}: turns alternate from a human one, with one image", "fix its turns"
            ):
                Sample(kind, turns, (make_picture(),)).check()  # roles and placeholder
            hold(
                IMAGE in turns[0].text,
                f"{kind}: the image belongs into the first question", turns[0],
                f"put `{IMAGE}` there",
            )  # fmt: skip
            hold(
                turns[-1].role == "gpt",
                f"{kind}: every question has an answer", turns[-1], "leave the open one out",
            )  # fmt: skip
            empty = [turn for turn in turns if not turn.text.strip()]
            hold(not empty, f"{kind}: no turn is empty", empty, "raise DataError instead")

    def test_a_description_is_one_answer(self) -> None:
        for kind in self.tried():
            if kind not in ("detail", "reasoning"):  # of others it is not known
                continue
            turns = self.build().generate(self.context(), kind)
            hold(
                len(turns) == 2,
                f"{kind}: a question and an answer", f"{len(turns)} turns", "return two turns",
            )  # fmt: skip

    def test_the_same_context_gives_the_same_text(self) -> None:
        if self.repeatable:
            for kind in self.tried():
                first, second = (self.build().generate(self.context(), kind) for _ in range(2))
                hold(
                    list(first) == list(second),
                    f"{kind}: the same context gives the same text",
                    f"{list(first)}, then {list(second)}",
                    "seed what is drawn by the context's id, or say `repeatable = False`",
                )

    def test_another_context_gives_another_text(self) -> None:
        for kind in self.tried():
            seen: list[str | Sequence[Turn]] = []
            for context in (self.context(), self.other_context()):
                generator = self.build()
                turns = generator.generate(context, kind)
                told = self.told(generator)
                seen.append(list(turns) if told is None else told)
            hold(
                seen[0] != seen[1],
                f"{kind}: what is written, or asked of a chat model, is about the context",
                f"the same for two images: {seen[0]!s:.300}",
                "use the captions, boxes and facts of the context; where a stand-in always replies "
                "the same, return from `told` what it was asked",
            )
