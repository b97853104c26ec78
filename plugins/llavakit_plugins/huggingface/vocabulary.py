"""Adds rows to a vocabulary that a layout needs and a language model lacks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llavakit import ModelError
from llavakit.contracts.data import IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("llavakit")
_MULTIPLE = 64  # of rows: transformers' own conversion pads the vocabulary to it


def with_tokens(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], rows: int
) -> tuple[PreTrainedTokenizerBase, dict[str, int], int]:
    """Return a tokenizer that knows these (`<image>`), their ids, and how many rows the vocabulary
    needs."""
    from tokenizers import AddedToken

    tokenizer = deepcopy(tokenizer)
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if tokenizer.pad_token is None:  # batches are padded with it, and it is masked
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    numbers: Any = tokenizer.convert_tokens_to_ids(list(names))
    last = max(numbers)
    needed = rows if last < rows else -(-(last + 1) // _MULTIPLE) * _MULTIPLE
    return tokenizer, dict(zip(names, numbers, strict=True)), needed


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, where: object) -> None:
    """Remove tokens that have no row in the model's embedding, if no text needs them.

    These are the padding token, which the first LLaVAs have in the tokenizer but not in the
    weights, and `<image>` and `<video>`, which stand for rows of theirs. Raises ModelError, which
    begins with `where`, for any other token without a row.
    """
    from tokenizers import Tokenizer

    # not the number of tokens: a vocabulary may have gaps
    count = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if count <= rows:
        return
    added = tokenizer.added_tokens_decoder
    more = {number: str(added.get(number, "")) for number in range(rows, count)}
    allowed = {IMAGE, "<video>", tokenizer.pad_token, *_PADS}
    allowed -= {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    others = [token for token in more.values() if token not in allowed]
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if others or backend is None:
        raise ModelError(
            f"{where}: the tokenizer has {count} tokens, the language model {rows}; take the "
            "tokenizer that belongs to these weights"
        )
    table = json.loads(backend.to_str())
    table["added_tokens"] = [token for token in table["added_tokens"] if token["id"] < rows]
    holder: Any = tokenizer
    holder._tokenizer = Tokenizer.from_str(json.dumps(table))
    if tokenizer.pad_token in more.values():
        holder.pad_token = None
    extra = getattr(tokenizer, "extra_special_tokens", None)
    if isinstance(extra, list):
        holder.extra_special_tokens = [token for token in extra if str(token) not in more.values()]
    _log.warning(
        "note: %s: the tokenizer has %s, and the language model no row for it; it is never "
        "written, so it is left out", where, " and ".join(f"`{token}`" for token in more.values()),
    )  # fmt: skip


_PADS = ("[PAD]", "<pad>", "<PAD>", "<|pad|>")


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
