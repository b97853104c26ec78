"""Prompt templates."""

from __future__ import annotations

from llavakit import PromptTemplate, hookimpl


@hookimpl
def llava_prompt_templates() -> list[type[PromptTemplate]]:
    return []
