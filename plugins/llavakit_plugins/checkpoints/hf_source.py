"""Reads transformers' LLaVA layout, as any version from 4.36 on wrote it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llavakit import ModelError, Registry
from llavakit_plugins.checkpoints.adapters import find_base, is_of_transformers, merged_state
from llavakit_plugins.checkpoints.families import FAMILIES, ONEVISION, VIDEO, Family
from llavakit_plugins.checkpoints.parts import (
    Parts,
    make_language,
    make_vision,
    set_tokenizer,
)
from llavakit_plugins.checkpoints.pinpoints import anyres_of
from llavakit_plugins.checkpoints.precision import State
from llavakit_plugins.checkpoints.projectors import Layer
from llavakit_plugins.checkpoints.prompts import choose_template
from llavakit_plugins.checkpoints.tokenizers import has_tokenizer, read_tokenizer
from llavakit_plugins.huggingface.hub import quietly
from llavakit_plugins.huggingface.json_files import (
    check_shape,
    peek_json,
    read_json,
    refuse_devices,
    shown,
)
from llavakit_plugins.huggingface.weights import Weights
from llavakit_plugins.vision.pixels import Pixels, read_pixels, usual_pixels

_log = logging.getLogger("llavakit")
States = dict[str, dict[str, torch.Tensor]]
"""The tensors of each part, by the names that the part itself has for them."""

_PREFIXES = (
    # the names of version 4.36 to 4.51, which 5 writes again; those of 4.52 on; the rest of both
    (r"^language_model\.model\.", "language", "model."),
    (r"^language_model\.lm_head\.", "language", "lm_head."),
    (r"^model\.language_model\.", "language", "model."),
    (r"^lm_head\.", "language", "lm_head."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision", ""),
    (r"^(?:model\.)?multi_modal_projector\.", "projector", ""),
    (r"^(?:model\.)?image_newline$", "newline", "image_newline"),
)


_TABLE = "model.embed_tokens.weight"


def is_hf(folder: Path) -> bool:
    """Return whether a folder holds one of transformers' LLaVAs, or an adapter of one."""
    return _is_whole(folder) or is_of_transformers(folder)


def _is_whole(folder: Path) -> bool:
    """Return whether a folder's config.json describes a vision model and a language model.

    ONNX folders have such a file, too, but theirs contains settings for transformers.js.
    """
    config = peek_json(folder / "config.json")
    return "transformers.js_config" not in config and all(
        isinstance(config.get(part), dict) for part in ("vision_config", "text_config")
    )


def read_hf(
    folder: Path,
    registry: Registry,
    *,
    dtype: torch.dtype | None,
    base: Path | None = None,
    template: str | None = None,
    shapes: bool = False,
) -> Parts:
    """Return the parts of the model in a folder, weights in `dtype`, or as they are.

    An adapter is added to the weights in `base`; with `shapes` the two are compared alone.
    Raises ModelError for what is damaged, missing, or cannot be expressed here.
    """
    adapter, folder = _adapter_and_base(folder, base)
    refuse_devices(folder)
    config = read_json(folder / "config.json")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ModelError(
            f"{folder}: config.json says `model_type` {shown(config.get('model_type'))}, and "
            f"{', '.join(f'`{name}`' for name in FAMILIES)} can be read; it is another model"
        )
    weights = Weights.within(folder, dtype)
    if weights is None:
        raise ModelError(f"{folder} holds no weights; copy its model.safetensors, or its shards")
    states = _sort(weights, weights.home)
    vision_table = _with_defaults(
        config["vision_config"], family.vision, f"{folder}: config.json, `vision_config`"
    )
    text_table = _with_defaults(
        config["text_config"], {"model_type": family.text}, f"{folder}: config.json, `text_config`"
    )
    # some versions note a tied head in the outer table alone
    if config.get("tie_word_embeddings") and "lm_head.weight" not in states["language"]:
        text_table["tie_word_embeddings"] = True
    if adapter is not None:
        network = _network(folder, family, dtype, shapes=shapes)
        states = _taken(states, _sort(merged_state(network, adapter), folder), shapes=shapes)
        if _TABLE in states["language"]:
            text_table["vocab_size"] = len(states["language"][_TABLE])
    vision_use, vision = make_vision(
        vision_table,
        states["vision"],
        registry,
        folder,
        layer=_layer(config, family, folder),
        select=_select(config, family, vision_table, folder),
        pixels=_pixels(folder, vision_table, family),
    )
    language_use, language = make_language(
        text_table, states["language"], registry, folder, plain_logits=True
    )
    newline_E = states["newline"].get("image_newline")
    if (newline_E is not None) != bool(family.pinpoints):
        lacks = "lacks" if newline_E is None else "holds"
        raise ModelError(
            f"{folder} {lacks} image_newline, the row between tiles of LLaVA-NeXT and OneVision, "
            f"and its `model_type` is `{family.model_type}`; is it the config.json of these "
            "weights?"
        )
    tiling = (
        None
        if newline_E is None
        else anyres_of(family, config, vision, folder, language.max_length)
    )
    # training may have changed the chat template, too, and trl saves it beside the adapter
    source = adapter if adapter is not None and has_tokenizer(adapter) else folder
    tokenizer = read_tokenizer(source, str(text_table["model_type"]))
    set_tokenizer(language, tokenizer, folder, source)
    return Parts(
        vision,
        vision_use,
        language,
        language_use,
        _projector(config, states["projector"], folder),
        choose_template(template, config, tokenizer, registry, folder),
        tiling,
        newline_E,
    )


