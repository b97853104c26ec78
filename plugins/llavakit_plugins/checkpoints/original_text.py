"""What config.json of an original LLaVA says of its language model, its tokens and its prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = ("<im_start>", "<im_end>")
"""What stands around an image where `mm_use_im_start_end` is true."""

_TEXT_TYPES = {
    "llava_llama": "llama",
    "llava": "llama",  # of the first releases; and of some OneVisions, which `architectures` tells
    "llama": "llama",
    "llava_mistral": "mistral",
    "mistral": "mistral",
    "llava_qwen": "qwen2",
    "qwen2": "qwen2",
}
_OURS = re.compile(
    r"mm_|(un)?freeze_mm_|tune_mm_|use_mm_|image_(aspect|grid|crop|split|token)_|tokenizer_|s2|"
    r"vision_tower|add_(faster|time)_|faster_|force_sample|frames_|(use_)?pos_skipping|"
    r"model_type$|architectures$|torch_dtype$|dtype$|transformers_version$|llavakit$|_name_or_path$"
)
"""The keys of config.json that are not the language model's own."""


def _type_of(config: Mapping[str, Any]) -> str | None:
    """Return the language model's `model_type`; None for one that cannot be read."""
    if "LlavaQwenForCausalLM" in str(config.get("architectures")):
        return "qwen2"
    return _TEXT_TYPES.get(str(config.get("model_type")))


def text_table(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the language model's own configuration.

    Raises ModelError for a kind that cannot be read.
    """
    kind = _type_of(config)
    if kind is None:
        raise ModelError(
            f"{folder}: config.json says `model_type` {config.get('model_type')!r}; of the "
            f"original LLaVA, {', '.join(sorted(_TEXT_TYPES))} can be read"
        )
    own = {key: value for key, value in config.items() if not _OURS.match(key)}
    return {"model_type": kind, **own}


def longest_text(config: Mapping[str, Any], table: Mapping[str, Any]) -> int | None:
    """Return where the original truncates, if that is before the positions end."""
    length = config.get("tokenizer_model_max_length")
    longest = table.get("max_position_embeddings")
    if not isinstance(length, int) or (isinstance(longest, int) and length >= longest):
        return None
    return length


def added_tokens(config: Mapping[str, Any]) -> list[str]:
    """Return the tokens that the original adds when it loads a model."""
    patch = ["<im_patch>"] if config.get("mm_use_im_patch_token") else []
    return [*patch, *(TOKENS if config.get("mm_use_im_start_end") else ())]


def suggested_template(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str] | None:
    """Return the prompt template that tokenizer and configuration suggest, and the reason."""
    chat = tokenizer.chat_template
    kind = _type_of(config)
    if kind == "qwen2" and isinstance(chat, str):
        return None  # they are trained and asked with the tokenizer's own
    if kind == "mistral":
        return "mistral_instruct", "the original asks its Mistral models so"
    # v0 alone was trained with a token of its own for padding; later versions pad with `<unk>`
    if "[PAD]" in tokenizer.get_added_vocab():
        return "llava_v0", "the tokenizer has the token [PAD], which training with it adds"
    if isinstance(chat, str) and "[INST]" in chat:
        return "llava_llama_2", "the tokenizer's chat template is Llama 2's"
    reason = "config.json does not say which; LLaVA-1.5 was tuned on it"
    return "vicuna_v1", reason
