"""A language model with tokens of its own, which answers may hold and templates may write."""

from __future__ import annotations

from typing import Any, Self

from llavakit_plugins.language.vicuna import Vicuna

TOKENS = ("<point>", "</point>")


class Pointing(Vicuna):
    """Vicuna, whose tokenizer and table have two more entries."""

    name = "pointing"

    @classmethod
    def create(cls, options: Any, **context: Any) -> Self:
        made = super().create(options, **context)
        made.tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
        made.model.resize_token_embeddings(len(made.tokenizer), mean_resizing=False)
        return made