def _adapter_and_base(folder: Path, base: Path | None) -> tuple[Path | None, Path]:
    """Return the folder of an adapter, if it is one, and that of a whole model."""
    if not is_of_transformers(folder) or Weights.within(folder) is not None:
        if base is not None:
            raise ModelError(
                f"{folder} is a whole model in the layout `hf`, which needs no `base`; leave it out"
            )
        return None, folder
    whole = find_base(folder, base, "LoRA adapter", "LLaVA")
    if not _is_whole(whole):
        raise ModelError(
            f"{whole} is none of transformers' LLaVAs; give the folder of the one that the adapter "
            f"in {folder} was trained with as --base DIR"
        )
    return folder, whole


def _network(folder: Path, family: Family, dtype: torch.dtype | None, *, shapes: bool) -> Any:
    """Return a whole model as transformers reads it; with `shapes` on the meta device."""
    network = family.network()
    try:
        with quietly(report=False), torch.device("meta" if shapes else "cpu"):
            if shapes:
                return network(network.config_class.from_pretrained(folder))
            found, report = network.from_pretrained(
                folder, dtype=dtype or "auto", output_loading_info=True
            )
    except Exception as error:  # transformers has errors of many kinds for a damaged folder
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"transformers cannot read {folder} ({reason}); copy it again") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{folder} lacks {missing[0]}; copy the whole checkpoint")
    return found


def _taken(base: States, merged: States, *, shapes: bool) -> States:
    """Return the tensors with an adapter; for shapes alone the base's, but for tables that grew."""
    if not shapes:
        return merged
    grown = {
        name: torch.zeros((), dtype=value.dtype).expand(value.shape)  # as large as one number
        for name, value in merged["language"].items()
        if value.shape != base["language"].get(name, value).shape
    }
    return {**base, "language": base["language"] | grown}


def _sort(weights: Mapping[str, torch.Tensor], home: Path) -> States:
    """Return the tensors of each part, by the names that the part itself has for them."""
    parts = ("language", "vision", "projector", "newline")
    states: States = {part: {} for part in parts}
    for name in weights:
        for pattern, part, prefix in _PREFIXES:
            match = re.match(pattern, name)
            if match:
                states[part][prefix + name[match.end() :]] = weights[name]
                break
        else:
            raise ModelError(
                f"{home} holds {name}, which no LLaVA of transformers has; is it the "
                "checkpoint of another model?"
            )
    return states


def _with_defaults(
    table: Mapping[str, Any], usual: Mapping[str, Any], where: object
) -> dict[str, Any]:
    """Return a part's configuration; transformers left out what was usual for its LLaVA."""
    full = {"model_type": usual["model_type"], **table}
    check_shape(full, where)
    if full["model_type"] == usual["model_type"] and "hidden_size" not in full:
        full = {**usual, **full}
    return full


def _layer(config: Mapping[str, Any], family: Family, folder: Path) -> int | Sequence[int]:
    value = config.get("vision_feature_layer", family.layer)
    layers = value if isinstance(value, list) else [value]
    if layers and all(type(layer) is int for layer in layers):
        return layers if len(layers) > 1 else layers[0]
    raise ModelError(
        f"{folder}: `vision_feature_layer` is {shown(value)}; it must be a number, or a list of "
        "some, whose features lie side by side"
    )


