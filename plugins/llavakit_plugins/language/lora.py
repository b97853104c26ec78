"""Low-rank adapters (LoRA, arXiv 2106.09685) in a language model, made by peft.

A model folder keeps them apart: `adapter/` holds them in peft's own layout, and the weights beside
it are those of the base model, unchanged.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llavakit import ModelError
from llavakit_plugins.huggingface.hub import quietly
from llavakit_plugins.huggingface.json_files import read_json
from llavakit_plugins.language import four_bits
from llavakit_plugins.language.options import LoraOptions as LoraOptions, is_adapter as is_adapter

FOLDER = "adapter"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's prefix of every tensor name in a file


def missing_peft() -> str | None:
    """Return what must be installed, or None."""
    if find_spec("peft") is not None:
        return None
    return "`lora` needs peft; install it with `pip install 'llavakit[lora]'`"


def add_adapters(model: Any, options: LoraOptions) -> None:
    """Insert adapters into a transformers model, in place. New adapters do not change its output.

    Raises ModelError if peft is not installed, if the model lacks a target, or if one is its head.
    """
    if (reason := missing_peft()) is not None:
        raise ModelError(reason)
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()
    layers = [(name.rpartition(".")[2], m) for name, m in model.named_modules() if _is_linear(m)]
    linear = {name for name, layer in layers if layer is not head}
    unknown = sorted(set(options.targets) - linear)
    if unknown and any(name == unknown[0] for name, _ in layers):
        raise ModelError(
            f"lora.targets: `{unknown[0]}` is the head, which the loss multiplies by without "
            "calling it, so an adapter there would not learn; leave it out"
        )
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
    # not get_peft_model: its wrapper would change the model's class and the names of its weights
    inject_adapter_in_model(config, model)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def base_weights(model: Any) -> dict[str, Tensor]:
    """Return the base model's weights, by the names that they have without adapters."""
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
    """Load a model's adapters from a folder.

    Raises ModelError if the file cannot be read, or if names or shapes differ from the model's.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        read = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapters in {folder} cannot be read: {error}") from error
    _check_scale(model.peft_config["default"], folder)
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


def _check_scale(made: Any, folder: Path) -> None:
    """Raise ModelError where adapters count for more or less than `lora` says."""
    stated = read_json(folder / "adapter_config.json")
    for key in ("lora_alpha", "alpha_pattern", "use_rslora"):
        own = getattr(made, key)
        if (value := stated.get(key) or type(own)()) != own:
            raise ModelError(
                f"{folder} was trained with `{key}` {value!r:.80}, and `lora` of this model makes "
                f"it {own!r:.80}; merge the adapters with peft, or put back what was there"
            )


def merge_adapters(model: Any) -> Any:
    """Return a copy of a model in which the adapters are added to the weights.

    4-bit weights are dequantised, so that the copy computes what the model computes. Weights
    without an adapter are shared with `model`, not copied.
    """
    quantized = getattr(model, "is_quantized", False)
    if quantized:
        four_bits.unpack(model)
    bases = [layer.get_base_layer() for _, layer in _adapted(model)]
    changed = {id(base.weight) for base in bases if base.weight.is_floating_point()}
    # deepcopy's memo: what it lists counts as copied already, so it is shared
    shared = {id(p): p for p in model.parameters() if id(p) not in changed}
    whole = copy.deepcopy(model, shared)
    if quantized:
        with quietly(report=False):
            whole.dequantize(dtype=whole.get_input_embeddings().weight.dtype)
        # transformers keeps how it converted weights to 4 bits, and would undo that on saving
        whole._weight_conversions = None
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
    """Return peft's layers with an adapter, by name; their base may be of any type, also 4-bit."""
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "get_delta_weight")]
