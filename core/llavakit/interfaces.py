"""What a plugin implements: one abstract class for each kind of component.

Tensor names carry their shape (`pixels_BCHW`):
    B images, C colour, H height, W width, P visual tokens of an image, D vision width,
    T rows of the packed stream, E language width, N visual rows, M selected rows.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.components import Component, KindT_co, Use
from llavakit.samples import (
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavakit.model import LlavaModel
    from llavakit.packing import Packing, Rows, Stream
    from llavakit.planning import Planner, StepPlan
    from llavakit.reporting import Section
    from llavakit.scoring import FileScorer
    from llavakit.team import Team


class Network(nn.Module, Component):
    """A component with weights. Its options alone determine the shape of every weight.

    Construction never reads weights: it may run on the meta device, where a plan counts
    parameters. Override `create`, `save` and `load` together where weights have a layout of
    their own, such as a Hugging Face folder.
    """

    weights_file: ClassVar[str] = "model.safetensors"

    @classmethod
    def create(cls, options: Any, **context: Any) -> Self:
        """Return what a recipe asks for: with pretrained weights where the options name some."""
        return cls(options, **context)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that learn, with their names, where a recipe trains this part."""
        yield from self.named_parameters()

    def frozen_bytes(self, each: int) -> float:
        """Return the size of the weights while they are frozen, `each` bytes a parameter."""
        return float(each * sum(parameter.numel() for parameter in self.parameters()))

    def save(self, folder: Path) -> None:
        """Write the weights to `folder`, which exists, as safetensors."""
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / self.weights_file)

    @classmethod
    def load(cls, options: Any, folder: Path, **context: Any) -> Self:
        """Return the component that `save` wrote to `folder`."""
        from safetensors.torch import load_file

        network = cls(options, **context)
        # assigned, not copied: weights keep the precision they were saved in
        network.load_state_dict(load_file(folder / cls.weights_file), assign=True)
        return network


