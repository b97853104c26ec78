"""The precision of a part's tensors, as its checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from llavakit import ModelError
from llavakit_plugins.huggingface.filling import needed

State = Mapping[str, Tensor]
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def precision(state: State, what: str, where: object) -> torch.dtype:
    """Return the precision that holds every tensor exactly."""
    tensors = needed(state)
    if not tensors:
        raise ModelError(f"{where} lacks the weights of the {what}; copy the whole checkpoint")
    kinds = {value.dtype for value in tensors.values()}
    # a number of one byte was quantised: promoted to its neighbours', it would pass for a weight
    quantised = [kind for kind in kinds if kind.itemsize == 1 and kind != torch.bool]
    dtype = quantised[0] if quantised else reduce(torch.promote_types, kinds)
    if dtype not in DTYPES:
        raise ModelError(
            f"{where}: the {what} has weights of {dtype}; convert them to float32, float16 or "
            "bfloat16"
        )
    return dtype
