"""The options of vision transformers, and what they choose. Without torch, as plans need them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field

from llavakit import ModelError, Options
from llavakit_plugins.huggingface.hub import PretrainedOptions, find_file
from llavakit_plugins.huggingface.json_files import read_json
from llavakit_plugins.huggingface.products import ProductOptions
from llavakit_plugins.vision.pixels import colour_of, filter_of
from llavakit_plugins.vision.square import RGB, Aspect, Backend, Interpolation

PROCESSOR = "preprocessor_config.json"


class Given(NamedTuple):
    """What the source's preprocessor_config.json states; None for what it leaves out."""

    mean: RGB | None = None
    std: RGB | None = None
    interpolation: Interpolation | None = None


def read_processor(options: PretrainedOptions) -> Given:
    """Return what the source says of preprocessing, where it says something."""
    found = None if options.source is None else find_file(options, PROCESSOR)
    if found is None:
        return Given()
    table = read_json(found)
    mean, std = (colour_of(table, key, found) for key in ("image_mean", "image_std"))
    return Given(mean, std, filter_of(table, found))


Spread = Annotated[float, Field(gt=0)]


class EncoderOptions(Options):
    """Options of every vision transformer: which features it gives, and from which pixels."""

    layer: int | Annotated[tuple[int, ...], Field(min_length=1)] = -2
    """The layer whose output is used, as in `hidden_states[layer]`: 0 is the embedding, -1 the last
    layer. LLaVA uses -2. Of several, `[-2, -5]`, the features are joined side by side."""
    norm: bool = False
    """Whether the encoder's final normalisation is applied to that output."""
    select: Literal["patch", "cls_patch"] = "patch"
    """`cls_patch` keeps the class token and the registers as visual tokens before the patches."""
    mean: RGB | None = None
    """Mean of each colour, of values 0..1; by default the value that comes with the weights."""
    std: tuple[Spread, Spread, Spread] | None = None
    interpolation: Interpolation | None = None
    fast: bool = False
    """Decode JPEGs at a fraction of their size and shrink other images in blocks: several times
    faster, and 2 to 3 of 255 levels off on average."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TransformersOptions(PretrainedOptions, EncoderOptions, ProductOptions):
    """Options of an encoder from transformers."""

    aspect: Aspect = "crop"
    """Crop the middle square, pad to a square with the mean colour, or squash to a square."""
    backend: Backend = "pil"
    """Whose pixels an image gives, to the last bit: those of transformers' processors with the PIL
    backend, or with torchvision, its default, up to a level of 255 apart, and about 1.5 times as
    fast here. What a model learned from it should be asked with."""

    def alone(self) -> Self:
        given = {k: v for k, v in read_processor(self)._asdict().items() if v is not None}
        stated = {name: value for name, value in self if name in given and value is not None}
        return super().alone().model_copy(update=given | stated)


class SiglipOptions(TransformersOptions):
    """Options of `siglip`. SigLIP was trained on squashed images, hence the other default."""

    aspect: Aspect = "squash"


class ChosenLayers:
    """Which features of a transformer over patches an encoder gives."""

    name: ClassVar[str]
    prefix_tokens: int

    def choose(self, options: EncoderOptions, layers: int) -> None:
        """Set `depths`, the layers whose features are joined, `depth`, the number of layers to run,
        and which prefix tokens are kept.

        `layers` is the number of layers of the network. Raises ModelError if a chosen layer does
        not exist, or if `cls_patch` is selected without a class token.
        """
        chosen = options.layer if isinstance(options.layer, tuple) else (options.layer,)
        for layer in chosen:
            if not -layers - 1 <= layer <= layers:
                raise ModelError(
                    f"vision encoder `{self.name}` has {layers} layers, so `layer = {layer}` "
                    f"names none; use {-layers - 1} to {layers}"
                )
        # layer 0 is the embeddings; -1 the last layer, as in transformers
        self.depths = tuple(layer % (layers + 1) for layer in chosen)
        self.depth = max(self.depths)
        self.normalised = options.norm
        self.kept = 0
        if options.select == "cls_patch":
            if not self.prefix_tokens:
                raise ModelError(
                    f"vision encoder `{self.name}` has no class token, so `select = "
                    '"cls_patch"` asks for nothing; use "patch"'
                )
            # what is kept is not stripped by the core
            self.kept, self.prefix_tokens = self.prefix_tokens, 0
