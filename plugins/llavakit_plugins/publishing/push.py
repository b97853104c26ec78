"""Sends a folder to Hugging Face's hub. What was sent before is not sent again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llavakit import LlavaError, ModelError, hide

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"


def check_name(name: str) -> str:
    """Return a name on the hub, `owner/model`. Raises ValueError for what cannot be one."""
    if (
        not re.fullmatch(rf"(?:{_PART}/)?{_PART}", name, re.ASCII)
        or re.search(r"--|\.\.|\.git$", name)
        or max(map(len, name.split("/"))) > 96
    ):
        raise ValueError(
            f"`{name}` cannot be a name on the hub: write owner/model, of letters, digits, `-`, "
            "`_` and `.`"
        )
    return name


def missing_token() -> str | None:
    """Return what to do where there is no token to write with, or None."""
    from huggingface_hub import get_token

    if get_token() is not None:
        return None
    return "pushing to the hub needs a token that may write; set HF_TOKEN, or run `hf auth login`"


def send_folder(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Send all files of a folder to the hub's model `name`; return its address.

    The model is made where it is not there. Interrupted, it goes on when it is called again.
    Raises ModelError, with the reason, where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    if problem := missing_token():
        raise ModelError(problem)
    hide(get_token() or "")  # out of everything that is shown or written from now on
    api = HfApi(library_name="llavakit")
    with _explained(name):
        address = api.create_repo(name, private=private, exist_ok=True)
        # the client sends large files by their hash,
        # and asks first which of them the hub has already
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    return str(address)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except LlavaError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = {
            401: "the token is not known there; log in again (`hf auth login`)",
            403: f"the token may not write to {name}; use one that may, or another name",
            404: "there is no such owner, or the token may not see it",
        }.get(status or 0, "push again: what was sent is not sent again")
        reason = " ".join(str(error).split())
        raise ModelError(f"the hub refused to take {name} ({reason:.300}); {remedy}") from error
    except Exception as error:  # no connection, in whichever library's words: httpx has its own
        raise ModelError(
            f"{name} could not be sent ({' '.join(str(error).split()):.300}); push again: what was "
            "sent is not sent again"
        ) from error
