"""Vision transformers of timm, by name, with timm's weights and preprocessing.

Shapes: B images, P patches, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self, cast

import torch
from PIL import Image
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from llavakit import ModelError, did_you_mean
from llavakit_plugins.huggingface.hub import PretrainedOptions, missing_source
from llavakit_plugins.huggingface.products import ProductOptions, choose_products
from llavakit_plugins.vision.options import EncoderOptions
from llavakit_plugins.vision.preprocessing import pad_to_square, shrink, without_ends
from llavakit_plugins.vision.square import Aspect
from llavakit_plugins.vision.vision_transformer import (
    VisionTransformer,
    learned_pixels,
    pixel_options,
)


class TimmOptions(EncoderOptions, ProductOptions):
    """Options of `timm`."""

    model: str | None = None
    """A model name of timm's, such as `vit_small_patch14_reg4_dinov2.lvd142m`."""
    source: Path | None = None
    """A folder that timm wrote, or a file of weights for `model`; by default the hub's weights."""
    pretrained: bool = True
    """Whether to use the hub's weights if there is no `source`; otherwise weights are random."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Arguments of timm's `create_model`, such as `img_size`."""
    aspect: Aspect | None = None
    """How an image becomes a square; by default as timm evaluates the model. With `pad` nothing is
    cut off."""

    @model_validator(mode="after")
    def _needs_a_name(self) -> TimmOptions:
        if self.model is None and self.source is None:
            raise ValueError("give `model` (a name of timm's) or `source` (a folder it wrote)")
        return self


