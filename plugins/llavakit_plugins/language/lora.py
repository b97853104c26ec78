"""Low-rank adapters (LoRA, arXiv 2106.09685) in a language model, by peft.

The adapters lie beside the weights they change: `adapter/` in a model folder holds them in peft's
own layout, and the weights beside it are those of the base model.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from llavakit import ModelError, Options
from llavakit_plugins.huggingface.hub import quietly
from llavakit_plugins.language import four_bits

FOLDER = "adapter"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what peft puts in front of every name


class LoraOptions(Options):
    """Adapters that learn in place of the weights; the original LLaVA's are the defaults."""

    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    """Layers with an adapter, such as `q_proj`; every linear layer but the head where empty."""


def missing_peft() -> str | None:
    """Return what must be installed, or None."""
    if find_spec("peft") is not None:
        return None
    return "`lora` needs peft; install it with `pip install llavakit[lora]`"


def add_adapters(model: Any, options: LoraOptions) -> None:
    """Put adapters into transformers' model, in place; they change nothing before they learn.

    Raises ModelError where peft is not installed, or the model lacks a target.
    """
    if (reason := missing_peft()) is not None:
        raise ModelError(reason)
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)}
    unknown = sorted(set(options.targets) - linear)
    if unknown:
        raise ModelError(
            f"lora.targets: the language model has no linear layer called `{unknown[0]}`; it has "
            f"{', '.join(sorted(linear))}"
        )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules=list(options.targets) or "all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def is_adapter(name: str) -> bool:
    """Say whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def base_weights(model: Any) -> dict[str, Tensor]:
    """Return the base model's weights under the names they have without adapters."""
    state: dict[str, Tensor] = model.state_dict()
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not is_adapter(name)
    }


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters to a new folder, as peft does."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir()
    found = get_peft_model_state_dict(model)
    tensors = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / _WEIGHTS)
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def load_adapters(model: Any, folder: Path) -> None:
    """Fill a model's adapters from a folder. Raises ModelError where they are not the same."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        read = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapters in {folder} cannot be read: {error}") from error
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read.items()}
    wanted = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != wanted:
        wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise ModelError(
            f"{folder} does not hold the adapters that `lora` describes, first `{wrong[0]}`; give "
            "the rank and targets they were trained with"
        )
    set_peft_model_state_dict(model, tensors)


def merge_adapters(model: Any) -> Any:
    """Return a copy of a model with its adapters added into the weights they change.

    Weights of 4 bits become the numbers that they stand for, so that the copy computes what the
    model does. The other weights without an adapter are shared with `model`.
    """
    quantized = getattr(model, "is_quantized", False)
    if quantized:
        four_bits.unpack(model)
    bases = [layer.get_base_layer() for _, layer in _adapted(model)]
    changed = {id(base.weight) for base in bases if base.weight.is_floating_point()}
    shared = {id(p): p for p in model.parameters() if id(p) not in changed}
    whole = copy.deepcopy(model, shared)
    if quantized:
        with quietly(report=False):
            whole.dequantize(dtype=whole.get_input_embeddings().weight.dtype)
        whole._weight_conversions = None  # of reading 4 bits, which saving would want to undo
    layers = _adapted(whole)
    for name, layer in layers:
        base = layer.get_base_layer()
        base.weight.data += layer.get_delta_weight("default").to(base.weight.dtype)
        parent, _, last = name.rpartition(".")
        setattr(whole.get_submodule(parent), last, base)
    if layers:
        del whole.peft_config
    return whole


def _adapted(model: Any) -> list[tuple[str, Any]]:
    """Return the layers with an adapter, peft's, whatever their weights are held in."""
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "get_delta_weight")]
