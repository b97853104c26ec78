"""Reads checkpoints in the layout of the original LLaVA: whole, delta, projector, or LoRA adapter.

config.json               the language model's, and what LLaVA adds to it (mm_…)
model*.safetensors|bin    model.… and lm_head; model.mm_projector.…; perhaps
                          model.vision_tower.vision_tower.…
mm_projector.bin          the projector alone, and new rows of the embedding
adapter_model.*           LoRA, with adapter_config.json; what was trained besides it is in
non_lora_trainables.bin   this file
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit import ModelError, PromptTemplate, Registry
from llavakit_plugins.checkpoints.adapters import (
    ADAPTER,
    find_base,
    is_of_transformers,
    merge_adapter,
    require_lora,
)
from llavakit_plugins.checkpoints.original_delta import add_base, is_delta
from llavakit_plugins.checkpoints.original_text import (
    TOKENS,
    added_tokens,
    longest_text,
    suggested_template,
    text_table,
)
from llavakit_plugins.checkpoints.original_tower import find_tower
from llavakit_plugins.checkpoints.parts import (
    Parts,
    make_language,
    make_vision,
    set_tokenizer,
)
from llavakit_plugins.checkpoints.pinpoints import anyres_of_original
from llavakit_plugins.checkpoints.projectors import Layer
from llavakit_plugins.checkpoints.prompts import choose_template
from llavakit_plugins.checkpoints.tokenizers import has_tokenizer, read_tokenizer
from llavakit_plugins.huggingface.json_files import (
    Check,
    check,
    check_shape,
    is_count,
    is_flag,
    is_text,
    peek_json,
    read_json,
    refuse_devices,
)
from llavakit_plugins.huggingface.vocabulary import with_rows
from llavakit_plugins.huggingface.weights import Weights

PROJECTOR, BESIDE = "mm_projector.bin", "non_lora_trainables.bin"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_original(folder: Path) -> bool:
    """Return whether a folder has the original's layout, or holds part of such a model."""
    config = peek_json(folder / "config.json")
    if "vision_config" in config:
        return False
    described = {"mm_vision_tower", "mm_projector_type", "mm_hidden_size"} & config.keys()
    kind = str(config.get("model_type"))
    return bool(
        described
        or kind.startswith("llava_")
        or ((folder / ADAPTER).is_file() and not is_of_transformers(folder))
        or (folder / PROJECTOR).is_file()
    )