def _select(
    config: Mapping[str, Any], family: Family, vision: Mapping[str, Any], folder: Path
) -> str:
    strategy = config.get("vision_feature_select_strategy", family.strategy)
    # SigLIP has no class token
    classed = not str(vision["model_type"]).startswith("siglip")
    if strategy == "default" and not classed:
        raise ModelError(
            f'{folder}: `vision_feature_select_strategy` is "default", which drops the first token '
            "of every image, and with a SigLIP that is a patch; no vision encoder here drops one. "
            'Use "full" if the model was trained with every patch'
        )
    if strategy not in ("default", "full"):
        raise ModelError(
            f"{folder}: `vision_feature_select_strategy` is {strategy!r}; it must be default or "
            "full"
        )
    return "cls_patch" if strategy == "full" and classed else "patch"


def _pixels(folder: Path, vision: Mapping[str, Any], family: Family) -> Pixels:
    usual = usual_pixels(str(vision["model_type"]))
    found = read_pixels(folder, vision.get("image_size", 224), usual)
    if found is None:
        _log.warning(
            "note: %s says nothing of image preprocessing (preprocessor_config.json); taken is "
            "what is usual for a %s: %s", folder, vision["model_type"], usual.aspect,
        )  # fmt: skip
    pixels = found or usual
    if VIDEO in family.tokens and _others_for_frames(folder, pixels):
        _log.warning(
            "note: %s prepares frames of videos with other colours than images; here both are "
            "prepared as images", folder,
        )  # fmt: skip
    if family is ONEVISION:  # its views are squares, and its frames are squashed to one
        return pixels._replace(aspect="squash")
    # `do_pad` of one with tiles is about the number of views of several images
    return pixels._replace(aspect=usual.aspect) if family.pinpoints else pixels


def _others_for_frames(folder: Path, pixels: Pixels) -> bool:
    """Say whether a folder states another mean or spread for frames than for images."""
    table: Any = peek_json(folder / "processor_config.json").get("video_processor")
    if not isinstance(table, dict):
        table = peek_json(folder / "video_preprocessor_config.json")
    stated = (("image_mean", pixels.mean), ("image_std", pixels.std))
    return any(table.get(key) not in (None, list(colour)) for key, colour in stated)


def _projector(config: Mapping[str, Any], state: State, folder: Path) -> list[Layer]:
    """Return the projector's layers; one where it is a linear projector in disguise."""
    bias = config.get("multimodal_projector_bias") is not False
    layers = [
        Layer.of(state, name, f"multi_modal_projector.{name}", folder, bias=bias)
        for name in ("linear_1.", "linear_2.")
    ]
    first, second = layers
    if second.weight.shape[1] != first.weight.shape[0]:
        raise ModelError(
            f"{folder}: the projector's layers are {list(first.weight.shape)} and "
            f"{list(second.weight.shape)}, which do not follow on each other; copy it again"
        )
    activation = config.get("projector_hidden_act", "gelu")
    if activation == "gelu":
        halves = _halves(first, second)
        return [halves] if halves else layers
    if activation != "linear":
        raise ModelError(
            f"{folder}: `projector_hidden_act` is {activation!r}; a projector with gelu, or "
            "linear, can be read"
        )
    if _is_identity(second):
        return [] if _is_identity(first) else [first]
    # two linear layers without an activation are one;
    # multiplied in float64, so that only one rounding remains
    product = (second.weight.double() @ first.weight.double()).to(first.weight.dtype)
    shifted = second.weight.double() @ first.bias.double() + second.bias.double()
    return [Layer(product, shifted.to(first.bias.dtype))]


def _is_identity(layer: Layer) -> bool:
    rows, columns = layer.weight.shape
    eye = torch.eye(rows, dtype=layer.weight.dtype)
    return rows == columns and torch.equal(layer.weight, eye) and not layer.bias.any()


def _halves(first: Layer, second: Layer) -> Layer | None:
    """Return W of the layers [W; -W], GELU, [I, -I]; None for any other two layers.

    They are linear, because GELU(x) - GELU(-x) = x.
    """
    width, inner = second.weight.shape
    if inner != 2 * width or second.bias.any():
        return None
    eye = torch.eye(width, dtype=second.weight.dtype)
    weight, bias = first.weight[:width], first.bias[:width]
    same = (
        torch.equal(second.weight, torch.cat([eye, -eye], dim=1))
        and torch.equal(first.weight[width:], -weight)
        and torch.equal(first.bias[width:], -bias)
    )
    return Layer(weight.contiguous(), bias.contiguous()) if same else None
