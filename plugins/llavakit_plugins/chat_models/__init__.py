"""Chat models."""

from __future__ import annotations

from llavakit import ChatModel, hookimpl


@hookimpl
def llava_chat_models() -> list[type[ChatModel]]:
    return []
