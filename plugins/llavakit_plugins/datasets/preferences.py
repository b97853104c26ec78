"""Rows with a chosen and a rejected answer become rows of a conversation that ends in the chosen
one, and the text of the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llavakit import DataError
from llavakit.contracts.data import IMAGE

KEYS = ("prompt", "chosen", "rejected")
_ANSWERS = ("gpt", "assistant")

Row = Mapping[str, Any]
RowsOf = Callable[[object], object]


def is_preference(row: Row) -> bool:
    """Say whether a row has two answers to one question."""
    return "chosen" in row or "rejected" in row


def as_conversation(row: Row, where: str, rows_of: RowsOf) -> tuple[Row, str, str]:
    """Return a row without the keys of preferences, the text of the rejected answer, and what an
    error calls the conversation: the keys that it stands behind.

    Answers stand behind `conversations` (LLaVA's form), `messages` or `prompt` (a text, or
    messages, as in trl), as texts, turns or a list of one message; or each with all that was said
    before. `rows_of` turns what tables have in place of a list into one. Raises DataError.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise DataError(f"{where} has no `{name}`; a preference is `chosen` and `rejected`")
    plain = {key: value for key, value in row.items() if key not in KEYS}
    chosen, rejected = (rows_of(row[name]) for name in ("chosen", "rejected"))
    prompt = rows_of(row.get("prompt"))
    before = [key for key in ("conversations", "messages", "prompt") if row.get(key) is not None]
    if len(before) > 1:
        raise DataError(f"{where} has `{before[0]}` and `{before[1]}`; keep one of them")
    said = f"`{before[0]}`" if before else "`chosen` and `rejected`"
    if not before:
        prompt, chosen, rejected = _common(chosen, rejected, where)
    chosen_text, rejected_text = (
        _answer(answer, name, where)
        for answer, name in ((chosen, "chosen"), (rejected, "rejected"))
    )
    if "conversations" in before:
        turns = rows_of(row["conversations"])
        turns = _after(turns, _turn("gpt", chosen_text))
        return {**plain, "conversations": turns}, rejected_text, said
    if isinstance(prompt, str):
        named = row.get("images") if row.get("images") is not None else row.get("image")
        images = len(named) if isinstance(named, list) else int(named is not None)
        marks = f"{IMAGE}\n" * (images if IMAGE not in prompt else 0)
        turns = [_turn("human", marks + prompt), _turn("gpt", chosen_text)]
        return {**plain, "conversations": turns}, rejected_text, said
    messages = rows_of(row["messages"]) if "messages" in before else prompt
    last = {"role": "assistant", "content": chosen_text}
    return {**plain, "messages": _after(messages, last)}, rejected_text, said


def _after(turns: object, last: Row) -> object:
    # what is no list is refused by the reader of conversations
    return [*turns, last] if isinstance(turns, list) else turns


def _turn(role: str, text: str) -> Row:
    return {"from": role, "value": text}


def _common(chosen: object, rejected: object, where: str) -> tuple[object, object, object]:
    """Return what two whole conversations share, and the last message of each."""
    whole = isinstance(chosen, list) and isinstance(rejected, list)
    if not whole or len(chosen) < 2 or chosen[:-1] != rejected[:-1]:  # type: ignore[arg-type,index]
        raise DataError(
            f"{where}: `chosen` and `rejected` answer no common question; give `conversations` or "
            "`prompt`, or two lists of messages that differ in the last one alone"
        )
    assert isinstance(chosen, list)
    assert isinstance(rejected, list)
    return chosen[:-1], chosen[-1:], rejected[-1:]


def _answer(answer: object, name: str, where: str) -> str:
    """Return the text of an answer: a text, a turn or message, or a list of one."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, Mapping):
        role = answer.get("role", answer.get("from"))
        content = answer.get("content", answer.get("value"))
        if role not in _ANSWERS:
            raise DataError(f"{where}: `{name}` is from {role!r:.40}; it is one answer (assistant)")
        if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
            texts = [part.get("text") for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        answer = content
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(
            f"{where}: `{name}` is one answer, a text or a message that holds one, got "
            f"{answer!r:.60}"
        )
    return answer
