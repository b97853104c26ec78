"""The layout of the original LLaVA, as its own code loads it (haotian-liu/LLaVA)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llavakit import Exporter, LlavaModel, ModelError, Options, Registry, new_folder
from llavakit_plugins.checkpoints.original_reader import OriginalReader
from llavakit_plugins.checkpoints.original_source import is_original, read_original
from llavakit_plugins.checkpoints.original_text import TOKENS
from llavakit_plugins.checkpoints.original_tower import FOLDER
from llavakit_plugins.checkpoints.parity import prove
from llavakit_plugins.checkpoints.parts import (
    language_state,
    plain_encoder,
    stated_options,
)
from llavakit_plugins.checkpoints.pinpoints import Grids, grids_of
from llavakit_plugins.checkpoints.projectors import projector_layers
from llavakit_plugins.checkpoints.prompts import NOTE, note_template
from llavakit_plugins.huggingface.hub import PretrainedOptions, find_file
from llavakit_plugins.huggingface.tokenizer_writing import write_tokenizer
from llavakit_plugins.huggingface.writing import (
    ShardSize,
    rename_tower,
    write_config,
    write_weights,
)
from llavakit_plugins.vision.vision_transformer import vision_state

_TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}


class OriginalOptions(Options):
    vision_tower: str | None = None
    """The vision tower's name in config.json. The original resolves a path from its working
    directory, so give an absolute path. By default the name on the hub, if the tower is that of the
    hub; else the folder `vision_tower` within the export."""
    max_shard_size: ShardSize = "5GB"


class Original(Exporter):
    """The original LLaVA's layout: the language model with `model.mm_projector` in it."""

    name = "original"
    Options = OriginalOptions

    def __init__(self, options: OriginalOptions | None = None) -> None:
        self.options = options or OriginalOptions()

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return is_original(folder)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        base: Path | None = None,
        vision: Path | None = None,
        template: str | None = None,
    ) -> LlavaModel:
        """Return the model.

        `base` is the folder of the language model that an adapter or a projector was trained
        with, or a delta is added to, `vision` that of the vision tower, `template` the name of
        the prompt template.
        """
        registry = Registry.installed()
        parts = read_original(
            folder,
            registry,
            dtype=dtype,
            base=base,
            vision=vision,
            template=template,
            shapes=device.type == "meta",  # for plans: nothing is merged
        )
        return parts.join(registry, folder, device)

    def export(self, model: LlavaModel, folder: Path) -> Mapping[str, Any]:
        """Write the folder, read it back with transformers, and return how far the two are apart.

        Raises ModelError for a model that the layout cannot express.
        """
        registry = Registry.installed()
        options = stated_options(model, "vision", registry)
        grids = _grids(model)
        _check_vision(model, options)
        text, state = language_state(model.language, self.name)
        kind, architecture = _type_of(text)
        projector, tensors = _projector(model)
        if model.image_newline is not None:
            tensors["model.image_newline"] = model.image_newline
        if text.tie_word_embeddings:  # the original always has a head of its own
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        template = model.choices["template"]
        config = {
            **{k: v for k, v in text.to_dict().items() if k != "tie_word_embeddings"},
            "tie_word_embeddings": False,
            "model_type": kind,
            "architectures": [architecture],
            "dtype": str(model.language.head.weight.dtype).removeprefix("torch."),
            "mm_vision_tower": self._tower_name(model),
            "mm_vision_select_layer": options.layer,
            "mm_vision_select_feature": options.select,
            "mm_hidden_size": model.vision.width,
            "mm_projector_type": projector,
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": TOKENS[0] in str(template.get("image", "")),
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "tune_mm_mlp_adapter": False,
            "freeze_mm_mlp_adapter": False,
            "image_aspect_ratio": "pad" if options.aspect == "pad" else "square",
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": model.language.max_length,
            NOTE: note_template(template),
        }
        if grids.points:
            config |= {
                "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": [[width, height] for height, width in grids.points],
                "mm_patch_merge_type": "spatial_unpad",
            }
        with new_folder(folder) as partial:
            files = write_weights({**state, **tensors}, partial, self.options.max_shard_size)
            write_config(config, partial, model.language)
            write_tokenizer(model.language.tokenizer, partial)
            (partial / FOLDER).mkdir()
            model.vision.save(partial / FOLDER)
            rename_tower(model.vision.model, partial / FOLDER)
            # read back by our own reader first, and then, below, as others read it
            self.load(partial, device=model.device, dtype=None, vision=partial / FOLDER)
            reader = OriginalReader(partial, partial / FOLDER, model)
            return {"files": files, **prove(model, reader, folder)}

    def check(self, model: LlavaModel) -> None:
        """Raise ModelError for a model that the layout cannot express."""
        _grids(model)
        _check_vision(model, stated_options(model, "vision", Registry.installed()))
        _projector(model)
        _type_of(language_state(model.language, self.name)[0])

    def _tower_name(self, model: LlavaModel) -> str:
        source = model.choices["vision"].get("source")
        if self.options.vision_tower is not None:
            return self.options.vision_tower
        # a name on the hub, not a path
        if not source or source.count("/") != 1 or Path(source).exists() or _is_tuned(model):
            return FOLDER
        return str(source)


