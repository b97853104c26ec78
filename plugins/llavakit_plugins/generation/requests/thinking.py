"""Removes a reasoning model's thinking from its reply, if it is certain which part that is."""

from __future__ import annotations

import re

THOUGHT = "the thinking in front or between is taken away"
UNCLEAR = "holds thinking whose begin or end is not clear"

_NAMES = "think|thinking|thought|thoughts|reasoning|reflection|scratchpad"
_MARK = re.compile(
    rf"<\s*(?P<close>/?)\s*(?:{_NAMES})\b[^<>]*>|\[(?P<close2>/?)(?:THINK|REASONING)\]|"
    r"◁(?P<close3>/?)think▷|<\|(?:(?P<begin>begin)|end)_of_thought\|>",
    re.IGNORECASE,
)


def without_thinking(text: str) -> str | None:
    """Return a reply without its thinking; None if it is not clear which part that is.

    Clear are complete `<think>…</think>` blocks, and a single `</think>` at first, whose beginning
    is part of the prompt with some models. Not clear is thinking that never ends, or that ends more
    often than it begins.
    """
    kept: list[str] = []
    depth = end = 0
    for number, mark in enumerate(_MARK.finditer(text)):
        closes = any(mark[name] for name in ("close", "close2", "close3")) or (
            mark[0].startswith("<|") and not mark["begin"]
        )
        if not closes:
            if depth == 0:
                kept.append(text[end : mark.start()])
            depth += 1
        elif depth == 0 and number == 0:
            pass  # all text before it is thinking
        elif depth == 0:
            return None
        else:
            depth -= 1
        end = mark.end()
    if depth:
        return None
    return "".join([*kept, text[end:]]).lstrip() if end else text
