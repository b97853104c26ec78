"""The tokenizer of a language model that may be a plan's alone, without weights. Without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit_plugins.huggingface.hub import load_tokenizer
from llavakit_plugins.language.options import LanguageOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_at_hand(language: Any) -> PreTrainedTokenizerBase | None:
    """Return a language model's tokenizer; a plan's is read where `source` is a folder with one.

    None where it is not known yet. Raises ModelError where it cannot be read.
    """
    found: PreTrainedTokenizerBase | None = getattr(language, "tokenizer", None)
    options = getattr(language, "options", None)
    if found is not None or not isinstance(options, LanguageOptions) or options.source is None:
        return found
    if not any((Path(options.source) / name).is_file() for name in _FILES):
        return None
    return load_tokenizer(options.source, options.revision, options.legacy)
