"""What a plugin implements: one abstract class for each kind of component without weights.

Those with weights lie in `networks`, steps in `run`. Nothing here imports torch, so that data can
be looked at, and files scored, without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from llavakit.contracts.component import Component
from llavakit.contracts.data import (
    RESPONSE_KINDS,
    ImageContext,
    Inspected,
    Message,
    Question,
    Reply,
    ResponseKind,
    Sample,
    Score,
    Turn,
)
from llavakit.contracts.errors import DataError
from llavakit.contracts.model import LlavaModel, Model
from llavakit.contracts.run import Run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class ChatModel(Component):
    """Answers a chat, here or over a network.

    `complete` is enough. One that answers many requests at a time overrides `reply`; one that costs
    money says how much in `price`, before it is spent.
    """

    hook = "llava_chat_models"
    reply_limit: int | None = None  #: Longest reply in tokens, where there is a limit.

    @property
    def identity(self) -> str:
        """What of its options decides its replies: replies to another identity are other ones."""
        return self.name

    @abstractmethod
    def complete(self, messages: Sequence[Message]) -> str:
        """Return the text of the assistant's reply."""

    def halt(self) -> None:
        """Send nothing more: requests that wait for their turn or another try fail at once."""

    async def reply(self, messages: Sequence[Message], draw: int = 0) -> Reply:
        """Return a reply and what is known of it; `draw` numbers the replies to one question.

        Raises ChatError where no request would be answered, ReplyError where this one is not.
        """
        from asyncio import to_thread  # it may wait for seconds, and others must go on

        return Reply(await to_thread(self.complete, messages))

    def count(self, messages: Sequence[Message]) -> int:
        """Return how many tokens a request has; here a guess of four bytes a token."""
        # 4: around each message
        return sum(4 + len(message.content.encode(errors="replace")) // 4 for message in messages)

    def price(self, input_tokens: int, output_tokens: int) -> float | None:
        """Return what so many tokens cost in USD, or None where that is not known."""
        return None

    async def close(self) -> None:
        """Close its connections; called in the event loop that `reply` was called in."""


class Generator(Component):
    """Writes instruction-following conversations about images it is told of in words."""

    hook = "llava_generators"
    kinds: ClassVar[Sequence[ResponseKind]] = RESPONSE_KINDS  #: The sorts of response it writes.

    @abstractmethod
    def generate(self, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        """Return the turns of one conversation; the image's placeholder is in the first.

        Called from several threads at once where it has a chat model: what that was asked is kept,
        and not asked again in another run. A DataError has it called again, for another reply.
        """


class Dataset(Component):
    """A sequence of samples. Built as `Dataset(options)`; images are opened by the reader."""

    hook = "llava_datasets"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]:
        # Python's own way takes an IndexError within a reader for the end of the data
        return (self[index] for index in range(len(self)))

    @classmethod
    def expect(cls, options: Any) -> tuple[int, int] | None:
        """Return (samples, mean text tokens a sample) for a plan, or None where unknown."""
        return None

    @classmethod
    def inspect(cls, options: Any) -> Iterator[Inspected] | None:
        """Yield every row and what is wrong with it, for `llava-run check-data`.

        Where None (the default) the data set is built instead, and its samples are looked at.
        """
        return None

    def notes(self) -> Sequence[str]:
        """Return what a reader of the run should know: samples that were left out, say."""
        return ()


class Segment(NamedTuple):
    """A stretch of a rendered prompt. `<image>` within it stands for an image."""

    text: str
    supervised: bool = False  #: Whether the loss covers it.
    markup: bool = False  #: Whether it is the template's: special tokens in it count as such.


class PromptTemplate(Component):
    """Renders turns as the text a language model was, or will be, tuned on."""

    hook = "llava_prompt_templates"
    adds_bos: ClassVar[bool] = True  #: Whether BOS goes in front; False: the template writes it.

    @abstractmethod
    def segments(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Segment]:
        """Return the text in order; after a human turn at the end it is open for the answer."""

    def with_system(self, system: str) -> PromptTemplate:
        """Return the template with a conversation's system text, or without one where it is empty.

        It is a user's text: no markup. DataError (the default) from one without a place for it.
        """
        raise DataError(f"the prompt template `{self.name}` has no place for a system text")

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Return texts besides the end token that end an answer."""
        return ()


class Benchmark(Component):
    """Questions with images, and what makes an answer a good one."""

    hook = "llava_benchmarks"
    scorers: ClassVar[Sequence[type[Component]]] = ()  #: For `llava-run score`, without a model.

    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """Return what is asked, in the same order each time; no two of one id."""

    @abstractmethod
    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        """Return what the answers are worth, one answer a question."""

    def score_in(self, run: Run, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        """Score as `score` does, within a step: for those that take long, such as a judge's.

        What is paid for is kept in `run.directory`, which belongs to these answers alone, so that
        nothing is asked twice when the step is resumed.
        """
        return self.score(questions, answers)


class Exporter(Component):
    """Writes a model in another layout, and reads that layout back where it can."""

    hook = "llava_exporters"

    @abstractmethod
    def export(self, model: LlavaModel, folder: Path) -> Mapping[str, Any]:
        """Write `model` to `folder`, prove its parity, and return the proof's figures."""

    def check(self, model: LlavaModel) -> None:
        """Raise ModelError for a model that the layout has no place for, by its shapes alone.

        Plans ask this of a model on the meta device, perhaps without a tokenizer, before a run
        trains for hours what it cannot write.
        """

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Say by its content whether `folder` is in this layout."""
        return False

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None) -> Model:
        """Return the model in `folder`.

        A layout that leaves something out may take it as a further keyword, None by default:
        `template`, the name of the prompt template; `base` and `vision`, the folders of the
        language model and of the vision encoder that a checkpoint builds on.
        """
        raise NotImplementedError  # a layout may only be written

    @classmethod
    def fetch(cls, name: str) -> Path | None:
        """Return the folder of the model that a public collection has under `name`.

        It is fetched where it must be. None where `name` is not of the form that models have
        there. Raises ModelError, with the reason, where it cannot be had.
        """
        return None

    @classmethod
    def names(cls, name: str) -> bool:
        """Say whether `fetch` may find `name`: of the form, it may be there or not."""
        return cls.fetch.__func__ is not Exporter.fetch.__func__  # type: ignore[attr-defined]

    @classmethod
    def sketch(cls, name: str) -> LlavaModel | None:
        """Return the model that `fetch` would find, on the meta device, for plans.

        Nothing is fetched; None where that is not known without it.
        """
        return None


class Tracker(Component):
    """Observes a run. Named in the recipe: installing a package never changes a run."""

    hook = "llava_trackers"

    def begin(self, directory: Path) -> None:
        """Take the run's folder: recipe.toml, plan.json and environment.json are in it already.

        Called once, before the first event. A step's folder `step` holds artifact.json, its record,
        when the step's event `done`, `kept` or `taken` comes.
        """

    @abstractmethod
    def record(self, event: Mapping[str, Any]) -> None:
        """Take one event: `time`, `step`, `event`, and what belongs to it."""

    def close(self) -> None:
        """Flush what is held back; called once, when the run ends for whatever reason."""
