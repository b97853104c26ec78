"""Deltas: the first releases hold only the differences between LLaVA's weights and a LLaMA's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llavakit import ModelError
from llavakit_plugins.huggingface.filling import needed
from llavakit_plugins.huggingface.weights import Weights

_NORM = "model.norm.weight"
_SMALL = 0.1
"""The last normalisation multiplies by about 1; what tuning changed of it is far smaller."""
_GROWN = ("model.embed_tokens.weight", "lm_head.weight")
"""Have more rows than the base's where tokens were added; those are no difference but whole."""


def is_delta(state: Mapping[str, Tensor]) -> bool:
    """Return whether a language model's tensors are differences; only the weights show it."""
    norm_E = state.get(_NORM)
    return norm_E is not None and bool(norm_E.float().abs().mean() < _SMALL)


def add_base(
    delta: Mapping[str, Tensor],
    base: Path,
    folder: Path,
    dtype: torch.dtype | None,
    *,
    shapes: bool = False,
) -> dict[str, Tensor]:
    """Return a delta's weights added to those in the folder `base`, in `dtype` where it is given.

    They are added in the delta's own precision, as the original's `apply_delta` does; with `shapes`
    they are compared, but not added. Raises
    ModelError, which begins with `folder`, the delta's, where the two do not fit.
    """
    found = Weights.within(base)
    if found is None:
        raise ModelError(
            f"{base} holds no weights; give the folder of the LLaMA, in Hugging Face's layout, "
            f"that {folder} is the delta to"
        )
    # two deltas added would give numbers without a meaning, and shapes would not show it
    if is_delta(found):
        raise ModelError(f"{base} holds a delta itself; give the folder of the LLaMA as --base DIR")
    whole: dict[str, Tensor] = {}
    for name, change in needed(delta).items():
        own = found.get(name)
        fits = own is not None and (
            own.shape == change.shape
            or (name in _GROWN and own.shape[1:] == change.shape[1:] and len(own) < len(change))
        )
        if own is None or not fits:
            there = "none" if own is None else list(own.shape)
            raise ModelError(
                f"{folder} is a delta whose {name} is {list(change.shape)}, and that of {base} "
                f"is {there}; give the LLaMA it was made of as --base DIR"
            )
        if shapes:
            whole[name] = change
            continue
        total = change.clone()
        total[: len(own)] += own.to(change.dtype)
        whole[name] = total if dtype is None else total.to(dtype)
    return whole
