"""Maps the tensor names of a language model's family to those of LLaVA's layouts, and back.

transformers' LLaVA calls every decoder `model`, and its own head `lm_head`. That head has no bias,
and no factor or cap on its logits, which some families have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def family_names(state: Mapping[str, Tensor], network: Any, config: Any) -> Mapping[str, Tensor]:
    """Return LLaVA's tensors by the names that a family's own class has for them."""
    if getattr(config, "num_hidden_layers", 0) > len(state):  # too many even to be named
        return state
    # shapes and names only: no memory is taken, however large the model is
    with torch.device("meta"):
        made = network(config)
    head = made.get_output_embeddings()
    name = _name_in(made, head)
    own = {"model.": f"{network.base_model_prefix}.", "lm_head.": f"{name}."}
    named = {_renamed(key, own): tensor for key, tensor in state.items()}
    weight = named.get(f"{name}.weight")
    if getattr(head, "bias", None) is not None and weight is not None:
        # LLaVA's layouts have no bias of the head; zeros leave the logits as they are
        named.setdefault(f"{name}.bias", weight.new_zeros(weight.shape[:1]))
    return named


def layout_names(model: Any) -> dict[str, Tensor]:
    """Return the tensors of a family's own class by LLaVA's names.

    A head that is tied to the embedding is left out, and so is a bias of zeros.
    """
    head = _name_in(model, model.get_output_embeddings())
    own = {f"{model.base_model_prefix}.": "model.", f"{head}.": "lm_head."}
    state = {_renamed(key, own): tensor for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if "lm_head.bias" in state and not state["lm_head.bias"].any():
        del state["lm_head.bias"]
    return state


def embedding_name(model: Any) -> str:
    """Return what `layout_names` calls the table of embeddings."""
    name = _name_in(model, model.get_input_embeddings())
    return f"model.{name.removeprefix(f'{model.base_model_prefix}.')}.weight"


def scaled_logits(config: Any) -> str | None:
    """Return which factor or cap a family has on its logits, if any."""
    return next((n for n in _LOGITS if getattr(config, n, None) not in (None, 1.0)), None)


_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def _renamed(key: str, prefixes: Mapping[str, str]) -> str:
    found = ((old, new) for old, new in prefixes.items() if key.startswith(old))
    old, new = next(found, ("", ""))
    return new + key.removeprefix(old)


def _name_in(model: Any, module: Any) -> str:
    return next((name for name, own in model.named_modules() if own is module), "lm_head")
