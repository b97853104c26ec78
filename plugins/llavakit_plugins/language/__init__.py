"""Language models."""

from __future__ import annotations

from llavakit import LanguageModel, hookimpl


@hookimpl
def llava_language_models() -> list[type[LanguageModel]]:
    from llavakit_plugins.language.causal_lm import CausalLM
    from llavakit_plugins.language.vicuna import Vicuna

    return [Vicuna, CausalLM]
