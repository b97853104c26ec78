"""Rows of the vocabulary that a layout needs and a language model does not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llavakit.contracts.data import IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MULTIPLE = 64  # of rows: transformers' own conversion pads the vocabulary to it


def with_image_token(
    tokenizer: PreTrainedTokenizerBase, rows: int
) -> tuple[PreTrainedTokenizerBase, int, int]:
    """Return a tokenizer that knows `<image>`, its id, and how many rows the vocabulary needs."""
    from tokenizers import AddedToken

    tokenizer = deepcopy(tokenizer)
    token = AddedToken(IMAGE, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    if tokenizer.pad_token is None:  # batches are padded with it, and it is masked
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    number: Any = tokenizer.convert_tokens_to_ids(IMAGE)
    needed = rows if number < rows else -(-(number + 1) // _MULTIPLE) * _MULTIPLE
    return tokenizer, number, needed


def with_rows(state: Mapping[str, Tensor], names: Sequence[str], rows: int) -> dict[str, Tensor]:
    """Return the tensors with `rows` rows in those of these names that have fewer.

    The new ones are the mean of the others: the logit of such a row is the mean logit, so that it
    is never the largest, and a greedy answer stays what it was.
    """
    wider = dict(state)
    for name in names:
        table_VE = state.get(name)
        if table_VE is not None and len(table_VE) < rows:
            mean_1E = table_VE.float().mean(dim=0, keepdim=True).to(table_VE.dtype)
            wider[name] = torch.cat([table_VE, mean_1E.expand(rows - len(table_VE), -1)])
    return wider
