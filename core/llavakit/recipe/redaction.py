"""What may be shown and written down: no key, no password, no character that drives a terminal.

Every error, event, report and written recipe goes through here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llavakit.recipe.files import CONTROL

HIDDEN = "[hidden]"
_SHORTEST = 12  # of a secret that can be told from an ordinary word, and so be taken out of a text
_known: set[str] = set()

_NAME = (
    r"(?:api[_-]?|access[_-]?|secret[_-]?|private[_-]?|subscription[_-]?)key|(?:client[_-]?)?secret|"
    r"(?:access|api|auth|bearer|hf|hub|refresh|security|session)[_-]?token|pass(?:word|wd)|"
    r"authorization|credentials?"
)
_SECRET_NAME = re.compile(rf"(?:.*[_-])?(?:{_NAME})", re.IGNORECASE)
_KEY = (  # as services write theirs
    r"(?:sk|pk|rk|key)-(?=[\w-]{0,200}\d)[\w-]{12,}|(?:gsk|hf|ghp|gho|ghs|github_pat|r8|fw|tgp_v1)_\w{16,}|"
    r"(?:xai|pplx|nvapi|glpat|xox[abp])-[\w-]{16,}|AIza[\w-]{30,}|AKIA[A-Z0-9]{12,}|"
    r"eyJ[\w-]{8,2000}\.[\w-]{8,}\.[\w-]+"
)
_IN_TEXT = re.compile(rf"(?<![/.-])(?:{_KEY})|(?<=Bearer )[^\s\"']{{8,}}", re.IGNORECASE)
_ESCAPE = r"(?:\\(?:[bfnrtv]|x\w\w|u\w{4})|(?:(?<!\w)\d+|(?:1b|\x1b)\[)[a-z]|%[\da-f]{2})$"
_CHANCE = re.compile(r"(?=(?:[a-z]*\d){4})(?![\da-f]+(?![^\W_]))\d*[a-z][^\W_]{15}", re.IGNORECASE)
_STATED = re.compile(  # `token = "..."` in a recipe, `key=...` behind --set, `"key": "..."` in JSON
    rf"(?<![\w-])((?:[\w-]*[_-])?(?:{_NAME}|key|token)[\"']?[ \t]*(?:=|:(?=[ \t]*[\"']))[ \t]*)"
    r"(\"(?:[^\"\\]|\\.)*\"|'[^']*'|(?!\[hidden\])[^\s\"',;}\])]+)",
    re.IGNORECASE,
)
_URL = re.compile(r"[a-z][a-z0-9+.-]{1,30}:/[^\s\"'`<>]+", re.IGNORECASE)  # one slash: in a Path
_USER = re.compile(r"(?<=:/)(/?)(?:(?:[^/?#@]*@)+|[^/?#@:]*:(?!\d+(?:[/?#]|$))[^@]*@)")
_IN_PATH = re.compile(
    rf"(?<=/)(?:{_KEY}|(?=\w*\d)(?=\w*[a-z])[a-z0-9]{{20,}})(?=[/?#]|$)", re.IGNORECASE
)
_QUERY = re.compile(
    r"(?<=[?&])((?:[\w-]*(?:key|token|secret|password|sig|signature)|code)=|(?<=\?)(?=[^=]*$))[^&#]+",
    re.IGNORECASE,
)


def hide(secret: str) -> None:
    """Take a secret, once it is read, out of everything that is shown from now on."""
    if len(secret) >= _SHORTEST:
        _known.add(secret)


def is_key(text: str) -> bool:
    """Say whether a text has the form that services give their keys."""
    return re.fullmatch(_KEY, text, re.IGNORECASE) is not None


def is_secret_name(name: str) -> bool:
    """Say whether an option of this name holds a secret, whatever it looks like."""
    return _SECRET_NAME.fullmatch(name) is not None


def redact(text: str) -> str:
    """Return a text without keys and passwords."""
    for secret in sorted(_known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, HIDDEN)
    text = _URL.sub(lambda found: _plain_url(found[0]), text)
    return _STATED.sub(_hide_stated, _IN_TEXT.sub(_hide_key, text))


def _hide_key(found: re.Match[str]) -> str:
    """Hide a key; behind a letter, as in `task-...`, what no one writes as a word."""
    before = found.string[max(0, found.start() - 9) : found.start()]
    word = before[-1:].isalnum() and not re.search(_ESCAPE, before, re.IGNORECASE)
    return found[0] if (word or before[-1:] == "_") and not _CHANCE.search(found[0]) else HIDDEN


def _hide_stated(found: re.Match[str]) -> str:
    quote = found[2][0] if found[2][0] in "\"'" else ""
    return f"{found[1]}{quote}{HIDDEN}{quote}"


def _plain_url(url: str) -> str:
    url, mark, fragment = _USER.sub(rf"\1{HIDDEN}@", url).partition("#")
    url = _QUERY.sub(rf"\1{HIDDEN}", _IN_PATH.sub(HIDDEN, url))
    return f"{url}#{HIDDEN}" if mark and fragment else url + mark


def redacted(value: Any) -> Any:
    """Return a value of tables, lists and texts without keys and passwords, else the same."""
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if item and isinstance(item, str) and is_secret_name(str(name))
            else redacted(item)
            for name, item in value.items()
        }  # fmt: skip
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def printable(text: str) -> str:
    r"""Return a text whose control characters are spelt out, `\x1b`; tabs and line ends stay."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def brief(text: str, most: int = 1000) -> str:
    """Return a text whose very long lines are cut: some value in it has no end."""
    tail = most // 4  # where the sample or the remedy is said
    return re.sub(rf"(.{{{most - tail}}}).+(.{{{tail}}})", r"\1 ... \2", text)


def shown(text: str) -> str:
    """Return a text as it may be shown on a terminal."""
    return printable(redact(text))
