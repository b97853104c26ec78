"""What a plugin with weights implements: vision encoder, connector, language model.

Tensor names carry their shape (`pixels_BCHW`):
    B images, C colour, H height, W width, P visual tokens of an image, D vision width,
    T rows of the packed stream, E language width, N visual rows, M selected rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit.contracts.component import Component
from llavakit.contracts.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavakit.contracts.packing import Packing, Rows, Stream


class Network(nn.Module, Component):
    """A component with weights. Its options alone determine the shape of every weight.

    Construction never reads weights: it may run on the meta device, where a plan counts
    parameters. Override `create`, `save` and `load` together for a layout of weights of its own.
    """

    weights_file: ClassVar[str] = "model.safetensors"

    @classmethod
    def create(cls, options: Any, **context: Any) -> Self:
        """Return what a recipe asks for: with pretrained weights where the options name some."""
        return cls(options, **context)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that learn, with their names, where a recipe trains this part."""
        yield from self.named_parameters()  # one with adapters yields only these

    def frozen_bytes(self, each: int) -> float:
        """Return the size of the weights while they are frozen, `each` bytes a parameter."""
        return float(each * sum(parameter.numel() for parameter in self.parameters()))

    def with_options(self, options: Any) -> Self:
        """Return the component with other options around the same weights.

        Raises ModelError where that cannot be, as is usual.
        """
        raise ModelError(f"`{self.name}` cannot be changed once it is there")

    def save(self, folder: Path) -> None:
        """Write the weights to `folder`, which exists, as safetensors."""
        tensors = {name: t.contiguous() for name, t in self.state_dict().items()}  # no gaps
        try:
            save_file(tensors, folder / self.weights_file)
        except RuntimeError as error:  # one weight under two names
            what = f"`{self.name}` shares weights, which its own `save` and `load` must keep"
            raise ModelError(f"{what}; write both, or share none ({error})") from error

    @classmethod
    def load(cls, options: Any, folder: Path, **context: Any) -> Self:
        """Return the component that `save` wrote to `folder`."""
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
    default_tiling: ClassVar[str] = "single"  #: The tiling where a recipe names none.

    width: int  #: Size of one patch feature (D).
    image_size: int  #: Edge in pixels of the square that `prepare` returns.
    channels: int = 3  #: Of what `prepare` returns: one made of others may have 3 for each.
    prefix_tokens: int = 0
    decode_edge: int | None = None  #: Shorter side that does for `prepare` (JPEGs decoded smaller).

    @abstractmethod
    def tokens(self, image_size: int) -> int:
        """Return the number of visual tokens (P, prefix excluded) of a square image."""

    @abstractmethod
    def prepare(self, image: Image) -> Tensor:
        """Return normalised pixels `[channels, H, W]`, float32, of an RGB image."""

    @abstractmethod
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features `[B, prefix_tokens + P, D]`."""


class Connector(Network):
    """Turns patch features into language-model embeddings.

    Built as `Connector(options, vision_width=D, language_width=E)`, and `patches=P` if it asks.
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
        """Return the embeddings `[T, E]` of the packed stream: text rows and visual rows.

        Raises ModelError where `forward` gives another shape than it should.
        """
        embeds_TE = stream.embed(stream.token_ids_T)
        visual_BPE = self(features_BPD)
        images, patches, _ = features_BPD.shape
        # another shape would fit once flattened, with rows of wrong patches
        expected = (images, self.tokens(patches), embeds_TE.shape[1])
        found = tuple(visual_BPE.shape) if isinstance(visual_BPE, Tensor) else type(visual_BPE)
        if found != expected:
            raise ModelError(
                f"connector `{self.name}` gave {found} where {expected} was expected: images, "
                f"`tokens({patches})`, width of the language model; fix its `forward` or `tokens`"
            )
        visual_NE, kept = visual_BPE.flatten(0, 1), stream.visual_kept_N
        if kept is not None and stream.weights_KN is not None:  # no other override is given any
            pairs = zip(kept, stream.weights_KN[..., None], strict=True)
            visual_NE = cast("Tensor", sum(visual_NE[index] * w_N1 for index, w_N1 in pairs))
        elif kept is not None:
            visual_NE = visual_NE.index_select(0, kept)  # a prompt was cut, or its images tiled
        # under autocast a connector gives half precision; not in place: the table may learn
        return embeds_TE.index_copy(0, stream.visual_rows_N, visual_NE.to(embeds_TE.dtype))


class LanguageModel(Network):
    """A causal language model over a packed stream. Built as `LanguageModel(options)`."""

    hook = "llava_language_models"
    default_template: ClassVar[str] = "vicuna_v1"  #: The prompt template where a recipe names none.

    options: Any  #: What it was built with, where `merged` gives another model than itself.
    width: int  #: Size of one token embedding (E).
    max_length: int  #: Longest sequence in tokens.
    recompute: bool = False  #: Whether activations are computed again for the backward pass.
    tokenizer: PreTrainedTokenizerBase
    """A fast tokenizer; a new model has none until one is set. An attribute `quick_reader` of it is
    called with its `llavakit.Reader`, and returns a `QuickReader` (to the same ids) or None."""

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
        # half precision cannot add up tens of thousands of exponentials
        return F.cross_entropy(self.logits(hidden_ME).float(), targets_M, reduction="sum")

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer, by default the tokenizer's end token."""
        end = self.tokenizer.eos_token_id
        return frozenset(() if end is None else (end,))  # some tokenizers have none

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
