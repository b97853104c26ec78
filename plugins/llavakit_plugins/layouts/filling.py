"""Puts tensors into a model of transformers', each into its place and none twice in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from llavakit import ModelError
from llavakit_plugins.huggingface import quietly

_RECOMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Tensors that older versions of transformers saved."""
_NAMED = 4  # tensors that an error lists


def needed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without those that any version of transformers computes by itself."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(_RECOMPUTED)}


def fill(
    network: type[Any],
    config: Any,
    state: Mapping[str, Tensor],
    where: object,
    *,
    dtype: torch.dtype,
    **how: Any,
) -> Any:
    """Return a model of class `network`, made of `config`, that holds the tensors in `state`.

    A tensor that has `dtype` already is taken as it is, not copied. `how` are further options of
    transformers' `from_pretrained`. Raises ModelError, which begins with `where`, for tensors that
    are missing, left over or of another shape.
    """
    with quietly(report=False):
        model, found = network.from_pretrained(
            None,
            config=config,
            state_dict=needed(state),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **how,
        )
    wrong = {
        "lacks": found["missing_keys"],
        "has, unasked for,": found["unexpected_keys"],
        "has, in another shape,": [
            f"{name} {list(there)} for {list(wanted)}"
            for name, there, wanted in found["mismatched_keys"]
        ],
    }
    complaints = [f"it {what} {_list(names)}" for what, names in wrong.items() if names]
    if complaints := [*complaints, *found["error_msgs"]]:
        raise ModelError(
            f"{where} does not hold the weights of a {network.__name__} with its config.json: "
            f"{'; '.join(complaints)}. Fetch the model again, or give its real shape"
        )
    return model


def _list(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
