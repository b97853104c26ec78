"""The key of a service: read from the environment or a file, and removed from all output."""

from __future__ import annotations

import os
from pathlib import Path

from llavakit import ChatError, hide

_SHORTEST = 8  # of what can be told from an ordinary word, and so be taken out of a text


def read_key(variable: str, file: Path | None) -> str:
    """Return the key. Raises ChatError, which names the file or variable and never the key."""
    if file is not None:
        try:
            key_file = Path(os.path.expanduser(file))
            if key_file.exists() and not key_file.is_file():
                raise OSError(None, "it is no file")  # one that a pipe stands for may never end
            key = key_file.read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ChatError(f"cannot read the key file {file}: {reason}") from None
        where = str(file)
    else:
        key, where = os.environ.get(variable, "").strip(), f"environment variable {variable}"
    if not key:
        raise ChatError(
            f"{where} holds no key; set OPENAI_API_KEY, or name another variable with `key_env` or "
            "a file with `key_file`; `keyless = true` is for services that want none"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ChatError(f"{where} holds no key: it has spaces, line ends or letters beyond ASCII")
    hide(key)
    return key


def redact(text: str, key: str) -> str:
    """Return a text without the key."""
    return text.replace(key, "[key]") if len(key) >= _SHORTEST else text
