"""Writes weights as safetensors in shards of a size, and configurations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from safetensors.torch import save_file
from torch import Tensor

from llavakit import LanguageModel

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # as the hub counts them


def _size(value: str) -> str:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]B)\s*", value, re.IGNORECASE)
    if found is None or float(found[1]) * _UNITS[found[2].upper()] < 1:
        raise ValueError("must be a number of KB, MB, GB or TB, such as `5GB`")
    return value


ShardSize = Annotated[str, AfterValidator(_size)]
"""The most that one file of weights holds, such as `5GB`; a larger tensor gets its own file."""


_WRAPPED = frozenset(
    f"{name}_vision_model"
    for name in ("clip", "siglip", "siglip2", "chinese_clip", "altclip", "metaclip_2", "clipseg")
)
"""Types whose class held its transformer as `vision_model` before transformers 5."""


def tower_state(model: Any) -> dict[str, Tensor]:
    """Return a vision model's tensors by the names that every version of transformers reads.

    Version 5 leaves `vision_model.` out; version 4 then finds none of the tensors, and leaves the
    tower as it was initialised, at random, without an error.
    """
    prefix = "vision_model." if model.config.model_type in _WRAPPED else ""
    return {
        f"{prefix}{name.removeprefix(prefix)}": tensor
        for name, tensor in model.state_dict().items()
    }


def rename_tower(model: Any, folder: Path) -> None:
    """Give the weights that transformers wrote to `folder` the names of `tower_state`."""
    file = folder / "model.safetensors"
    save_file({n: t.contiguous() for n, t in tower_state(model).items()}, file, {"format": "pt"})


def write_weights(state: Mapping[str, Tensor], folder: Path, max_shard_size: str) -> int:
    """Write `model.safetensors`, or shards with their index; return how many files."""
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(state),
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern="model{suffix}.safetensors",
        get_storage_id=lambda tensor: None,  # tensors of one mapped file are no shared tensors
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        shard = {key: state[key].detach().contiguous() for key in keys}
        save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return len(split.filename_to_tensors)


def write_config(config: Mapping[str, Any], folder: Path, language: LanguageModel) -> None:
    """Write config.json, and generation_config.json with the tokens that end an answer."""
    (folder / "config.json").write_text(_json(_for_readers(config)), encoding="utf-8")
    tokens = {"bos_token_id": language.tokenizer.bos_token_id, "eos_token_id": _ends(language)}
    known = {key: value for key, value in tokens.items() if value is not None}
    (folder / "generation_config.json").write_text(_json(known), encoding="utf-8")


def _ends(language: LanguageModel) -> int | list[int] | None:
    ends = sorted(language.end_ids)
    return ends[0] if len(ends) == 1 else ends or None


def _for_readers(value: Any) -> Any:
    """Add what transformers 4 calls the positions' base and the precision; leave paths out."""
    if not isinstance(value, Mapping):
        return value
    table = {k: _for_readers(item) for k, item in value.items() if k != "_name_or_path"}
    rope = table.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        table["rope_theta"] = rope["rope_theta"]
        kind = rope.get("rope_type", "default")
        if kind in ("linear", "dynamic"):  # these two keys and no other, up to version 4.42
            table["rope_scaling"] = {"type": kind, "factor": rope.get("factor")}
        elif kind != "default":
            table["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if "dtype" in table:
        table["torch_dtype"] = table["dtype"]
    return table


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
