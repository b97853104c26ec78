"""The built-in chat models, which write instruction data and judge answers."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_chat_models() -> Mapping[str, str]:
    return {
        "openai": "llavakit_plugins.chat_models.openai:OpenAI",
        "replay": "llavakit_plugins.chat_models.replay:Replay",
    }