def _is_tuned(model: LlavaModel) -> bool:
    """Return whether the tower differs from the hub's of its name, as far as this machine knows."""
    choice = model.choices["vision"]
    named = PretrainedOptions(source=choice["source"], revision=choice.get("revision"))
    found = find_file(named, "model.safetensors") or find_file(named, "pytorch_model.bin")
    tower = plain_encoder(model.vision)
    if found is None or tower is None:
        return False
    hubs = vision_state(found.parent, None)
    return any(
        not torch.equal(tensor.cpu(), hubs[name].to(tensor.dtype))
        for name, tensor in tower.inner.state_dict().items()
        if name in hubs
    )


def _type_of(text: Any) -> tuple[str, str]:
    """Return the layout's name of a language model. Raises ModelError if it has no such model."""
    if text.model_type not in _TYPES:
        raise ModelError(
            f"the original LLaVA has no language model of type `{text.model_type}`, but "
            f"{' and '.join(_TYPES)}; `--format hf` writes this one"
        )
    _check_text(text)
    return _TYPES[text.model_type]


def _grids(model: LlavaModel) -> Grids:
    """Return a model's tiles. Raises ModelError for OneVision's, which the original has not."""
    grids = grids_of(model, Original.name)
    if grids.cap is not None or grids.video is not None:
        what = "interpolate an image's tiles, which tiling `anyres` is set to with `cap`"
        if grids.cap is None:
            what = "show videos, which tiling `anyres` is set to with `video`"
        raise ModelError(
            f"the original LLaVA does not {what}; `--format hf` writes it, for "
            f"{grids.family.architecture}"
        )
    return grids


def _check_vision(model: LlavaModel, options: Any) -> None:
    """Raise ModelError if the layout cannot hold the vision encoder."""
    found = plain_encoder(model.vision)
    name = model.vision.name
    if found is None or found.model.config.model_type != "clip_vision_model":
        other = "`--format hf` writes it" if found is not None else "the model folder keeps it"
        raise ModelError(
            f"the original LLaVA has CLIP as its vision tower, and not `{name}`; {other}"
        )
    one_layer = isinstance(options.layer, int)
    if options.norm or options.aspect == "squash" or not one_layer:
        what = "features behind the final normalisation" if options.norm else "squashed images"
        what = what if one_layer else "features of several layers"
        raise ModelError(
            f"the original LLaVA does not know {what}, which vision encoder `{name}` is set to; "
            "the model folder keeps this"
        )


def _check_text(text: Any) -> None:
    """Raise ModelError for settings that the original's transformers, 4.37, would ignore."""
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    known = ("default", "linear", "dynamic") if text.model_type == "llama" else ("default",)
    usual = text.hidden_size // text.num_attention_heads
    unknown = {
        f"positions of type `{kind}`": kind not in known,
        "rotations of a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "biases in its MLP": getattr(text, "mlp_bias", False),
        f"heads of width {getattr(text, 'head_dim', usual)}": getattr(text, "head_dim", usual)
        not in (None, usual),
    }
    for what, there in unknown.items():
        if there:
            raise ModelError(
                f"the language model has {what}, which the original LLaVA's `{text.model_type}` "
                "has not; `--format hf` writes this one"
            )


def _projector(model: LlavaModel) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the original's name of the connector, and its tensors."""
    layers = projector_layers(model.connector)
    prefix = "model.mm_projector."
    if layers is None:
        raise ModelError(
            f"the original LLaVA has no projector like connector `{model.connector.name}`, but "
            "linear, mlp of any depth and identity; `--format onnx` writes any that torch can trace"
        )
    if not layers:
        return "identity", {}
    if len(layers) == 1:
        return "linear", {prefix + "weight": layers[0].weight, prefix + "bias": layers[0].bias}
    tensors = {}
    for number, layer in enumerate(layers):
        # the odd numbers of nn.Sequential are the GELUs
        tensors[f"{prefix}{2 * number}.weight"] = layer.weight
        tensors[f"{prefix}{2 * number}.bias"] = layer.bias
    return f"mlp{len(layers)}x_gelu", tensors
