"""The paper's generator (arXiv 2304.08485, section 3): a chat model reads captions and boxes, and
with `images` sees the image, which the paper's could not."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from typing import Literal

from pydantic import Field

from llavakit import (
    Build,
    ChatModel,
    DataError,
    ImageContext,
    InputPath,
    Message,
    Options,
    Reply,
    Turn,
    Use,
)
from llavakit.contracts.data import IMAGE, RESPONSE_KINDS, ResponseKind
from llavakit_plugins.generation.contexts import as_text
from llavakit_plugins.generation.requests.prompted import PromptedGenerator, Verdict
from llavakit_plugins.generation.rows import find_image
from llavakit_plugins.generators.parsing import Pair, read_pairs, read_prose
from llavakit_plugins.generators.prompts import Prompt, load_prompt


class PromptedOptions(Options):
    chat: Use[ChatModel]
    prompts: InputPath | None = None
    """A folder with prompts of its own for one or more kinds."""
    boxes: tuple[Literal["conversation", "detail", "reasoning"], ...] = ("detail", "reasoning")
    """Kinds whose context includes boxes; the authors made conversations from captions alone."""
    images: bool = False
    """Whether the chat model is shown the image, too; the step's `images` is their folder."""
    seed: int = Field(default=0, ge=0)
    """Draws questions, and whether the image stands before or after them."""


class Prompted(PromptedGenerator):
    """Asks a chat model with a system message and examples for each kind of response."""

    name = "prompted"
    Options = PromptedOptions

    def __init__(self, options: PromptedOptions, *, build: Build) -> None:
        self.options = options
        self.chat = build(options.chat)

    @cached_property
    def prompts(self) -> dict[ResponseKind, Prompt]:
        """What stands in front of the contexts."""
        return {kind: load_prompt(kind, self.options.prompts) for kind in RESPONSE_KINDS}

    def messages(self, context: ImageContext, kind: ResponseKind) -> tuple[Message, ...]:
        told = as_text(context, boxes=kind in self.options.boxes)
        if not self.options.images:
            return self.prompts[kind].messages(told)
        *before, last = self.prompts[kind].seeing().messages(told)
        image = find_image(self.images, context) if context.image else None
        if image is None and context.image:
            raise DataError(
                f"there is no image {context.image} of context `{context.id}` below "
                f"{self.images or 'the folder `images`, which the step does not name'}"
            )
        return (*before, last if image is None else replace(last, images=(image,)))

    @property
    def shows_images(self) -> bool:
        return self.options.images

    def expected_reply(self, kind: ResponseKind) -> str:
        replies = sorted((reply for _, reply in self.prompts[kind].examples), key=len)
        return replies[len(replies) // 2] if replies else ""

    def read(self, context: ImageContext, kind: ResponseKind, reply: Reply) -> Verdict:
        if kind == "detail":
            answer, read = read_prose(reply.text, reply.finish, context)
            question = self._draw(context, kind, self.prompts[kind].questions)
            pairs = [(question, answer)]
        else:
            read = read_pairs(reply.text, reply.finish, context)
            pairs = read.pairs
            if kind == "reasoning" and len(pairs) > 1:
                read.repair("more than one question: the first is kept")
                pairs = pairs[:1]
        if read.reason:
            return Verdict("rejected", notes=(read.reason,))
        turns = self._turns(context, kind, pairs)
        return Verdict("repaired" if read.repairs else "accepted", turns, tuple(read.repairs))

    def _turns(
        self, context: ImageContext, kind: ResponseKind, pairs: list[Pair]
    ) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        for number, (question, answer) in enumerate(pairs):
            if number == 0:  # the paper's order: either first, by chance
                orders = (f"{IMAGE}\n{question}", f"{question}\n{IMAGE}")
                question = self._draw(context, f"{kind} order", orders)
            turns += [Turn("human", question), Turn("gpt", answer)]
        return tuple(turns)

    def _draw(self, context: ImageContext, what: str, items: tuple[str, ...]) -> str:
        key = f"{self.options.seed}/{context.id}/{what}".encode()
        return items[int.from_bytes(sha256(key).digest()[:8], "big") % len(items)]