def read_original(
    folder: Path,
    registry: Registry,
    *,
    dtype: torch.dtype | None,
    base: Path | None,
    vision: Path | None,
    template: str | None,
    shapes: bool = False,
) -> Parts:
    """Return the parts of the model in a folder, weights in `dtype` or as they are.

    An adapter is merged, a delta added to its base; with `shapes` only the shapes are right, and
    nothing of either is computed. Raises ModelError for what is damaged, missing, or cannot be
    expressed here.
    """
    config = _config(folder)
    pieces = _Pieces.of(folder, base, dtype, shapes=shapes)
    table = text_table(config, folder)
    # a projector's or adapter's folder may have no tokenizer: then it is that of the base
    source = folder if pieces.base is None or has_tokenizer(folder) else pieces.base
    tokenizer = read_tokenizer(source, str(table["model_type"]))
    tokenizer.add_tokens(added_tokens(config), special_tokens=True)
    state = _widened(pieces, len(tokenizer), table.get("vocab_size") or 0)
    table["vocab_size"] = len(state[EMBEDDING]) if EMBEDDING in state else 0
    language_use, language = make_language(
        table,
        state,
        registry,
        folder if pieces.base is None else pieces.base,
        max_length=longest_text(config, table),
    )
    suggested = suggested_template(config, tokenizer)
    set_tokenizer(language, tokenizer, folder)
    if (folder / ADAPTER).is_file():
        merge_adapter(language, folder, shapes=shapes)
    tower = find_tower(folder, config, vision, inside=pieces.vision, dtype=dtype)
    vision_use, encoder = make_vision(
        tower.table,
        tower.state,
        registry,
        tower.where,
        layer=tower.layer,
        select=tower.select,
        pixels=tower.pixels,
    )
    chosen = choose_template(template, config, tokenizer, registry, folder, suggested)
    options = registry.get(PromptTemplate, chosen.use).Options.model_fields
    if config.get("mm_use_im_start_end") and "image" in options:
        around = f"{TOKENS[0]}<image>{TOKENS[1]}"
        chosen = chosen.model_validate({"use": chosen.use, "image": around, **chosen.options})
    tiling = anyres_of_original(config, encoder, folder, language.max_length)
    newline_E = pieces.newline.get("image_newline")
    separates = tiling is not None and tiling.options.get("newline", True)
    if separates and newline_E is None:
        raise ModelError(f"{folder} lacks image_newline; copy the whole checkpoint")
    return Parts(
        encoder,
        vision_use,
        language,
        language_use,
        _projector(config, pieces.projector, folder),
        chosen,
        tiling,
        newline_E if separates else None,
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if (folder / ADAPTER).is_file():
        require_lora(folder)
    if not path.is_file():
        raise ModelError(
            f"{folder} holds no config.json: the original writes it at the end of training, and "
            "its saves in between lack it; copy that of the finished model into the folder"
        )
    refuse_devices(folder)
    config = read_json(path)
    check_shape(config, path)
    check(config, path, _CHECKS)
    if config.get("s2"):
        raise ModelError(
            f"{folder}: the model reads images at several scales (s2 in config.json); models of "
            "the shapes of LLaVA-1.5 and LLaVA-NeXT can be read"
        )
    return config


_CHECKS: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(("mm_use_im_start_end", "mm_use_im_patch_token"), (is_flag, "true or false")),
    "mm_projector_type": (is_text, "a name"),
    "mm_hidden_size": (is_count, "a whole number above 0"),
    "tokenizer_model_max_length": (
        lambda value: isinstance(value, int | float) and value >= 2, "a number of tokens"
    ),
}  # fmt: skip


# -- tensors ---------------------------------------------------------------------------------------


