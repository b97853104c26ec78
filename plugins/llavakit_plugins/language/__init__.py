"""Language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavakit import hookimpl

if TYPE_CHECKING:
    from llavakit import LanguageModel


@hookimpl
def llava_language_models() -> list[type[LanguageModel]]:
    from llavakit_plugins.language.causal_lm import CausalLM
    from llavakit_plugins.language.vicuna import Vicuna

    return [Vicuna, CausalLM]