class VisionEncoder(Network):
    """Turns images into patch features. Built as `VisionEncoder(options)`.

    `forward` may return tokens that stand for no patch (CLIP's class token) in front of the
    patches: it says how many in `prefix_tokens`, and the core strips them.
    """

    hook = "llava_vision_encoders"

    width: int
    """Size of one patch feature (D)."""
    image_size: int
    """Edge in pixels of the square that `prepare` returns."""
    prefix_tokens: int = 0
    decode_edge: int | None = None
    """Shorter side in pixels that does for `prepare`: larger JPEGs may be decoded smaller."""

    @abstractmethod
    def tokens(self, image_size: int) -> int:
        """Return the number of visual tokens (P, prefix excluded) of a square image."""

    @abstractmethod
    def prepare(self, image: Image) -> Tensor:
        """Return normalised pixels `[3, H, W]`, float32, of an RGB image."""

    @abstractmethod
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features `[B, prefix_tokens + P, D]`."""


class Connector(Network):
    """Turns patch features into language-model embeddings.

    Built as `Connector(options, vision_width=D, language_width=E)`.
    """

    hook = "llava_connectors"
    weights_file = "connector.safetensors"  # lies in the model folder itself

    def tokens(self, patches: int) -> int:
        """Return how many visual tokens `patches` features become (P')."""
        return patches

    @abstractmethod
    def forward(self, features_BPD: Tensor) -> Tensor:
        """Return embeddings `[B, P', E]`."""

    def project_into(self, features_BPD: Tensor, stream: Stream) -> Tensor:
        """Return the embeddings `[T, E]` of the packed stream: text rows and visual rows."""
        embeds_TE = stream.embed(stream.token_ids_T)
        visual_NE = self(features_BPD).flatten(0, 1)
        if stream.visual_kept_N is not None:
            visual_NE = visual_NE.index_select(0, stream.visual_kept_N)
        return embeds_TE.index_copy(0, stream.visual_rows_N, visual_NE.to(embeds_TE.dtype))


class LanguageModel(Network):
    """A causal language model over a packed stream. Built as `LanguageModel(options)`."""

    hook = "llava_language_models"
    default_template: ClassVar[str] = "vicuna_v1"
    """The prompt template where a recipe names none."""

    options: Any
    """What it was built with, where `merged` gives another model than itself."""
    width: int
    """Size of one token embedding (E)."""
    max_length: int
    """Longest sequence in tokens."""
    recompute: bool = False
    """Whether the backward pass computes activations again instead of keeping them."""
    tokenizer: PreTrainedTokenizerBase
    """A fast tokenizer; a new model has none until one is set."""

    @abstractmethod
    def embed(self, ids_T: Tensor) -> Tensor:
        """Return token embeddings `[T, E]`."""

    @property
    def embedding_VE(self) -> Tensor | None:
        """The table behind `embed` where that is a plain look-up; lets kernels fuse it."""
        return None

    @abstractmethod
    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Rows | None = None) -> Tensor:
        """Return final hidden states `[M, E]` (normalised), of all rows where `rows` is None."""

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The layer from hidden states to logits, `[V, E]`."""

    def logits(self, hidden_ME: Tensor) -> Tensor:
        """Return logits `[M, V]`: the head's output, and what a model does to it behind that."""
        logits_MV: Tensor = self.head(hidden_ME)
        return logits_MV

    def loss(self, hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
        """Return the summed cross-entropy, float32 `[]`, of the targets after these rows."""
        return F.cross_entropy(self.logits(hidden_ME).float(), targets_M, reduction="sum")

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer, by default the tokenizer's end token."""
        end = self.tokenizer.eos_token_id
        return frozenset(() if end is None else (end,))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, each called as a module in `hidden`: training on several devices divides
        the weights of one after another. Empty: all at once."""
        return ()

    def merged(self) -> Self:
        """Return the model with adapters added into its weights, for exporters; as a rule itself.

        An exporter writes what this returns: it has every weight under its usual name, and in
        `options` what makes the same architecture again.
        """
        return self

    @abstractmethod
    def cache_shape(self) -> tuple[int, int, int]:
        """Return (layers, key-value heads, head dimension) of the key-value cache."""


class ChatModel(Component):
    """Answers a chat, here or over a network.

    `complete` is enough. One that answers many requests at a time overrides `reply`; one that costs
    money says how much in `price`, before it is spent.
    """

    hook = "llava_chat_models"
    reply_limit: int | None = None
    """Longest reply in tokens, where there is a limit."""

    @property
    def identity(self) -> str:
        """What of its options decides its replies: replies to another identity are other ones."""
        return self.name

    @abstractmethod
    def complete(self, messages: Sequence[Message]) -> str:
        """Return the text of the assistant's reply."""

    async def reply(self, messages: Sequence[Message], draw: int = 0) -> Reply:
        """Return a reply and what is known of it; `draw` numbers the replies to one question.

        Raises ChatError where no request would be answered, ReplyError where this one is not.
        """
        return Reply(await asyncio.to_thread(self.complete, messages))

    def count(self, messages: Sequence[Message]) -> int:
        """Return how many tokens a request has; here a guess of four bytes a token."""
        return sum(4 + len(message.content.encode()) // 4 for message in messages)

    def price(self, input_tokens: int, output_tokens: int) -> float | None:
        """Return what so many tokens cost in USD, or None where that is not known."""
        return None

    async def close(self) -> None:
        """Close its connections; called in the event loop that `reply` was called in."""


class Generator(Component):
    """Writes instruction-following conversations about images it is told of in words."""

    hook = "llava_generators"

    @abstractmethod
    def generate(self, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        """Return the turns of one conversation; the image's placeholder is in the first."""


class Dataset(Component):
    """A sequence of samples. Built as `Dataset(options)`; images are opened by the reader."""

    hook = "llava_datasets"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]:
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


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered prompt. `<image>` within it marks the place of an image."""

    text: str
    learned: bool = False
    """Whether the loss covers it."""
    markup: bool = False
    """Whether it belongs to the template, so that special tokens in it count as such."""


class PromptTemplate(Component):
    """Renders turns as the text a language model was, or will be, tuned on."""

    hook = "llava_prompt_templates"
    adds_bos: ClassVar[bool] = True
    """Whether the tokenizer's own first token goes in front; False where the template writes it."""

    @abstractmethod
    def segments(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Segment]:
        """Return the text in order; after a human turn at the end it is open for the answer."""

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Return texts besides the end token that end an answer."""
        return ()


class Benchmark(Component):
    """Questions with images, and what makes an answer a good one."""

    hook = "llava_benchmarks"
    scorers: ClassVar[Sequence[type[FileScorer]]] = ()
    """What `llava-run score` can do without a model, where files hold the answers already."""

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

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Say by its content whether `folder` is in this layout."""
        return False

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None) -> Any:
        """Return the model in `folder`: something with `generate`, `generate_ids`, `logits`.

        A layout that leaves something out may take it as a further keyword, None by default:
        `template`, the name of the prompt template; `base` and `vision`, the folders of the
        language model and of the vision encoder that a checkpoint builds on.
        """
        raise NotImplementedError


class Tracker(Component):
    """Observes a run. Named in the recipe: installing a package never changes a run."""

    hook = "llava_trackers"

    @abstractmethod
    def record(self, event: Mapping[str, Any]) -> None:
        """Take one event: `time`, `step`, `event`, and what belongs to it."""

    def close(self) -> None:
        """Flush what is held back; called once, when the run ends for whatever reason."""


class Build(Protocol):
    """Builds what a recipe chose: `build(self.options.data)` is a `Dataset`."""

    def __call__(self, use: Use[KindT_co], /, **context: Any) -> KindT_co: ...


class Progress(Protocol):
    """Shows how far a step is, with the time left."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class Run:
    """What a step is given."""

    directory: Path
    """A folder of its own; whatever it leaves there is its artifact."""
    earlier: Mapping[str, Path]
    """The folders of the steps before it, by name, oldest first."""
    build: Build
    seed: int
    resume: bool
    """Whether to go on from what an interrupted attempt left in `directory`."""
    device: torch.device
    model: ModelSource
    progress: Progress
    event: Event
    stopping: Stopping
    """Says whether the user asked to stop: save, then raise `Stopped`."""
    team: Team
    """The processes that share this step's work; one process alone unless it is `together`."""


class Event(Protocol):
    """Appends an event to events.jsonl and shows it to the trackers."""

    def __call__(self, name: str, /, **values: Any) -> None: ...


class Stopping(Protocol):
    def __call__(self) -> bool: ...


class ModelSource(Protocol):
    """The model as it stands before a step: the newest one an earlier step left, else new."""

    @property
    def vision(self) -> Use[VisionEncoder]:
        """The recipe's choice. Raises RecipeError where it has no model."""

    @property
    def language(self) -> Use[LanguageModel]:
        """The recipe's choice. Raises RecipeError where it has no model."""

    def __call__(self, folder: Path | None = None) -> LlavaModel:
        """Return the model in `folder`, or as the recipe and the earlier steps have it."""

    def new(
        self, vision: VisionEncoder | None = None, language: LanguageModel | None = None
    ) -> LlavaModel:
        """Return the recipe's model around parts that were made elsewhere."""


class Stopped(Exception):
    """A step stopped because it was asked to, after saving what it had."""


@dataclass(frozen=True)
class Outcome:
    """What a step reports: numbers, and sections for the run's report."""

    metrics: Mapping[str, float]
    sections: Sequence[Section] = ()


class Step(Component):
    """One thing a recipe does. Built as `Step(options)`."""

    hook = "llava_steps"
    needs_model: ClassVar[bool] = False
    """Whether it starts from the recipe's model, so that missing weights are found at once."""
    together: ClassVar[bool] = False
    """Whether every process of a torchrun takes part in it, not the first alone. Then `run.team`
    says who they are, and only who leads writes to `run.directory`."""

    @abstractmethod
    def run(self, run: Run) -> Outcome:
        """Do the work, write it to `run.directory`, and report."""

    @classmethod
    def plan(cls, options: Any, planner: Planner) -> StepPlan | None:
        """Return what the step will cost, without loading anything; None where negligible."""
        return None


KINDS: tuple[type[Component], ...] = (
    VisionEncoder,
    Connector,
    LanguageModel,
    PromptTemplate,
    Dataset,
    ChatModel,
    Generator,
    Benchmark,
    Exporter,
    Tracker,
    Step,
)
