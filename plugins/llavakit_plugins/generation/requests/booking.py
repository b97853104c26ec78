"""What a request costs: at most before it is sent, and by the reply that came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llavakit import ChatError, ChatModel, Message, Reply
from llavakit_plugins.generation.requests.ledger import Request


def counts_all(chat: ChatModel, messages: Sequence[Message]) -> bool:
    """Say whether a chat model knows what the images of a request count as.

    One that does has a method `counts`, which is called with messages that have some.
    """
    if not any(message.images for message in messages):
        return True
    counts = getattr(chat, "counts", None)
    return counts is not None and bool(counts(messages))


def most_of(chat: ChatModel, messages: Sequence[Message]) -> float:
    """Return the most that a request may cost, in USD. Raises ChatError where that is not known."""
    # the longest reply that is allowed: services charge by the reply that they wrote
    most = chat.price(chat.count(messages), chat.reply_limit or 0)
    stated = "`price = { input = ..., output = ... }` in USD for a million tokens"
    if most is not None and not counts_all(chat, messages):
        most, stated = None, "`image_tokens = ...`, what an image counts as"
    if most is None:
        raise ChatError(
            f"`budget_usd` is set, but no price is known for the chat model `{chat.name}`; "
            f"state {stated}"
        )
    return most


def priced(chat: ChatModel, request: Request, reply: Reply) -> Reply:
    """Return the reply with tokens and price; they are computed here if the service gave none."""
    known = True
    if reply.input_tokens is not None and reply.output_tokens is not None:
        sent, made = reply.input_tokens, reply.output_tokens
    else:
        known = counts_all(chat, request.messages)
        sent = chat.count(request.messages)
        made = chat.count([Message("assistant", reply.text)])
    usd = reply.usd if reply.usd is not None or not known else chat.price(sent, made)
    return replace(reply, input_tokens=sent, output_tokens=made, usd=usd)
