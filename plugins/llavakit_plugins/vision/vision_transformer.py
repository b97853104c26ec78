"""What vision transformers share: the choice of a layer, the prefix tokens, the preprocessing.

A family of transformers' models needs about twenty lines on top of it (see docs/plugins.md).

Shapes: B images, P patches, D width.
"""

from __future__ import annotations

import inspect
import json
import re
import tomllib
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn

from llavakit import ModelError, VisionEncoder
from llavakit_plugins.huggingface.filling import fill
from llavakit_plugins.huggingface.hub import (
    explain_config,
    fetch_config,
    fetch_folder,
    missing_source,
    quietly,
    read_config,
)
from llavakit_plugins.huggingface.products import choose_products
from llavakit_plugins.huggingface.unread import being_left
from llavakit_plugins.huggingface.weights import Weights
from llavakit_plugins.vision.options import (
    PROCESSOR,
    ChosenLayers,
    EncoderOptions,
    TransformersOptions as TransformersOptions,
    read_processor,
)
from llavakit_plugins.vision.preprocessing import to_square
from llavakit_plugins.vision.square import MEAN, RGB, STD, TORCH_FILTERS, Interpolation, Square

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VisionTransformer(ChosenLayers, VisionEncoder):
    """A transformer over patches. Layers behind the chosen one keep their weights but do not run.

    They stay, so that a saved encoder is a whole one and another layer can be chosen later.
    """

    @staticmethod
    def joined(features: Sequence[Tensor]) -> Tensor:
        """Return the features `[B, P, D]` of several layers side by side."""
        return features[0] if len(features) == 1 else torch.cat(list(features), dim=-1)


