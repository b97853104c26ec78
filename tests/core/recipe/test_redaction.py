"""What may be shown: no key, no password, and nothing that drives a terminal."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from llavakit.cli import main
from llavakit.engine.events import EventLog
from llavakit.engine.progress import say
from llavakit.recipe.files import printable_json
from llavakit.recipe.redaction import (
    HIDDEN,
    hide,
    printable,
    redact,
    redacted,
    shown,
)
from llavakit_plugins.reporting.markdown import code, escape

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SECRET = "s3cret-of-no-usual-form"


@pytest.fixture(autouse=True)
def _no_other_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests of this process have hidden is hidden in all that it shows."""
    monkeypatch.setattr("llavakit.recipe.redaction._known", set())


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{SECRET}@host/v1", f"https://{SECRET}@host:8000/v1", f"ftp://me:a/{SECRET}@host",
        f"https://a@{SECRET}@host/v1", f"https://host/v1?api_key={SECRET}&x=1",
        f"https://host/v1?x=1&signature={SECRET}", f"https://host/v1#{SECRET}",
        "https://host/a1b2c3d4e5f6a7b8c9d0e1f2/v1", f'api_key = "{SECRET}"', f"token='{SECRET}'",
        f"--set a.b.api_key={SECRET}", f'{{"password": "{SECRET}"}}', f"Bearer {SECRET}",
        f"LLAVA_STEPS__1__TOKEN={SECRET}", "sk-proj-abcdefgh0123456789", "hf_abcdefghijklmnopqrst",
        "gsk_abcdefghij0123456789", "AIzaSyA-0123456789abcdefghijklmnopqrs", "AKIA0123456789ABCDEF",
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl", "2Jsk-proj-abcdefgh0123456789",
        "\x1b[2Jsk-live-abcdefgh0123", "\x1b[Hsk-live-abcdefgh0123", r"\nhf_abcdefghijklmnopqrst",
        r"\u001b[2Jsk-live-abcdefgh0123", "%0Ask-live-abcdefgh0123", "Xsk-proj-abcdefgh0123456789",
        "my_gsk_abcdefghij0123456789", f"https:/me:{SECRET}@host/m", f"s3:/{SECRET}@bucket/m",
    ],
)  # fmt: skip
def test_a_secret_is_not_shown(text: str) -> None:
    found = redact(f"cannot read {text}; try again")
    assert SECRET not in found
    assert HIDDEN in found
    assert found.startswith("cannot read ")
    assert found.endswith(" try again")
    assert redact(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens = 512", 'key_file = "keys/openai"', 'key_env = "OPENAI_API_KEY"',
        "http://localhost:8000/v1/models/gpt-4o-2024-08-06", "data/sk-learn-digits-2017/train.json",
        "the key in environment variable OPENAI_API_KEY", "a@b.org", "http://host:8000/a@b",
        "tokens: 12 of 300", "no key: it is empty", "https://host/v1?page=2&all=1",
        "ask-me-anything-2024", "task-2024-evaluation-of-models-7b", "asterisk-2024-11-27-1234567",
        "risk-llava15finetuning", "layer8_attention_output_weight", "monkey-island-2-special",
        "disk-12345678-1234-1234-1234-123456789abc", "task-0123456789abcdef0123456789abcdef",
        "keyJoiners.transform.x1", "a task-123456789012345678", "http:/localhost:8000/a@b",
        "file:/tmp/a@b/c", "C:/Users/a1b2c3d4e5f6a7b8c9d0e1f2/x",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_shown_as_it_is(text: str) -> None:
    assert shown(text) == text


def test_a_secret_that_was_read_is_hidden_from_then_on() -> None:
    secret = "Quite-An-Ordinary-Looking-One"
    assert redact(f"a {secret} b") == f"a {secret} b"
    hide(secret)
    assert redact(f"a {secret} b") == f"a {HIDDEN} b"
    hide("short")
    assert redact("in short") == "in short"


def test_tables_keep_everything_but_secrets() -> None:
    table = {
        "api_key": SECRET, "wandb_api_key": "x", "max_tokens": 5, "key": "image", "empty": "",
        "nested": [{"auth_token": "x", "stop_token": "</s>"}, ("a", None)], "password": "",
        "url": f"https://me:{SECRET}@host/v1",
    }  # fmt: skip
    assert redacted(table) == {
        "api_key": HIDDEN, "wandb_api_key": HIDDEN, "max_tokens": 5, "key": "image", "empty": "",
        "nested": [{"auth_token": HIDDEN, "stop_token": "</s>"}, ["a", None]], "password": "",
        "url": f"https://{HIDDEN}@host/v1",
    }  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=80))
def test_any_text_can_be_shown(text: str) -> None:
    assert not CONTROL.search(shown(text))
    assert not CONTROL.search(escape(text))
    assert not CONTROL.search(code(text))
    if not CONTROL.search(text):
        assert printable(text) == text


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.text(st.characters(), max_size=30), max_size=4))
def test_json_means_the_same_without_control_characters(table: dict[str, str]) -> None:
    text = printable_json(json.dumps(table, ensure_ascii=False))
    assert not CONTROL.search(text)
    assert json.loads(text) == table


EVIL = f"no file a\x1b[2J\x1b]0;owned\x07\x9b1m\rb, https://me:{SECRET}@host/"


def test_errors_warnings_and_remarks_are_shown_safely(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{EVIL}.toml"]) == 2
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's: a program has none
    logging.getLogger("llavakit.some").warning("%s", EVIL)
    say(EVIL)
    said = capsys.readouterr().err
    assert said.count(r"no file a\x1b[2J\x1b]0;owned\x07\x9b1m\rb, https://[hidden]@host/") == 3
    assert not CONTROL.search(said)


def test_events_hold_no_secret_and_no_control_character(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log("said", text=EVIL, api_key=SECRET, loss=float("nan"), many=[EVIL, 1])
    log.close()
    text = (tmp_path / "events.jsonl").read_text()
    assert not CONTROL.search(text)
    assert SECRET not in text
    event = json.loads(text)
    assert event["text"].startswith("no file a\x1b[2J")
    assert (event["api_key"], event["loss"], event["many"][1]) == (HIDDEN, None, 1)
