"""Reads the weights of a language model: once, in place, and only where all of them fit."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from llavakit import ModelError
from llavakit_plugins.huggingface import quietly

if TYPE_CHECKING:
    from llavakit_plugins.language.pretrained import LanguageOptions

_NAMED = 4  # weights that an error lists


def read_weights(network: type[Any], config: Any, options: LanguageOptions) -> Any:
    """Return transformers' model in `options.source`, a folder or a name on the hub.

    The weights go from the files into an empty model one by one, so that there is one copy of
    each. Raises ModelError where weights are missing, left over or of another shape.
    """
    source = options.source
    placed = {} if options.device is None else {"device_map": {"": options.device}}
    try:
        with quietly():
            model, found = network.from_pretrained(
                source,
                config=config,
                revision=options.revision or "main",
                dtype=getattr(torch, options.dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
                **placed,
            )
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


def _list(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
