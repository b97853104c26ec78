"""Reads the weights of a language model: once, in place, and only where all of them fit."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from llavakit import ModelError
from llavakit_plugins.huggingface import quietly
from llavakit_plugins.layouts.weights import Weights

if TYPE_CHECKING:
    from llavakit_plugins.language.pretrained import LanguageOptions

_NAMED = 4  # weights that an error lists
NF4_BYTES = 4.127 / 8  # a weight's: 4 bits, and its share of the scales, which are quantized too


def read_weights(network: type[Any], config: Any, options: LanguageOptions) -> Any:
    """Return transformers' model in `options.source`, a folder or a name on the hub.

    The weights go from the files into an empty model one by one, so that there is one copy of
    each. Raises ModelError where weights are missing, left over or of another shape.
    """
    assert options.source is not None
    source = options.source
    how: dict[str, Any] = {}
    if options.device is not None:
        how["device_map"] = {"": options.device}
    if options.quantize is not None:
        how |= _quantized(options)
    weights = None if options.quantize is not None else _of_folder(options)
    if weights is None:
        how |= {"pretrained_model_name_or_path": source, "revision": options.revision or "main"}
    else:
        how |= {"pretrained_model_name_or_path": None, "state_dict": weights}
    try:
        with quietly():
            model, found = network.from_pretrained(
                config=config,
                dtype=getattr(torch, options.dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
                **how,
            )
            if weights is not None:
                _read_ends(model, Path(source))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the weights of {source} cannot be read: {error}") from error
    wrong = {
        "lacks": found["missing_keys"],
        "has, unasked for,": found["unexpected_keys"],
        "has, in another shape,": [
            f"{name} {list(there)} for {list(wanted)}"
            for name, there, wanted in found["mismatched_keys"]
        ],
    }
    complaints = [f"{what} {_list(names)}" for what, names in wrong.items() if names]
    if complaints or found["error_msgs"]:
        raise ModelError(
            f"{source} does not hold the weights of a {network.__name__} with its config.json: it "
            f"{'; it '.join([*complaints, *found['error_msgs']])}. Fetch the model again, or give "
            "what its shape really is as `config`"
        )
    return model


def _of_folder(options: LanguageOptions) -> Weights | None:
    """Return the weights in a folder; None where the source is none, or has none.

    transformers would keep the folder's files mapped until the last weight is turned to `dtype`:
    in the end there were two copies in memory.
    """
    assert options.source is not None
    folder = Path(options.source)
    return Weights.within(folder, getattr(torch, options.dtype)) if folder.is_dir() else None


def _read_ends(model: Any, folder: Path) -> None:
    """Read generation_config.json, as transformers does with weights that it finds by itself."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def cannot_quantize() -> str | None:
    """Return why weights of 4 bits cannot be had on this machine, or None."""
    if not torch.cuda.is_available():
        return (
            '`quantize = "nf4"` needs a CUDA device, and this machine has none; leave it out to '
            "hold the weights in `dtype`"
        )
    if find_spec("bitsandbytes") is None:
        return '`quantize = "nf4"` needs bitsandbytes; install it with `pip install bitsandbytes`'
    return None


def _quantized(options: LanguageOptions) -> dict[str, Any]:
    """Return transformers' options for 4-bit weights, as QLoRA (arXiv 2305.14314) has them."""
    if (reason := cannot_quantize()) is not None:
        raise ModelError(reason)
    from transformers import BitsAndBytesConfig

    return {
        "device_map": {"": options.device or "cuda"},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, options.dtype),
        ),
    }


def _list(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