class Timm(VisionTransformer):
    """A vision transformer of timm: class token and registers, if it has them, then the patches."""

    name = "timm"
    Options = TimmOptions

    def __init__(self, options: TimmOptions, model: Any = None) -> None:
        super().__init__()
        self.model: Any = _build(options, pretrained=False) if model is None else model
        self.model.to(getattr(torch, options.dtype))
        choose_products(self.model, options.products)
        self._require_patches(options)
        self.prefix_tokens = self.model.num_prefix_tokens
        self.choose(options, len(self.model.blocks))
        # timm's `forward_intermediates` begins with the first block's output
        if 0 in self.depths:
            raise ModelError(
                "vision encoder `timm` cannot give the embedding; `layer` must name a block: "
                f"1 to {len(self.model.blocks)}, or -1 for the last"
            )
        self.width: int = self.model.embed_dim * len(self.depths)
        rows, columns = self.model.patch_embed.grid_size
        self.image_size, width = self.model.patch_embed.img_size
        if rows != columns or self.image_size != width:
            raise ModelError(
                f"`{options.model or options.source}` reads {width}x{self.image_size} pixels, no "
                "square; choose another, or set `config.img_size`"
            )
        self._patch_size: int = self.image_size // rows
        self._preprocess(options)
        self.learned = pixel_options(options)
        """The options of the pixels that its model learned from; exports remember them."""

    def _require_patches(self, options: TimmOptions) -> None:
        needed = ("blocks", "num_prefix_tokens", "patch_embed", "embed_dim")
        lacking = [name for name in needed if not hasattr(self.model, name)]
        if lacking:
            raise ModelError(
                f"`{options.model or options.source}` is no vision transformer with one grid of "
                f"patches (timm's {type(self.model).__name__} has no `{lacking[0]}`); choose a "
                "vit, deit, beit or eva"
            )

    def _preprocess(self, options: TimmOptions) -> None:
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        edge = self.image_size
        wanted: dict[str, Any] = {
            "input_size": (3, edge, edge),
            "mean": options.mean,
            "std": options.std,
            "interpolation": options.interpolation,
        }
        if options.aspect == "pad":
            wanted["crop_pct"] = 1.0  # timm evaluates many models on a middle part of the image
        elif options.aspect is not None:
            wanted["crop_mode"] = {"crop": "center", "squash": "squash"}[options.aspect]
        config = resolve_data_config(wanted, pretrained_cfg=self.model.pretrained_cfg)
        # its tensors (mean, std) need values, also when a plan builds models on the meta device
        with torch.device("cpu"):
            self._transform = create_transform(**config)
        self._pad_with = config["mean"] if options.aspect == "pad" else None
        self._crops = config["crop_mode"] == "center"
        if options.fast:
            self.decode_edge = int(edge / config["crop_pct"])

    @classmethod
    def create(cls, options: TimmOptions, **context: Any) -> Self:
        pretrained = options.source is not None or options.pretrained
        return cls(options, _build(options, pretrained=pretrained))

    @classmethod
    def load(cls, options: TimmOptions, folder: Path, **context: Any) -> Self:
        learned = learned_pixels(options, folder.parent / "model.toml")
        encoder = cls.create(options.model_copy(update={"source": folder}))
        encoder.learned |= learned
        return encoder

    def save(self, folder: Path) -> None:
        from timm.models import save_for_hf

        save_for_hf(self.model, str(folder), safe_serialization=True)

    @classmethod
    def missing(cls, options: TimmOptions) -> str | None:
        from timm.models import get_pretrained_cfg

        if options.source is not None:
            here = options.source.exists()
            return None if here else f"vision encoder: {options.source} does not exist"
        if not options.pretrained or options.model is None:
            return None
        config = get_pretrained_cfg(options.model, allow_unregistered=True)
        hub = options.model.partition("hf-hub:")[2] or (config.hf_hub_id if config else None)
        return missing_source("vision encoder", PretrainedOptions(source=hub)) if hub else None

    def tokens(self, image_size: int) -> int:
        return self.kept + (image_size // self._patch_size) ** 2

    def prepare(self, image: Image.Image) -> Tensor:
        if self.decode_edge is not None:
            image = shrink(image, self.decode_edge)
        if self._pad_with is not None:
            image = pad_to_square(image, self._pad_with)
        if self._crops:
            image = without_ends(image)
        pixels_CHW: Tensor = self._transform(image)
        return pixels_CHW

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The transformer's layers in order."""
        layers: nn.ModuleList = self.model.blocks
        return layers

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features `[B, prefix + P, D]`."""
        layers = sorted({*self.depths})
        found = self.model.forward_intermediates(
            pixels_BCHW,
            indices=[depth - 1 for depth in layers],
            return_prefix_tokens=True,
            norm=self.normalised,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        # without prefix tokens it is the patches alone
        features = [
            one if isinstance(one, Tensor) else torch.cat([one[1], one[0]], dim=1) for one in found
        ]
        return self.joined([features[layers.index(depth)] for depth in self.depths])


def _build(options: TimmOptions, *, pretrained: bool) -> Any:
    """Return timm's model without its classifier, which is never used here.

    Raises ModelError if timm does not know the name, or the weights do not fit.
    """
    import timm

    name, weights = options.model, None
    if options.source is not None:
        made = _architecture(options.source)
        if made is None and name is None:
            raise ModelError(f"{options.source} holds no config.json of timm's: give `model` too")
        if made is not None and name is not None and name.split(".")[0] != made:
            raise ModelError(f"{options.source} holds a `{made}`, not `{name}`; leave `model` out")
        if made is not None:
            name = f"local-dir:{options.source}"
        else:
            kind = "local-dir" if options.source.is_dir() else None
            weights = {"file": str(options.source), "source": kind}
    assert name is not None
    try:
        model = timm.create_model(
            name, pretrained=pretrained, pretrained_cfg_overlay=weights, **options.config
        )
    except _REFUSALS as error:
        known = timm.list_models() if "nknown model" in str(error) else ()
        hint = did_you_mean(name.split(".")[0], known)
        complaint = f"timm cannot make `{name}`: {error}"
        raise ModelError(f"{complaint}; {hint}" if hint else complaint) from error
    cast(Any, model).reset_classifier(0)
    return model


_REFUSALS = (
    AssertionError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    UnpicklingError,
    ValueError,
)  # timm has no error class of its own; it raises these for wrong names, arguments and weights


def _architecture(source: Path) -> str | None:
    """Return the architecture in a folder's config.json of timm, or None without such a file."""
    try:
        table = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise ModelError(f"{source / 'config.json'} is no JSON: {error}; copy it again") from error
    found: str | None = table.get("architecture")
    return found
