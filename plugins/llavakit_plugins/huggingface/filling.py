"""Loads tensors into a transformers model by name; no tensor is in memory twice."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llavakit import ModelError, and_more
from llavakit_plugins.huggingface.hub import explain_config, quietly
from llavakit_plugins.huggingface.unread import being_left

_log = logging.getLogger("llavakit")
_RECOMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Tensors that older versions of transformers saved."""
_NAMED = 4  # tensors that an error lists
_AT_MOST = 2  # times what the files hold: a network that is larger is not even made


def needed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without those that every version of transformers computes itself."""
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

    A tensor with the right `dtype` is used without a copy, and within `leave_unread` none is read.
    `how` are further options of transformers' `from_pretrained`. Raises ModelError, which begins
    with `where`, for tensors that are missing, unused or of another shape.
    """
    state = needed(state)
    _refuse_another_size(network, config, state, where)
    unread = being_left()
    if unread is not None and not how:
        stand_ins = {name: unread.stand_in(tensor, dtype) for name, tensor in state.items()}
        model = _filled(network, config, stand_ins, where, dtype=dtype)
        if unread.stands_for(model) and not _lost_tie(model):
            return model
        _log.info("%s: not all weights are tensors of its files: they are read whole", where)
    return _filled(network, config, state, where, dtype=dtype, **how)


def _filled(
    network: type[Any],
    config: Any,
    state: Mapping[str, Tensor],
    where: object,
    **how: Any,
) -> Any:
    with quietly(report=False):
        model, found = network.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
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
    if any(wrong.values()) or found["error_msgs"]:
        raise _misfit(network, where, wrong, found["error_msgs"])
    return model


def _lost_tie(model: Any) -> bool:
    """Return whether head and embedding, both in the files, were not compared: they are unread."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    head = model.get_output_embeddings() if tied else None
    return head is not None and head.weight is not model.get_input_embeddings().weight


def _refuse_another_size(
    network: type[Any], config: Any, state: Mapping[str, Tensor], where: object
) -> None:
    """Raise ModelError if the network is far larger than its weights.

    transformers creates missing tensors. A config.json without its fields describes a model of
    billions of parameters, which would fill the memory before any error.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > len(state):  # so many that even their names would fill it
        raise _misfit(network, where, {}, [f"it has {len(state)} tensors for {layers:,} layers"])
    with torch.device("meta"), quietly(report=False), explain_config(network.__name__):
        expected = dict(network(config).named_parameters())
    count = sum(parameter.numel() for parameter in expected.values())
    if count <= _AT_MOST * sum(tensor.numel() for tensor in state.values()):
        return
    both = expected.keys() & state.keys()
    wrong = {
        "lacks": expected.keys() - both,
        "has, in another shape,": [
            f"{name} {list(state[name].shape)} for {list(expected[name].shape)}"
            for name in both
            if state[name].shape != expected[name].shape
        ],
    }
    raise _misfit(network, where, wrong, [f"{count:,} parameters are asked for"])


def _misfit(
    network: type[Any],
    where: object,
    wrong: Mapping[str, Collection[str]],
    others: Sequence[str],
) -> ModelError:
    named = {what: and_more(sorted(names), _NAMED) for what, names in wrong.items() if names}
    complaints = [f"it {what} {names}" for what, names in named.items()]
    return ModelError(
        f"{where} does not hold the weights of a {network.__name__} with its config.json: "
        f"{'; '.join([*complaints, *others])}. Fetch the model again, or give its real shape"
    )
