"""The chat models against a real HTTP server: what it answers, and every way in which it fails."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import socket
import time
import zlib
from datetime import date
from email.utils import formatdate
from functools import partial
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from tests import published
from tests.plugins.chat_server import KEY, Handler, Service, completion, serve

from llavakit import ChatError, ChatModel, Message, Reply, ReplyError
from llavakit.contracts.component import Use
from llavakit.recipe.redaction import redact
from llavakit.registry import Registry
from llavakit.testing import ChatModelContract
from llavakit_plugins.chat_models.faults import Fault, read_complaint
from llavakit_plugins.chat_models.openai import OpenAI
from llavakit_plugins.chat_models.options import OpenAIOptions
from llavakit_plugins.chat_models.pacing import Pace, backoff, retry_after
from llavakit_plugins.chat_models.replay import Replay, ReplayOptions
from llavakit_plugins.chat_models.service import Service as Account
from llavakit_plugins.generation.requests.ledger import Ledger
from llavakit_plugins.generation.requests.prices import Price, price_list
from llavakit_plugins.generation.requests.tokens import counter_for, estimate

SHARED = published.folder()
ASK = (Message("system", "Be brief."), Message("user", "Is it red?"))


def model(service: Service, **options: Any) -> OpenAI:
    stated = {"model": "gpt-4o", "base_url": service.url, "backoff": 0.02, "timeout": 5.0}
    return OpenAI(OpenAIOptions(**{**stated, **options}))


def ask(chat: ChatModel, draw: int = 0) -> Reply:
    async def once() -> Reply:
        try:
            return await chat.reply(ASK, draw)
        finally:
            await chat.close()

    return asyncio.run(once())


class TestOpenAI(ChatModelContract):
    @pytest.fixture(autouse=True)
    def _serve(self, service: Service) -> None:
        self.service = service

    @property
    def options(self) -> Any:  # type: ignore[override]
        return {"model": "gpt-4o"}

    def build(self) -> ChatModel:
        return model(self.service)

    def sent(self, model: ChatModel) -> str:
        return json.dumps(self.service.asked[-1])

    def failing(self) -> ChatModel:
        return model(Service(url="http://127.0.0.1:9/v1"), retries=0)


class TestReplay(ChatModelContract):
    @pytest.fixture(autouse=True)
    def _serve(self, service: Service, tmp_path: Path) -> None:
        self.service, self.folder = service, tmp_path

    @property
    def options(self) -> Any:  # type: ignore[override]
        return {"path": "x"}

    def build(self) -> ChatModel:
        use = {"use": "openai", "model": "gpt-4o", "base_url": self.service.url}
        options = ReplayOptions(path=self.folder / "x.jsonl", record=Use[ChatModel](**use))
        return Replay(options, build=Registry.installed().build)

    def sent(self, model: ChatModel) -> None:
        return None  # what was asked before is not asked again

    def failing(self) -> ChatModel:
        return Replay(ReplayOptions(path=self.folder / "y.jsonl"), build=Registry.installed().build)


def test_a_reply_says_what_is_known_of_it(service: Service) -> None:
    chat = model(service, price={"input": 2.5, "output": 10}, temperature=0.5, seed=7)
    reply = ask(chat, draw=2)
    assert reply == Reply("It is red.", "stop", "gpt-4o-2024-08-06", 100, 10, 350e-6)
    (body,) = service.asked
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it red?"},
    ]
    assert (body["model"], body["temperature"], body["seed"]) == ("gpt-4o", 0.5, 9)
    assert body["max_tokens"] == 1024


# -- what fails and is tried again -----------------------------------------------------------------


def slow(handler: Handler, body: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(30):
        time.sleep(0.1)
        handler.wfile.write(b" ")
        handler.wfile.flush()


def raw(data: bytes, handler: Handler, body: Any) -> None:
    handler.raw(data)


PASSING = {
    "429": lambda h, b: h.fail(429, "slow down"),
    "500": lambda h, b: h.fail(500, "oh"),
    "503": lambda h, b: h.fail(503, "overloaded"),
    "529 in HTML": lambda h, b: h.send(529, b"<html>busy</html>", "text/html"),
    "dropped before the answer": lambda h, b: h.hang_up(),
    "dropped in the answer": lambda h, b: h.half(b'{"choices": [{"mess'),
    "half a JSON": lambda h, b: h.send(200, b'{"choices": [{"mess', "application/json"),
    "no JSON": lambda h, b: h.send(200, b"<html>", "text/html"),
    "too deep a JSON": lambda h, b: h.send(200, b"[" * 100_000, "application/json"),
    "invalid UTF-8": lambda h, b: h.send(
        200, b'{"choices": [{"message": {"content": "\xff\xfe"}}]}', "application/json"
    ),
    "no choices": lambda h, b: h.json(200, {"choices": []}),
    "an error with status 200": lambda h, b: h.json(200, {"error": {"message": "no GPU"}}),
    "a list": lambda h, b: h.json(200, [1]),
    "content that is no text": lambda h, b: h.json(200, completion(["x"])),  # type: ignore[arg-type]
    "a refusal that is no text": lambda h, b: h.answer(None, message={"refusal": ["no"]}),
    "an error list with status 200": lambda h, b: h.json(200, [{"error": "no GPU"}]),
    **{
        f"no HTTP: {name}": partial(raw, b"HTTP/1.1 " + head)
        for name, head in {
            "a chunk's length": b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
            "a chunk without end": b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
            "a length in letters": b"200 OK\r\nContent-Length: abc\r\n\r\n{}",
            "a length below 0": b"200 OK\r\nContent-Length: -5\r\n\r\n{}",
            "two lengths": b"200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            "a long header": b"200 OK\r\nX: " + b"a" * 9000 + b"\r\nContent-Length: 2\r\n\r\n{}",
            "a zero in a header": b"200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\n{}",
            "a status in letters": b"abc OK\r\n\r\n",
            "a status of two digits": b"99 X\r\nContent-Length: 2\r\n\r\n{}",
            "a status of 999": b"999 X\r\nContent-Length: 2\r\n\r\n{}",
            "no reason in Unicode": b"500 \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
            "gzip that is none": b"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
            "a coding nobody asked for": b"200 OK\r\nContent-Encoding: br\r\nContent-Length: 2"
            b"\r\n\r\n{}",
            "nothing": b"204 No\r\n\r\n",
            "not changed": b"304 No\r\n\r\n",
            "another protocol": b"101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            "a redirect to nowhere": b"307 X\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n",
        }.items()
    },
    "no HTTP at all": lambda h, b: h.raw(b"hello\r\n"),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(service: Service, fault: Any) -> None:
    service.actions = [fault, fault]
    assert ask(model(service)).text == "It is red."
    assert len(service.asked) == 3


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_does_not_pass_ends_in_a_sentence(service: Service, fault: Any) -> None:
    service.otherwise = fault
    with pytest.raises(ReplyError, match=r"does not answer after 3 tries|is busy for longer"):
        ask(model(service, retries=2, patience=0.2))


def test_a_message_that_no_service_can_be_sent_is_refused(service: Service) -> None:
    with pytest.raises(ReplyError, match="cut within a character") as caught:
        asyncio.run(model(service).reply([Message("user", "half an emoji \ud83d")]))
    assert caught.value.lasting
    assert not service.asked


def test_a_server_that_is_slow_for_ever_is_left(service: Service) -> None:
    service.otherwise = slow  # each byte in time, the whole never
    begun = time.monotonic()
    with pytest.raises(ReplyError, match=r"no answer within 0.3 s"):
        ask(model(service, timeout=0.3, retries=1))
    assert time.monotonic() - begun < 20


def test_a_service_that_is_not_there_is_told_from_a_slow_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = Service(url=f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    with pytest.raises(ReplyError, match=r"after 5 tries: the connection failed: .*Cannot connect"):
        ask(model(away, retries=4))
    # said while it is tried, but not again and again
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert said.startswith(f"{away.url}: the connection failed: ")
    assert "asking again in" in said


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(service: Service, status: int) -> None:
    service.actions = [lambda h, b: h.fail(status, "wait", Retry_After="1")]
    ask(model(service))
    first, second = service.times
    assert 0.99 <= second - first < 20


def test_a_pause_that_one_request_is_asked_for_holds_all(service: Service) -> None:
    chat = model(service)

    async def several() -> None:
        await chat.reply(ASK)
        service.actions = [lambda h, b: h.fail(429, "wait", Retry_After="2")]
        first = asyncio.create_task(chat.reply(ASK, 1))
        while len(service.times) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.3)
        await asyncio.gather(first, *(chat.reply(ASK, draw) for draw in range(2, 7)))
        await chat.close()

    asyncio.run(several())
    assert len(service.times) == 8
    assert min(service.times[2:]) - service.times[1] >= 1.99


def test_a_pause_without_end_is_not_waited_for(service: Service) -> None:
    service.otherwise = lambda h, b: h.fail(429, "wait", Retry_After="86400")
    with pytest.raises(ReplyError, match=r"busy for longer than `patience` = 600 s"):
        ask(model(service))
    assert len(service.asked) == 1


def test_who_asks_to_come_back_at_once_is_not_hammered(service: Service) -> None:
    service.otherwise = lambda h, b: h.fail(429, "now", Retry_After="0")
    with pytest.raises(ReplyError, match="busy for longer"):
        ask(model(service, patience=0.5, backoff=0.1))
    assert len(service.asked) < 8


def test_a_date_to_wait_for_is_read_by_the_services_own_clock() -> None:
    date = {"date": formatdate(1_000_000, usegmt=True)}
    later = formatdate(1_000_007, usegmt=True)
    assert retry_after({**date, "retry-after": later}) == 7
    assert retry_after({"retry-after": later}) is None
    assert retry_after({"retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "soon"}) is None


def test_the_wall_clock_may_jump(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.actions = [lambda h, b: h.fail(429, "wait", Retry_After="1")]
    jumps = iter([1e9, -1e9] * 1000)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    ask(model(service, requests_per_minute=6000))
    first, second = service.times
    assert 0.99 <= second - first < 20


# -- answers of any size and from any place --------------------------------------------------------


def packed(size: int) -> bytes:
    """Return JSON with a string of so many bytes, as gzip."""
    pack = zlib.compressobj(wbits=31)
    parts = [pack.compress(b'{"a": "')]
    parts += [pack.compress(b"a" * (1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, pack.flush()])


def test_an_answer_without_end_is_not_read_to_its_end(service: Service) -> None:
    sent = 0

    def endless(handler: Handler, body: Any) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        while sent < 1 << 30:
            handler.wfile.write(b" " * (1 << 20))
            sent += 1 << 20

    service.otherwise = endless
    with pytest.raises(ReplyError, match="the answer is longer than 32 MiB"):
        ask(model(service, retries=0, timeout=60))
    assert sent < 1 << 28  # what lies in buffers


def test_a_small_answer_that_unpacks_to_a_large_one_is_refused(service: Service) -> None:
    data = packed(200 << 20)
    assert len(data) < 1 << 20
    service.otherwise = lambda h, b: h.send(200, data, "application/json", Content_Encoding="gzip")
    with pytest.raises(ReplyError, match="the answer is longer than 32 MiB"):
        ask(model(service, retries=0, timeout=60))


def test_gzip_is_unpacked_and_must_be_whole(service: Service) -> None:
    data = gzip.compress(json.dumps(completion("Yes.")).encode())
    service.actions = [
        lambda h, b: h.send(200, data[:-9], "application/json", Content_Encoding="gzip"),
        lambda h, b: h.send(200, data, "application/json", Content_Encoding="gzip"),
    ]
    assert ask(model(service)).text == "Yes."
    assert len(service.asked) == 2


def test_a_redirect_within_the_service_is_followed(service: Service) -> None:
    def on(handler: Handler, body: Any) -> None:
        handler.send(307, b"", "text/plain", Location="/v1/elsewhere/chat/completions")

    service.actions = [on]
    assert ask(model(service)).text == "It is red."
    assert service.paths == ["/v1/chat/completions", "/v1/elsewhere/chat/completions"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_is_refused(service: Service, status: int) -> None:
    with serve() as other:
        service.otherwise = lambda h, b: h.send(
            status, b"", "text/plain", Location=f"{other.url}/chat/completions"
        )
        with pytest.raises(ChatError, match="sends requests on to") as caught:
            ask(model(service))
        assert not isinstance(caught.value, ReplyError)
        assert other.url.removesuffix("/v1") in str(caught.value)
        assert not other.asked
    assert len(service.asked) == 1


def test_redirects_in_a_circle_end(service: Service) -> None:
    service.otherwise = lambda h, b: h.send(307, b"", "text/plain", Location="/v1/chat/completions")
    with pytest.raises(ReplyError, match="redirects more than 5 times"):
        ask(model(service, retries=0))


ABSURD: list[Any] = [
    10**300, 10**18, -5, True, 1.5, "100", None, [1], float("inf"), {"n": 1},
]  # fmt: skip


@pytest.mark.parametrize("count", ABSURD, ids=repr)
def test_counts_that_cannot_be_are_left_out(service: Service, count: Any) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": 10}
    service.otherwise = lambda h, b: h.json(200, {**completion("Yes."), "usage": usage})
    reply = ask(model(service, price={"input": 10, "output": 100}))
    assert (reply.text, reply.input_tokens, reply.usd) == ("Yes.", None, None)


@pytest.mark.parametrize("usage", [[1], "much", 7, True])
def test_usage_of_another_form_costs_no_reply(service: Service, usage: Any) -> None:
    service.otherwise = lambda h, b: h.json(200, {**completion("Yes."), "usage": usage})
    reply = ask(model(service))
    assert (reply.text, reply.input_tokens, reply.output_tokens) == ("Yes.", None, None)
    assert len(service.asked) == 1


def test_a_number_of_any_length_costs_no_reply(service: Service) -> None:
    text = json.dumps(completion("Yes.")).replace(": 100,", f": {'9' * 5000},")
    service.otherwise = lambda h, b: h.send(200, text.encode(), "application/json")
    assert ask(model(service)).text == "Yes."
    assert len(service.asked) == 1


def test_of_content_in_parts_the_text_is_kept(service: Service) -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "text", "text": "It is "},
        {"type": "text", "text": "red."},
    ]
    service.otherwise = lambda h, b: h.answer(parts)  # type: ignore[arg-type]
    assert ask(model(service)).text == "It is red."


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "refusal", "finish_reason", "usage", "model",
                 "error", "prompt_tokens", "completion_tokens", "type", "text"]
            ),
            inner, max_size=5,
        ),
        max_leaves=25,
    )
)  # fmt: skip
def test_any_json_is_a_reply_or_a_fault(table: Any) -> None:
    chat = Account(OpenAIOptions(model="x", base_url="http://localhost:1/v1", keyless=True))
    for body in (table, {"choices": [{"message": table}], "usage": table}, {"choices": [table]}):
        try:
            reply = chat.reply_of(body)
        except Fault:
            continue
        assert isinstance(reply.text, str)
        assert isinstance(reply.finish, str)
        assert all(type(n) in (int, type(None)) for n in (reply.input_tokens, reply.output_tokens))
    complaint = read_complaint(table)
    assert isinstance(complaint.code, str)
    assert complaint.said
    chat.judge(400, complaint)
    chat.learn(complaint)


# -- the name of the longest reply -----------------------------------------------------------------

UNSUPPORTED = {
    "OpenAI": {
        "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        "type": "invalid_request_error", "param": "max_tokens", "code": "unsupported_parameter",
    },
    "pydantic": {"detail": [
        {"type": "extra_forbidden", "loc": ["body", "max_tokens"],
         "msg": "Extra inputs are not permitted"},
    ]},
    "a sentence": "unknown field max_tokens",
}  # fmt: skip


@pytest.mark.parametrize("error", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_the_newer_name_of_the_longest_reply_is_learned_once(service: Service, error: Any) -> None:
    def answer(handler: Handler, body: Any) -> None:
        if "max_tokens" in body:
            handler.json(400, error if "detail" in error else {"error": error})
        else:
            handler.answer("Yes.")

    service.otherwise = answer
    chat = model(service, retries=0, max_tokens=77)
    assert [ask(chat, draw).text for draw in range(3)] == ["Yes."] * 3
    assert [body.get("max_completion_tokens") for body in service.asked] == [None, 77, 77, 77]


def test_the_older_name_is_learned_too(service: Service) -> None:
    def answer(handler: Handler, body: Any) -> None:
        if "max_completion_tokens" in body:
            handler.fail(422, "Unrecognized request argument supplied: max_completion_tokens")
        else:
            handler.answer("Yes.")

    service.otherwise = answer
    chat = model(service)
    chat._service.limit_field = "max_completion_tokens"  # as at OpenAI's own address
    assert ask(chat).text == "Yes."
    assert [body.get("max_tokens") for body in service.asked] == [None, 1024]


def test_who_refuses_both_names_is_believed(service: Service) -> None:
    def answer(handler: Handler, body: Any) -> None:
        name = next(name for name in ("max_tokens", "max_completion_tokens") if name in body)
        handler.fail(400, f"Unsupported parameter: {name}; use max_tokens")

    service.otherwise = answer
    with pytest.raises(ReplyError, match="Unsupported parameter: max_completion_tokens"):
        ask(model(service))
    assert len(service.asked) == 2


def test_a_reply_that_is_too_long_for_the_model_is_another_matter(service: Service) -> None:
    service.otherwise = lambda h, b: h.fail(400, "max_tokens is too large: 5000. At most 4096.")
    with pytest.raises(ReplyError, match="too large"):
        ask(model(service, max_tokens=5000))
    assert len(service.asked) == 1


def test_the_name_may_be_stated_and_fields_left_out(service: Service) -> None:
    service.otherwise = lambda h, b: h.fail(400, "unknown field max_completion_tokens")
    with pytest.raises(ReplyError, match="unknown field"):
        ask(model(service, limit_field="max_completion_tokens"))
    assert len(service.asked) == 1
    service.otherwise = lambda h, b: h.answer("Yes.")
    for nothing in (None, "null"):
        chat = model(service, temperature=0.5, extra={"max_tokens": nothing, "top_k": 5})
        ask(chat)
        body = service.asked[-1]
        assert sorted(body) == ["messages", "model", "temperature", "top_k"]


# -- addresses and keys ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["https://api.openai.com/v1/", "HTTPS://API.OpenAI.com/v1", "https://api.openai.com:443/v1//"],
)
def test_the_same_address_is_the_same_service(url: str) -> None:
    chat = OpenAI(OpenAIOptions(model="gpt-4o", base_url=url))
    assert chat.price(10**6, 10**6) == 12.5
    assert chat.options.base_url == OpenAIOptions(model="x").base_url
    assert chat._service.body(ASK, 0)["max_completion_tokens"] == 1024


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:abc/v1", "http://localhost:99999/v1", "http://localhost:0/v1",
        "http://localhost:/v1", "http://localhost:８０/v1", "http://local host/v1",
        "http://localhost/v1 ", "http://[::1/v1", "http://[zz]/v1", "http://a..b/v1", "http:///v1",
        f"http://{'a' * 300}/v1", "http://a/v1\x1b[2J", "ftp://a/v1", "a/v1", "",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=r"write it as https://HOST"):
        OpenAIOptions(model="x", base_url=url)


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"https://me:{SECRET}@host/v1", f"https://{SECRET}@host/v1", f"https://me:{SECRET}/x@host/v1",
        f"https://host/v1#{SECRET}", f"https://host/v1?{SECRET}", f"https://host/v1?key={SECRET}",
        f"https://host\\@{SECRET}/v1",
    ],
)  # fmt: skip
def test_an_address_may_hold_no_secret(url: str) -> None:
    with pytest.raises(ValidationError, match="no password"):
        OpenAIOptions(model="x", base_url=url)
    if "\\" not in url:
        assert SECRET not in redact(f'base_url = "{url}": got `{url}`')


def test_a_key_in_the_path_is_refused_and_a_random_part_is_not_shown(service: Service) -> None:
    with pytest.raises(ValidationError, match="path may hold no key"):
        OpenAIOptions(model="x", base_url=f"https://host/{KEY}/v1")
    part = "0123456789abcdef0123456789abcdef"  # a key, or the number of an account: who knows
    service.otherwise = lambda h, b: h.fail(500, "oh")
    with pytest.raises(ReplyError) as caught:
        ask(model(service, base_url=service.url.replace("/v1", f"/{part}/v1"), retries=0))
    assert part not in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"api_key": "x"}, {"headers": {"Authorization": "x"}}, {"a": [{"x-api-key": "x"}]},
        {"password": "x"}, {"user": KEY}, {"auth_token": "x"},
    ],
)  # fmt: skip
def test_more_fields_may_hold_no_key(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="may hold no key"):
        OpenAIOptions(model="x", extra=extra)


@pytest.mark.parametrize(
    "extra", [{"stream": True}, {"messages": [1]}, {"x": float("nan")}, {"x": date(2020, 1, 1)}]
)
def test_more_fields_that_no_request_can_hold_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"not for recipes|JSON cannot"):
        OpenAIOptions(model="x", extra=extra)


@pytest.mark.parametrize("key", [KEY, "0123456789abcdef0123456789abcdef", "AbCdEf0123456789_-xYz"])
def test_a_key_in_place_of_its_file_is_refused_and_never_shown(key: str) -> None:
    with pytest.raises(ValidationError, match="looks like a key itself"):
        OpenAIOptions(model="x", key_file=key)  # type: ignore[arg-type]
    assert key not in redact(f"got {key!r}")
    OpenAIOptions(model="x", key_file="keys/openai-2024")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["~nobody-of-that-name/key", "a" * 300, "a\x00b", ".", "pipe"])
def test_a_key_file_that_is_none_ends_in_a_sentence(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # reading it would wait for ever
    with pytest.raises(ChatError, match="cannot read the key file"):
        ask(model(service, key_file=name))


# -- what fails for good ---------------------------------------------------------------------------


def test_a_wrong_key_is_said_at_once(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "sk-wrong-9876543210-zyxwvu"
    monkeypatch.setenv("OPENAI_API_KEY", wrong)
    caplog.set_level(logging.DEBUG, logger="llavakit_plugins")
    with pytest.raises(ChatError, match="environment variable OPENAI_API_KEY") as caught:
        ask(model(service))
    assert not isinstance(caught.value, ReplyError)
    assert len(service.asked) == 1
    assert wrong not in str(caught.value)  # though the server repeats it
    assert "[key]" in str(caught.value)
    assert wrong not in caplog.text


def test_no_key_is_said_before_anything_is_sent(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ChatError, match="variable OPENAI_API_KEY holds no key"):
        ask(model(service))
    assert not service.asked


def test_the_key_may_be_in_a_file(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert ask(model(service, key_file=file)).text == "It is red."
    with pytest.raises(ChatError, match="cannot read the key file"):
        ask(model(service, key_file=tmp_path / "none"))
    file.write_text("two words")
    with pytest.raises(ChatError, match="holds no key") as caught:
        ask(model(service, key_file=file))
    assert "two words" not in str(caught.value)


def test_a_recipe_cannot_hold_a_key() -> None:
    with pytest.raises(ValidationError, match="api_key"):
        OpenAIOptions(model="x", api_key=KEY)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="key_env"):
        OpenAIOptions(model="x", key_env=KEY)
    with pytest.raises(ValidationError, match="no password"):
        OpenAIOptions(model="x", base_url="https://me:secret@host/v1")
    with pytest.raises(ValidationError, match="no password"):
        OpenAIOptions(model="x", base_url=f"https://host/v1?key={KEY}")


def test_a_key_that_the_service_repeats_is_taken_out(service: Service) -> None:
    service.otherwise = lambda h, b: h.answer(f"Your key is {KEY}.")
    assert ask(model(service)).text == "Your key is [key]."


def test_an_unknown_model_is_said_with_those_that_are_there(service: Service) -> None:
    service.otherwise = lambda h, b: h.fail(404, "no such model", code="model_not_found")
    with pytest.raises(ChatError, match=r"no model `gpt-4oo`.*did you mean `gpt-4o`\?"):
        ask(model(service, model="gpt-4oo"))
    assert len(service.asked) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([{"error": {"code": 400, "message": "API key not valid"}}], "API key not valid"),
        (["too", "long"], "too; long"),
        ("too long", "too long"),
        ({"error": "too long"}, "too long"),
        ({"error": ["too", {"message": "long"}]}, "too; long"),
        ({"error": {"message": {"detail": "too long"}}}, "too long"),
        ({"error": {"message": "too long", "code": 17}}, "too long"),
        ({"detail": [{"loc": ["body", "x"], "msg": "field required"}]}, "field required"),
        ({"message": "too long"}, "too long"),
        ({"errors": [{"message": "a"}, {"message": "b"}]}, "a; b"),
        ({}, "no reason given"),
        (None, "no reason given"),
        (7, "7"),
    ],
)
def test_what_an_error_says_is_shown_whatever_its_form(
    service: Service, body: Any, said: str
) -> None:
    service.otherwise = lambda h, b: h.json(400, body)
    with pytest.raises(ReplyError) as caught:
        ask(model(service))
    assert f"status 400: {said}" in str(caught.value)


def test_what_a_service_says_drives_no_terminal(service: Service) -> None:
    service.otherwise = lambda h, b: h.fail(400, "a\x1b[2J\x1b]0;title\x07\x9b1m\r\nb\u202ec")
    with pytest.raises(ReplyError) as caught:
        ask(model(service))
    assert r"a\x1b[2J\x1b]0;title\x07\x9b1m b\u202ec" in str(caught.value)


def test_an_account_without_credit_is_not_tried_again(service: Service) -> None:
    service.otherwise = lambda h, b: h.fail(429, "quota", code="insufficient_quota")
    with pytest.raises(ChatError, match="no credit left"):
        ask(model(service))
    assert len(service.asked) == 1
    service.otherwise = lambda h, b: h.fail(402, "Insufficient Balance")
    with pytest.raises(ChatError, match="no credit left: Insufficient Balance"):
        ask(model(service))


def test_a_request_that_is_refused_may_be_the_only_one(service: Service) -> None:
    service.actions = [lambda h, b: h.fail(400, "too long", code="context_length_exceeded")]
    with pytest.raises(ReplyError, match="refuses a request: status 400: too long"):
        ask(model(service))
    assert ask(model(service)).text == "It is red."


@pytest.mark.parametrize(
    ("action", "finish", "text"),
    [
        (lambda h, b: h.answer("It is", "length"), "length", "It is"),
        (lambda h, b: h.answer("", "content_filter"), "content_filter", ""),
        (lambda h, b: h.fail(400, "no", code="content_filter"), "content_filter", ""),
        (lambda h, b: h.answer(None, message={"refusal": "I won't."}), "refusal", "I won't."),
    ],
)
def test_why_a_reply_ends_is_kept(service: Service, action: Any, finish: str, text: str) -> None:
    service.actions = [action]
    reply = ask(model(service))
    assert (reply.finish, reply.text) == (finish, text)
    assert len(service.asked) == 1


def test_complete_raises_where_there_is_no_text(service: Service) -> None:
    service.otherwise = lambda h, b: h.answer("", "content_filter")
    with pytest.raises(ReplyError, match=r"empty reply \(content_filter\)"):
        model(service).complete(ASK)


# -- rates, tokens, prices -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "tokens", "cost", "least"),
    [(600, None, 1, 0.9), (None, 60_000, 100, 0.9), (None, None, 1, 0.0)],
)
def test_rates_are_kept(
    requests: float | None, tokens: float | None, cost: int, least: float
) -> None:
    async def many() -> float:
        pace = Pace(requests, tokens)
        begun = time.monotonic()
        await asyncio.gather(*(pace.turn(cost) for _ in range(21)))
        return time.monotonic() - begun

    # 20 intervals of 0.1 s, of which one second's worth may go at once
    assert least <= asyncio.run(many()) < least + 5  # on a machine with other work, too


def test_pauses_double_and_are_never_all_alike() -> None:
    drawn = [[backoff(failures, 1.0) for _ in range(200)] for failures in (1, 2, 3, 50)]
    for pauses, longest in zip(drawn, (1, 2, 4, 60), strict=True):
        assert longest / 2 <= min(pauses) < 0.6 * longest
        assert 0.9 * longest < max(pauses) <= longest


def test_openais_own_vocabularies_are_counted_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"gpt-4": "cl100k_base", "gpt-4o-2024-08-06": "o200k_base", "gpt-5": "o200k_base"}
    assert {name: counter_for(name).vocabulary for name in known} == known
    # counted by hand with OpenAI's public tokenizer page
    assert counter_for("gpt-4").text("tiktoken is great!") == 6
    # the files are those that tiktoken would download: it checks their SHA-256
    digests = {
        "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    }
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    counter_for.cache_clear()
    for name, vocabulary in known.items():
        assert counter_for(name).exact
        assert (
            sha256((tmp_path / file_of(vocabulary)).read_bytes()).hexdigest()
            == (digests[vocabulary])
        )
    counter_for.cache_clear()


def file_of(vocabulary: str) -> str:
    url = f"https://openaipublic.blob.core.windows.net/encodings/{vocabulary}.tiktoken"
    return sha1(url.encode()).hexdigest()


def test_without_a_vocabulary_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("llavakit_plugins.generation.requests.tokens.find_spec", lambda name: None)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it reaches out"))
    counter_for.cache_clear()
    assert not counter_for("gpt-4").exact
    counter_for.cache_clear()


@published.needs("tokenizer", "coco80", "llava_bench_coco")
def test_the_estimate_errs_as_little_as_it_says() -> None:
    from sentencepiece import SentencePieceProcessor

    llama = SentencePieceProcessor(model_file=str(published.llama()))
    rows = rows_of(SHARED / "coco80" / "caps_boxes.jsonl")
    contexts = [
        "\n".join(
            [*row["captions"], "", *(f"{b['category']}: {b['bbox']}" for b in row["instances"])]
        )
        for row in rows
    ]
    answers = [row["text"] for row in rows_of(SHARED / "llava_bench_coco" / "gpt4_answers.jsonl")]
    for texts in (contexts, answers):
        guess = sum(map(estimate, texts))
        assert 0.9 <= guess / sum(map(counter_for("gpt-4o").text, texts)) <= 1.1
        assert 0.67 <= guess / sum(len(llama.encode(text)) for text in texts) <= 1.1


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_unknown_model_is_counted_by_estimate_and_has_no_price() -> None:
    chat = OpenAI(OpenAIOptions(model="vicuna-13b", base_url="http://localhost:8000/v1"))
    assert not chat.counter.exact
    assert chat.price(1000, 1000) is None
    local = OpenAI(OpenAIOptions(model="gpt-4o", base_url="http://localhost:8000/v1"))
    assert local.price(1000, 1000) is None  # a proxy's price is not OpenAI's
    assert OpenAI(OpenAIOptions(model="gpt-4o")).price(10**6, 10**6) == 12.5
    assert OpenAI(OpenAIOptions(model="gpt-4o", batch=True)).price(10**6, 10**6) == 6.25


def test_a_dated_model_has_its_models_price() -> None:
    prices = price_list()
    assert prices.find("gpt-4-0314") == prices.models["gpt-4"]
    assert prices.find("gpt-4o-mini-2024-07-18") == prices.models["gpt-4o-mini"]
    assert prices.find("gpt-4o-audio-preview") is None
    assert prices.find("gpt-4-32k") is None
    assert Price(input=30, output=60).of(1_000_000, 0) == 30


# -- replay ----------------------------------------------------------------------------------------


def test_what_was_recorded_is_given_again_without_asking(service: Service, tmp_path: Path) -> None:
    service.actions = [lambda h, b: h.answer("First."), lambda h, b: h.answer("Second.")]
    file = tmp_path / "replies.jsonl"
    build = Registry.installed().build
    use = Use[ChatModel].model_validate(
        {
            "use": "openai", "model": "gpt-4o", "base_url": service.url,
            "price": {"input": 10, "output": 100},
        }
    )  # fmt: skip
    recorder = Replay(ReplayOptions(path=file, record=use), build=build)
    replies = [ask(recorder, draw) for draw in (0, 1, 0)]
    assert [reply.text for reply in replies] == ["First.", "Second.", "First."]
    assert [reply.usd for reply in replies] == [pytest.approx(0.002), pytest.approx(0.002), 0.0]
    assert len(service.asked) == 2
    player = Replay(ReplayOptions(path=file), build=build)
    first, second = (ask(player, draw) for draw in (0, 1))
    assert (first.text, second.text) == ("First.", "Second.")
    assert (first.input_tokens, first.model) == (100, "gpt-4o-2024-08-06")
    assert (first.usd, second.usd) == (0.0, 0.0)
    assert len(service.asked) == 2
    with pytest.raises(ChatError, match=r"has no reply \(draw 2\).*'Is it red\?'"):
        ask(player, 2)
    assert KEY.encode() not in file.read_bytes()


def test_a_file_of_replies_that_is_not_there_is_named(tmp_path: Path) -> None:
    options = ReplayOptions(path=tmp_path / "none")
    said = Replay.missing(options)  # before a run begins
    assert said is not None
    assert f"there is no file of replies {tmp_path / 'none'}" in said
    recording = ReplayOptions(path=tmp_path / "none", record=Use[ChatModel](use="openai"))
    assert Replay.missing(recording) is None
    player = Replay(options, build=Registry.installed().build)
    with pytest.raises(ChatError, match="no file of replies"):
        player.complete(ASK)
    assert not (tmp_path / "none").exists()


def test_a_ledger_of_another_run_can_be_replayed(service: Service, tmp_path: Path) -> None:
    from llavakit_plugins.generation.requests.ledger import Request
    from llavakit_plugins.generation.requests.send_all import send_all

    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        send_all(model(service), lambda: [Request(ASK)], ledger)
    options = ReplayOptions(path=tmp_path / "ledger.jsonl")
    player = Replay(options, build=Registry.installed().build)
    assert player.complete(ASK) == "It is red."
