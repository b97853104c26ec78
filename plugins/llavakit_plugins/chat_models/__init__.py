"""Chat models."""

from __future__ import annotations

from llavakit import ChatModel, hookimpl


@hookimpl
def llava_chat_models() -> list[type[ChatModel]]:
    from llavakit_plugins.chat_models.openai import OpenAI
    from llavakit_plugins.chat_models.replay import Replay

    return [OpenAI, Replay]
