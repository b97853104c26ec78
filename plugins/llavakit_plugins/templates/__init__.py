"""The built-in prompt templates, by name."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_prompt_templates() -> Mapping[str, str]:
    from llavakit_plugins.templates.formats import NAMES

    builtin = "llavakit_plugins.templates.builtin:TEMPLATES"
    chat = "llavakit_plugins.templates.chat:ChatTemplate"
    return {**{name: f"{builtin}.{name}" for name in NAMES}, "chat-template": chat}
