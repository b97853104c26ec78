"""The chat models against a real HTTP server: what it answers, and every way in which it fails."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator
from email.utils import formatdate
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.plugins.chat_server import KEY, Handler, Service, completion, serve

from llavakit import ChatError, ChatModel, Message, Reply, ReplyError
from llavakit.contracts.component import Use
from llavakit.registry import Registry
from llavakit.testing import ChatModelContract
from llavakit_plugins.chat_models.openai import OpenAI
from llavakit_plugins.chat_models.options import OpenAIOptions
from llavakit_plugins.chat_models.pacing import Pace, backoff, retry_after
from llavakit_plugins.chat_models.replay import Replay, ReplayOptions
from llavakit_plugins.generation.requests.ledger import Ledger
from llavakit_plugins.generation.requests.prices import Price, price_list
from llavakit_plugins.generation.requests.tokens import counter_for, estimate

SHARED = Path(__file__).parents[3] / "shared" / "data"
ASK = (Message("system", "Be brief."), Message("user", "Is it red?"))


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def service() -> Iterator[Service]:
    with serve() as running:
        yield running


def model(service: Service, **options: Any) -> OpenAI:
    settings = {"model": "gpt-4o", "base_url": service.url, "backoff": 0.02, "timeout": 5.0}
    return OpenAI(OpenAIOptions(**{**settings, **options}))


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
    def options(self) -> Any:
        return {"model": "gpt-4o"}

    def build(self) -> ChatModel:
        return model(self.service)


class TestReplay(ChatModelContract):
    @pytest.fixture(autouse=True)
    def _serve(self, service: Service, tmp_path: Path) -> None:
        self.service, self.folder = service, tmp_path

    @property
    def options(self) -> Any:
        return {"path": "x"}

    def build(self) -> ChatModel:
        use = {"use": "openai", "model": "gpt-4o", "base_url": self.service.url}
        options = ReplayOptions(path=self.folder / "x.jsonl", record=Use[ChatModel](**use))
        return Replay(options, build=Registry.installed().build)


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


def test_an_account_without_credit_is_not_tried_again(service: Service) -> None:
    service.otherwise = lambda h, b: h.fail(429, "quota", code="insufficient_quota")
    with pytest.raises(ChatError, match="no credit left"):
        ask(model(service))
    assert len(service.asked) == 1


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


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not beside the checkout")
def test_the_estimate_errs_as_little_as_it_says() -> None:
    from sentencepiece import SentencePieceProcessor

    llama = SentencePieceProcessor(model_file=str(SHARED / "tokenizer" / "llama2.model"))
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
    assert KEY not in file.read_text()


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
    from llavakit_plugins.generation.requests.asking import ask_all
    from llavakit_plugins.generation.requests.ledger import Request

    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ask_all(model(service), lambda: [Request(ASK)], ledger)
    options = ReplayOptions(path=tmp_path / "ledger.jsonl")
    player = Replay(options, build=Registry.installed().build)
    assert player.complete(ASK) == "It is red."
