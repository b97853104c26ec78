"""Language models."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_language_models() -> Mapping[str, str]:
    return {
        "vicuna": "llavakit_plugins.language.vicuna:Vicuna",
        "causal-lm": "llavakit_plugins.language.causal_lm:CausalLM",
    }