@dataclass
class _Pieces:
    """The tensors of a checkpoint by what they belong to, by the names used there."""

    base: Path | None
    dtype: torch.dtype | None = None
    language: dict[str, Tensor] = field(default_factory=dict)
    projector: dict[str, Tensor] = field(default_factory=dict)
    vision: dict[str, Tensor] = field(default_factory=dict)
    newline: dict[str, Tensor] = field(default_factory=dict)
    """`image_newline`, the learned row of LLaVA-NeXT."""
    rows: Tensor | None = None
    """Embeddings of the newest tokens, or of all."""

    @classmethod
    def of(
        cls, folder: Path, base: Path | None, dtype: torch.dtype | None, *, shapes: bool
    ) -> _Pieces:
        whole = Weights.within(folder, dtype)
        adapter = (folder / ADAPTER).is_file()
        if whole is not None and not adapter:
            pieces = cls(None, dtype)
            pieces._sort(whole)
            pieces._complete(folder, base, shapes=shapes)
        else:
            what = "LoRA adapter" if adapter else "projector"
            pieces = cls(find_base(folder, base, what), dtype)
            assert pieces.base is not None
            found = Weights.within(pieces.base, dtype)
            if found is None:
                raise ModelError(
                    f"{pieces.base} holds no weights; give the folder of the language model that "
                    f"the {what} in {folder} was trained with"
                )
            pieces._sort(found)
        if adapter:
            pieces._override(folder / BESIDE)
        elif (folder / PROJECTOR).is_file() and (whole is None or not pieces.projector):
            pieces._override(folder / PROJECTOR)
        return pieces

    def _complete(self, folder: Path, base: Path | None, *, shapes: bool) -> None:
        """Add the base where the weights are a delta; whole ones need none."""
        if not is_delta(self.language):
            if base is not None:
                raise ModelError(
                    f"{folder} holds a whole model, which needs no `base`; leave it out"
                )
            return
        if base is None:
            raise ModelError(
                f"{folder} holds a delta, what LLaVA's weights add to a LLaMA's; give the folder "
                "of that LLaMA, in Hugging Face's layout, as --base DIR"
            )
        # read again without a dtype:
        # a difference that is rounded first would not give the exact sum
        exact = _Pieces(base)
        weights = Weights.within(folder)
        assert weights is not None
        exact._sort(weights)
        self.base = base
        self.language = add_base(exact.language, base, folder, self.dtype, shapes=shapes)

    def _sort(self, weights: Mapping[str, Tensor]) -> None:
        for name in weights:
            # peft puts this in front of every name that it saves
            key = re.sub(r"^base_model\.model\.", "", name)
            part, rest = self.language, key
            if match := re.match(r"^(?:model\.)?mm_projector\.", key):
                part, rest = self.projector, key[match.end() :]
            elif match := re.match(r"^model\.vision_tower\.(?:vision_tower\.)?", key):
                part, rest = self.vision, key[match.end() :].removeprefix("vision_model.")
            elif match := re.match(r"^(?:model\.)?(?=image_newline$)", key):
                part, rest = self.newline, key[match.end() :]
            part[rest] = weights[name]

    def _override(self, path: Path) -> None:
        """Replace the base's tensors by those that were trained."""
        if not path.is_file():
            raise ModelError(
                f"{path.parent} lacks {path.name}, which holds the projector: the original writes "
                "it at the end of training, and its saves in between lack it"
            )
        trained = _Pieces(self.base)
        trained._sort(Weights.of_file(path, self.dtype))
        if path.name == PROJECTOR:
            found = [trained.language.pop(k, None) for k in (EMBEDDING, "embed_tokens.weight")]
            self.rows = next((rows for rows in found if rows is not None), None)
        if trained.projector:
            self.projector = trained.projector
        self.language |= trained.language
        self.vision |= trained.vision
        self.newline |= trained.newline


def _widened(pieces: _Pieces, tokens: int, vocabulary: int) -> dict[str, Tensor]:
    """Return the language model's tensors with a row for every token."""
    state = pieces.language
    trained = pieces.rows
    sizes = [len(state[name]) for name in (EMBEDDING, HEAD) if name in state]
    # a base knows nothing of tokens that were added later; a whole model has its rows already
    if pieces.base is not None:
        sizes += [tokens, vocabulary]
    state = with_rows(state, (EMBEDDING, HEAD), max(sizes, default=0))
    if trained is not None and EMBEDDING in state:
        table_VE = state[EMBEDDING].clone()
        count = min(len(TOKENS), len(trained))  # of a whole table only these were trained
        if trained.shape[1:] != table_VE.shape[1:]:
            raise ModelError(
                f"{PROJECTOR} holds embeddings of width {trained.shape[-1]}, the language model "
                f"has {table_VE.shape[1]}; is --base the model it was trained with?"
            )
        end = min(tokens, len(table_VE))
        table_VE[end - count : end] = trained[-count:].to(table_VE.dtype)
        state[EMBEDDING] = table_VE
    return state


def _projector(config: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> list[Layer]:
    kind = str(config.get("mm_projector_type") or "linear")
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind == "identity":
        names: list[str] = []
    elif kind == "linear":
        names = [""]
    elif depth:
        names = [f"{2 * number}." for number in range(int(depth[1]))]  # GELU stands between
    else:
        raise ModelError(
            f"{folder}: `mm_projector_type` is `{kind}`; linear, mlp2x_gelu (any depth) and "
            "identity can be read"
        )
    layers = [Layer.of(state, name, f"mm_projector.{name}", folder) for name in names]
    unknown = state.keys() - {f"{name}{what}" for name in names for what in ("weight", "bias")}
    if unknown:
        raise ModelError(
            f"{folder} holds mm_projector.{min(unknown)}, which no projector of type `{kind}` has; "
            "is it the config.json of these weights?"
        )
    return layers
