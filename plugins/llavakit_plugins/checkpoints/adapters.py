"""Merges a LoRA adapter into the model that it was trained on, with peft."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llavakit import LanguageModel, ModelError
from llavakit_plugins.huggingface.hub import quietly
from llavakit_plugins.huggingface.json_files import peek_json, read_json
from llavakit_plugins.huggingface.unread import being_left
from llavakit_plugins.huggingface.weights import Weights

ADAPTER = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def _file_in(folder: Path) -> Path | None:
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def is_of_transformers(folder: Path) -> bool:
    """Return whether a folder holds an adapter of transformers' LLaVA, as trl and peft leave it.

    The original adds to the language model alone, and names its layers so.
    """
    table = peek_json(folder / ADAPTER)
    mapping, base = table.get("auto_mapping"), table.get("base_model_name_or_path")
    if isinstance(mapping, dict) and str(mapping.get("base_model_class")).endswith(_CLASS):
        return True
    if isinstance(base, str) and base and "vision_config" in peek_json(Path(base) / "config.json"):
        return True
    path = _file_in(folder) if (folder / ADAPTER).is_file() else None
    try:
        keys = () if path is None else Weights.of_file(path)  # no tensor is read for them
    except ModelError:  # said where it is read
        return False
    # the original's never add to the head; of transformers' LLaVA, one may add to nothing else
    plain = [_plain(key) for key in keys]
    return any(map(_PARTS.search, keys)) or (
        bool(plain) and all(key.startswith(".lm_head.") for key in plain)
    )


_CLASS = "ForConditionalGeneration"
_PARTS = re.compile(r"\.(language_model|multi_modal_projector|vision_tower)\.")


def find_base(folder: Path, given: Path | None, what: str, model: str = "language model") -> Path:
    """Return the folder of the `model` that the `what` in `folder` was trained with.

    Raises ModelError where it is neither given nor where the adapter says.
    """
    if given is not None:
        return given
    named = peek_json(folder / ADAPTER).get("base_model_name_or_path")
    known = ""
    if isinstance(named, str) and named:  # peft before 0.19 writes "" of a model without a name
        if Path(named).is_dir():
            return Path(named)
        known = f" (it was `{named}`)"
    raise ModelError(
        f"{folder} holds a {what} alone; give the folder of the {model} it was trained with{known} "
        "as --base DIR"
    )


def require_lora(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration. Raises ModelError for another kind than LoRA."""
    table = read_json(folder / ADAPTER)
    if table.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder}: the adapter is of type {table.get('peft_type')!r}; LORA can be read"
        )
    return table


def merge_adapter(language: LanguageModel, folder: Path, *, shapes: bool = False) -> None:
    """Add the adapter in `folder` to the weights of `language`.

    With `shapes` the two are compared, and `language` is left with shapes alone.
    Raises ModelError where the adapter is damaged or belongs to another model.
    """
    network: Any = language
    if (unread := being_left()) is not None:
        unread.read(language)  # what is added to must be there
    model = network.model.to("meta") if shapes else network.model
    network.model = _merged(model, folder, _read(folder), shapes=shapes)
    # peft has frozen the base model; which parts learn is decided later, by the recipe
    language.requires_grad_(True)


def merged_state(network: Any, folder: Path) -> Mapping[str, Tensor]:
    """Return the weights of one of transformers' LLaVAs with the adapter in `folder` added.

    On the meta device the two are compared alone. Raises ModelError as `merge_adapter` does.
    """
    adapter = _read(folder)
    rows = {len(value) for name, value in adapter.items() if _TABLE.search(name)}
    if len(rows) == 1 and rows != {len(network.get_input_embeddings().weight)}:
        network.resize_token_embeddings(*rows, mean_resizing=False)  # trained with new tokens
    merged = _merged(network, folder, adapter, shapes=next(network.parameters()).is_meta)
    state: dict[str, Tensor] = merged.state_dict()
    if merged.lm_head.weight is merged.get_input_embeddings().weight:
        del state["lm_head.weight"]
    return state


_TABLE = re.compile(r"(^|\.)(embed_tokens|lm_head)(\.base_layer)?\.weight$")


def _read(folder: Path) -> dict[str, Tensor]:
    """Return an adapter's tensors. Raises ModelError where its file is missing or damaged."""
    path = _file_in(folder)
    if path is None:
        raise ModelError(f"{folder} lacks {_FILES[0]}; copy the whole adapter")
    # a key may have the adapter's name in it, which peft leaves out when it saves
    return {
        re.sub(r"\.default\.weight$", ".weight", name): value
        for name, value in Weights.of_file(path).items()
    }


def _merged(model: Any, folder: Path, state: Mapping[str, Tensor], *, shapes: bool) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"{folder} holds a LoRA adapter, which peft reads, and peft cannot be imported "
            f"({error!s:.300}); `pip install 'llavakit[lora]'`"
        ) from error
    table = require_lora(folder)
    library: Any = peft
    try:
        with quietly(report=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is an error below
            known = library.LoraConfig.from_peft_type(**table)
            # the adapter is merged and not trained, so that it needs no gradients
            known.inference_mode = True
            tuned = library.PeftModel(model, known)
            _untie(tuned)
            own, all_of_them = (
                library.get_peft_model_state_dict(tuned, save_embedding_layers=also)
                for also in (False, True)  # the base's, which peft may save, too
            )
            names = {_plain(name): name for name in all_of_them}
            state = {names.get(_plain(name), name): value for name, value in state.items()}
            wrong = [name for name in own if name not in state]
            what = "lacks" if wrong else "has"
            if not wrong:
                wrong = library.set_peft_model_state_dict(tuned, state).unexpected_keys
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the adapter in {folder} does not fit its base model ({reason}); is --base the "
            "model it was trained on?"
        ) from error
    if wrong:
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tuned.unload() if shapes else tuned.merge_and_unload()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"peft cannot merge the adapter in {folder} into its base model ({reason})"
        ) from error


def _untie(tuned: Any) -> None:
    """Give the head weights of its own where it shares the embedding's and either has an adapter:
    what is added to one of them is not added to the other."""
    head, table = tuned.get_output_embeddings(), tuned.get_input_embeddings()
    bases = [getattr(layer, "base_layer", layer) for layer in (head, table)]
    if bases != [head, table] and bases[0].weight is bases[1].weight:
        bases[0].weight = nn.Parameter(bases[0].weight.detach().clone())


def _plain(name: str) -> str:
    """Return a tensor's name without the levels that versions of transformers add or leave out."""
    return re.sub(r"(^|\.)(base_model|model|language_model|vision_model)(?=\.)", "", name)
