"""Merges a LoRA adapter into the language model that it was trained on."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from llavakit import LanguageModel, ModelError
from llavakit_plugins.huggingface.hub import quietly
from llavakit_plugins.huggingface.json_files import read_json
from llavakit_plugins.huggingface.unread import being_left
from llavakit_plugins.huggingface.weights import Weights

ADAPTER = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def _file_in(folder: Path) -> Path | None:
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def refuse_others(folder: Path) -> None:
    """Raise ModelError for an adapter of transformers' LLaVA, as trl and peft leave it.

    The original adds to the language model alone, and names its layers so.
    """
    if not (folder / ADAPTER).is_file():
        return
    mapping = read_json(folder / ADAPTER).get("auto_mapping")
    model = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    path = _file_in(folder)
    keys = () if path is None else Weights.of_file(path)  # a mapping: no tensor is read for them
    if model.endswith("ForConditionalGeneration") or any(".language_model." in key for key in keys):
        raise ModelError(
            f"{folder} is an adapter of transformers' LLaVA, which is not read; merge it with peft "
            "(`merge_and_unload`), save the model with its processor, and give that folder"
        )


def merge_adapter(language: LanguageModel, folder: Path, *, shapes: bool = False) -> None:
    """Add the adapter in `folder` to the weights of `language`, with peft.

    With `shapes` the two are compared, and `language` is left with shapes alone.
    Raises ModelError where the adapter is damaged or belongs to another model.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"{folder} holds a LoRA adapter, which peft reads, and peft cannot be imported "
            f"({error!s:.300}); `pip install 'llavakit[lora]'`"
        ) from error
    path = _file_in(folder)
    if path is None:
        raise ModelError(f"{folder} lacks {_FILES[0]}; copy the whole adapter")
    table = read_json(folder / ADAPTER)
    if table.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder}: the adapter is of type {table.get('peft_type')!r}; LORA can be read"
        )
    network: Any = language
    library: Any = peft
    if (unread := being_left()) is not None:
        unread.read(language)  # what is added to must be there
    model = network.model.to("meta") if shapes else network.model
    # a key may have the adapter's name in it, which peft leaves out when it saves
    state = {
        re.sub(r"\.default\.weight$", ".weight", name): value
        for name, value in Weights.of_file(path).items()
    }
    try:
        with quietly(report=False), warnings.catch_warnings():
            # peft 0.21 reads a property that transformers 5.23 has renamed
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
            warnings.filterwarnings("ignore", "`lora_bias=True` was passed")  # an error below
            known = library.LoraConfig.from_peft_type(**table)
            # the adapter is merged and not trained, so that it needs no gradients
            known.inference_mode = True
            tuned = library.PeftModel(model, known)
            report = library.set_peft_model_state_dict(tuned, state)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the adapter in {folder} does not fit its base model ({reason}); is --base the "
            "model it was trained on?"
        ) from error
    missing = [name for name in report.missing_keys if "lora_" in name]
    # only the adapter's own keys may be missing: the base model's are never in its file
    wrong = [*missing, *report.unexpected_keys]
    if wrong:
        what = "lacks" if missing else "has"
        raise ModelError(
            f"the adapter in {folder} {what} {wrong[0]}, unlike its adapter_config.json and base "
            "model say; is --base the model it was trained on?"
        )
    for name, layer in tuned.named_modules():
        based = getattr(layer, "base_layer", None)
        if known.lora_bias and based is not None and getattr(based, "bias", None) is None:
            raise ModelError(
                f"the adapter in {folder} adds a bias to {name} (`lora_bias`), for which the base "
                "model has no place; train it without"
            )
    try:
        network.model = tuned.unload() if shapes else tuned.merge_and_unload()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"peft cannot merge the adapter in {folder} into its base model ({reason})"
        ) from error
    # peft has frozen the base model; which parts learn is decided later, by the recipe
    language.requires_grad_(True)
