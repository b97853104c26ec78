"""Chat models: who writes instruction data, and who judges answers."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_chat_models() -> Mapping[str, str]:
    return {
        "openai": "llavakit_plugins.chat_models.openai:OpenAI",
        "replay": "llavakit_plugins.chat_models.replay:Replay",
    }
