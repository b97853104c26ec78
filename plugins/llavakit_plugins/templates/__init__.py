"""Prompt templates."""

from __future__ import annotations

from llavakit import PromptTemplate, hookimpl


@hookimpl
def llava_prompt_templates() -> list[type[PromptTemplate]]:
    from llavakit_plugins.templates.builtin import BUILTIN
    from llavakit_plugins.templates.chat import ChatTemplate

    return [*BUILTIN.values(), ChatTemplate]