class TransformersEncoder(VisionTransformer):
    """A vision model of transformers, from a folder, from the hub, or from a configuration.

    A subclass names transformers' class and computes the first hidden states from pixels. Layers
    run here and not in transformers' `forward`, which would compute all of them.
    """

    Options = TransformersOptions
    mean: ClassVar[RGB] = MEAN
    """Used if neither an option nor the source's preprocessor_config.json states a mean."""
    std: ClassVar[RGB] = STD
    interpolation: ClassVar[Interpolation] = "bicubic"

    @classmethod
    @abstractmethod
    def architecture(cls) -> type[PreTrainedModel]:
        """Return transformers' class. Import it here, so that only its users pay for the import."""

    @abstractmethod
    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Return `hidden_states[0]`, `[B, prefix + P, D]`."""

    def edges(self, config: Any) -> tuple[int, int]:
        """Return the edges in pixels of the square that it reads, and of a patch."""
        image, patch = config.image_size, config.patch_size
        return _edge(image, self.name, "image_size"), _edge(patch, self.name, "patch_size")

    def masks(self, pixels_BCHW: Tensor) -> dict[str, Tensor | None]:
        """Return what else each layer is called with."""
        return self.unmasked

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The transformer's layers in order."""
        layers: nn.ModuleList = self.inner.encoder.layers
        return layers

    @property
    def final_norm(self) -> nn.Module:
        """The normalisation behind the last layer."""
        norm: nn.Module = self.inner.post_layernorm
        return norm

    def __init__(self, options: TransformersOptions, model: Any = None) -> None:
        super().__init__()
        if model is None:
            cls = self.architecture()
            shape = self._shape(read_config(options), options.source)
            with explain_config(cls.__name__):
                model = cls(cast(Any, cls.config_class)(**shape))
            model = model.to(getattr(torch, options.dtype))
        choose_products(model, options.products)
        self.model, self.products = model, options.products
        # Whether layers require an `attention_mask` argument depends on the family and on the
        # version of transformers; None means that every patch sees every patch.
        takes = [inspect.signature(block.forward).parameters for block in self.blocks]
        self.unmasked: dict[str, Tensor | None] = (
            {"attention_mask": None} if all("attention_mask" in t for t in takes) else {}
        )
        config = self.model.config
        self.choose(options, config.num_hidden_layers)
        self.width: int = config.hidden_size * len(self.depths)
        self.image_size, self.patch_size = self.edges(config)
        given = read_processor(options)
        self.square = Square(
            self.image_size,
            options.aspect,
            options.mean or given.mean or self.mean,
            options.std or given.std or self.std,
            options.interpolation or given.interpolation or self.interpolation,
            options.fast,
            options.backend,
        )
        if options.backend == "torchvision" and self.square.interpolation not in TORCH_FILTERS:
            raise ModelError(
                f"vision encoder `{self.name}` resizes with `{self.square.interpolation}`, which "
                'backend = "torchvision" does not have for images; use backend = "pil"'
            )
        self.decode_edge = self.image_size if options.fast else None
        self.learned = pixel_options(options)
        """The options of the pixels that its model learned from; exports remember them."""

    def with_options(self, options: TransformersOptions) -> Self:
        """Return an encoder that shares this one's network and has other options."""
        return type(self)(options, self.model)

    @property
    def inner(self) -> Any:
        """The transformer itself; older versions of transformers wrap it in `vision_model`."""
        return getattr(self.model, "vision_model", self.model)

    @classmethod
    def create(cls, options: TransformersOptions, **context: Any) -> Self:
        return cls(options) if options.source is None else cls._read(options)

    @classmethod
    def load(cls, options: TransformersOptions, folder: Path, **context: Any) -> Self:
        learned = learned_pixels(options, folder.parent / "model.toml")
        encoder = cls._read(options.model_copy(update={"source": str(folder), "revision": None}))
        encoder.learned |= learned
        return encoder

    @classmethod
    def _read(cls, options: TransformersOptions) -> Self:
        assert options.source is not None
        cls._shape(fetch_config(options), options.source)
        network = cast(Any, cls.architecture())
        folder = fetch_folder(options.source, options.revision)
        dtype = getattr(torch, options.dtype)
        try:
            with explain_config(network.__name__):
                config = network.config_class.from_pretrained(folder, **options.config)
            model = fill(network, config, vision_state(folder, dtype), options.source, dtype=dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"the weights of vision encoder `{cls.name}` in {options.source} cannot be read: "
                f"{error}"
            ) from error
        return cls(options, model)

    @classmethod
    def _shape(cls, table: Mapping[str, Any], source: str | None) -> dict[str, Any]:
        """Return a configuration without `model_type`. Raises ModelError if the type is another."""
        shape = dict(table)
        expected = cast(Any, cls.architecture()).config_class.model_type
        found = shape.pop("model_type", expected)
        if expected not in (found, f"{found}_vision_model"):
            raise ModelError(
                f"{source or 'the configuration'} is a model of type `{found}`, but vision "
                f"encoder `{cls.name}` is `{expected}`; choose another `use` or `source`"
            )
        return shape

    def save(self, folder: Path) -> None:
        with quietly():
            self.model.save_pretrained(folder)
        table = _processor(self.square)
        (folder / PROCESSOR).write_text(json.dumps(table, indent=2), encoding="utf-8")

    @classmethod
    def missing(cls, options: TransformersOptions) -> str | None:
        return missing_source("vision encoder", options)

    def tokens(self, image_size: int) -> int:
        return self.kept + (image_size // self.patch_size) ** 2

    def prepare(self, image: Image.Image) -> Tensor:
        return to_square(image, self.square)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features `[B, prefix + P, D]`."""
        hidden_BPD, masks = self.embed(pixels_BCHW), self.masks(pixels_BCHW)
        found = {0: hidden_BPD}
        for number, block in enumerate(list(self.blocks)[: self.depth], start=1):
            hidden_BPD = block(hidden_BPD, **masks)  # layers behind it are not computed
            if number in self.depths:
                found[number] = hidden_BPD
        layers = [found[depth] for depth in self.depths]
        return self.joined([self.final_norm(one) for one in layers] if self.normalised else layers)


def vision_state(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of the vision model in a folder, by their names in the vision model.

    The folder may hold a vision model alone, a whole CLIP, or a LLaVA. Raises ModelError if there
    are none, or if a file is damaged.
    """
    weights = Weights.within(folder, None if being_left() is not None else dtype)
    if weights is None:
        raise ModelError(f"{folder} holds no weights of a vision encoder; copy them there")
    # LLaVA of transformers 4 and 5, then a whole CLIP
    for pattern in (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", r"^vision_model\."):
        found = {
            name[match.end() :]: weights[name]
            for name in weights
            if (match := re.match(pattern, name))
        }
        if found:
            return found
    return dict(weights)


# -- preprocessor_config.json ----------------------------------------------------------------------


def _processor(square: Square) -> dict[str, Any]:
    """Return the table from which transformers builds an image processor that does the same.

    CLIP's processor does not pad, so with `pad` the table says crop: the same for an image that is
    already a square.
    """
    edges = {"height": square.size, "width": square.size}
    squash = square.aspect == "squash"
    return {
        "image_processor_type": "SiglipImageProcessor" if squash else "CLIPImageProcessor",
        "do_resize": True,
        "size": edges if squash else {"shortest_edge": square.size},
        "do_center_crop": not squash,
        "crop_size": edges,
        "resample": int(Image.Resampling[square.interpolation.upper()]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(square.mean),
        "image_std": list(square.std),
        "do_convert_rgb": True,
    }


def _edge(value: Any, name: str, what: str) -> int:
    """Return the edge of a square that a configuration states as one number or as two."""
    edges = {value} if isinstance(value, int) else set(value)
    if len(edges) != 1:
        raise ModelError(f"vision encoder `{name}`: {what} {value} is no square; choose another")
    return int(edges.pop())


_LEARNED = ("aspect", "backend", "fast")


def pixel_options(options: EncoderOptions) -> dict[str, Any]:
    """Return the options by which an image becomes pixels; not every encoder has all of them."""
    return {name: getattr(options, name) for name in _LEARNED if hasattr(options, name)}


def learned_pixels(options: EncoderOptions, path: Path) -> dict[str, Any]:
    """Return by which options images became the pixels that a model folder learned from.

    Says so where these are others. An encoder without a model learned from none.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("vision", {})
    except (OSError, ValueError):  # no model; a broken one was refused before
        return {}
    fields = type(options).model_fields
    given = pixel_options(options)
    learned = {name: table.get(name, fields[name].default) for name in given}
    for name, before in learned.items():
        if (now := given[name]) != before:
            warnings.warn(
                f"the model learned from images with `vision.{name} = {before!r}` and is given "
                f"them with {now!r}: its answers may be worse; leave `vision.{name}` as it was",
                stacklevel=3,
            )
    return learned
