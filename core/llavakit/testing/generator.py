"""The contract of a generator."""

from __future__ import annotations

from llavakit.contracts.data import IMAGE, RESPONSE_KINDS, Box, ImageContext, ResponseKind, Sample
from llavakit.contracts.interfaces import Generator
from llavakit.testing.contract import Contract
from llavakit.testing.samples import make_picture


class GeneratorContract(Contract[Generator]):
    """Checks a `Generator`. Build one that works without a network."""

    kind = Generator
    kinds: tuple[ResponseKind, ...] = RESPONSE_KINDS  #: The sorts of response it writes.
    repeatable: bool = True  #: Whether the same context gives the same text.

    def context(self) -> ImageContext:
        """Return what it is told of an image."""
        return ImageContext(
            id="scene-1",
            image="scene-1.png",
            captions=("a red bus and a blue car on a grey street", "a bus left of a car"),
            boxes=(Box("bus", (0.1, 0.2, 0.4, 0.6)), Box("car", (0.6, 0.3, 0.9, 0.6))),
        )

    def test_it_writes_whole_conversations_about_one_image(self) -> None:
        for kind in self.kinds:
            turns = tuple(self.build().generate(self.context(), kind))
            Sample(kind, turns, (make_picture(),)).check()  # roles and placeholder
            assert IMAGE in turns[0].text, f"{kind}: the image belongs into the first question"
            assert turns[-1].role == "gpt", f"{kind}: the last question has no answer"
            assert all(turn.text.strip() for turn in turns), f"{kind}: a turn is empty"

    def test_a_description_is_one_answer(self) -> None:
        for kind in self.kinds:
            if kind == "conversation":
                continue
            turns = self.build().generate(self.context(), kind)
            assert len(turns) == 2, f"{kind}: expected a question and an answer"

    def test_the_same_context_gives_the_same_text(self) -> None:
        if self.repeatable:
            for kind in self.kinds:
                first, second = (self.build().generate(self.context(), kind) for _ in range(2))
                assert list(first) == list(second), f"{kind}: another text; set `repeatable`"
