"""Asking by a ledger: nothing twice, nothing lost, never beyond a budget."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.plugins.chat_server import KEY, Handler, Service, completion, serve, user_text

from llavakit import (
    ChatError,
    ChatModel,
    DataError,
    LlavaError,
    Message,
    Options,
    Reply,
    Stopped,
)
from llavakit_plugins.chat_models.openai import OpenAI
from llavakit_plugins.chat_models.options import OpenAIOptions
from llavakit_plugins.generation.requests.ledger import Ledger, Request, record_of
from llavakit_plugins.generation.requests.send_all import send_all

PRICE = {"input": 10, "output": 100}  # a reply of 100 + 10 tokens: 0.002 USD


def model(service: Service, **options: Any) -> OpenAI:
    settings: dict[str, Any] = {"model": "gpt-4o", "base_url": service.url, "backoff": 0.02}
    return OpenAI(OpenAIOptions(**{**settings, "timeout": 20.0, "poll_seconds": 0.05, **options}))


def requests(count: int, first: int = 0) -> list[Request]:
    return [
        Request((Message("user", f"question {number}"),), label=f"q{number}")
        for number in range(first, first + count)
    ]


def entry(number: int = 0, **changes: Any) -> Any:
    facts = record_of("a model", requests(1, number)[0])
    return replace(facts.entry(Reply(f"text {number}", usd=0.5)), **changes)


# -- asking ----------------------------------------------------------------------------------------


def test_each_is_asked_once_and_no_more_than_so_many_at_once(
    service: Service, tmp_path: Path
) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.02)
        handler.answer(f"Re: {user_text(body)}")

    service.otherwise = answer
    seen: list[str] = []
    with Ledger(tmp_path / "ledger") as ledger:
        todo = [*requests(40), *requests(40)]  # everything twice
        tally = send_all(
            model(service), lambda: todo, ledger, concurrency=7,
            progress=lambda entry: seen.append(entry.label),
        )  # fmt: skip
        assert tally.answered == 40
        assert sorted(entry.text for entry in ledger) == sorted(
            f"Re: question {number}" for number in range(40)
        )
    assert sorted(seen) == sorted(f"q{number}" for number in range(40))
    assert set(Counter(map(user_text, service.asked)).values()) == {1}
    assert 2 <= service.most_at_once <= 7
    with Ledger(tmp_path / "ledger") as ledger:
        assert send_all(model(service), lambda: requests(50), ledger).answered == 10
    assert len(service.asked) == 50


def test_a_wrong_key_ends_the_job_at_the_first_request(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-0123456789")
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(ChatError, match="does not take"):
        send_all(model(service), lambda: requests(100), ledger, concurrency=16)
    assert len(service.asked) == 1


def test_one_request_that_is_refused_holds_up_no_other(service: Service, tmp_path: Path) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        if user_text(body) == "question 3":
            handler.fail(400, "too long")
        else:
            handler.answer("Yes.")

    service.otherwise = answer
    with Ledger(tmp_path / "ledger") as ledger:
        tally = send_all(model(service), lambda: requests(30), ledger)
        assert (tally.answered, len(ledger)) == (29, 29)
    ((key, reason),) = tally.unanswered.items()
    assert key == record_of(model(service).identity, requests(1, 3)[0]).key
    assert "too long" in reason


def test_a_service_that_refuses_everything_ends_the_job(service: Service, tmp_path: Path) -> None:
    service.otherwise = lambda h, b: h.fail(400, "no such field")
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(ChatError, match="in a row"):
        send_all(model(service), lambda: requests(1000), ledger, concurrency=4)
    assert len(service.asked) < 30


def test_faults_at_random_lose_nothing(service: Service, tmp_path: Path) -> None:
    lock, seen = threading.Lock(), Counter[str]()
    faults = [
        lambda h: h.fail(500, "x"), lambda h: h.hang_up(), lambda h: h.half(b'{"choices"'),
        lambda h: h.fail(429, "x", Retry_After="0"), lambda h: h.send(200, b"\xff", "text/plain"),
    ]  # fmt: skip

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        text = user_text(body)
        with lock:
            seen[text] += 1
            turn = seen[text]
        number = int(text.split()[1])
        if turn <= number % 3:
            faults[(number + turn) % len(faults)](handler)
        else:
            handler.answer(f"Re: {text}")

    service.otherwise = answer
    with Ledger(tmp_path / "ledger") as ledger:
        tally = send_all(model(service), lambda: requests(60), ledger, concurrency=16)
        assert not tally.unanswered
        assert sorted(e.text for e in ledger) == sorted(f"Re: question {n}" for n in range(60))


def test_asking_to_stop_keeps_what_is_on_its_way(service: Service, tmp_path: Path) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.2)
        handler.answer("Yes.")

    service.otherwise = answer
    with Ledger(tmp_path / "ledger") as ledger:
        with pytest.raises(Stopped):
            send_all(
                model(service), lambda: requests(500), ledger, concurrency=8,
                stopping=lambda: len(service.asked) > 20,
            )  # fmt: skip
        assert len(ledger) == len(service.asked) < 500


def test_who_gives_the_requests_may_stop(service: Service, tmp_path: Path) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.2)
        handler.answer("Yes.")

    def some() -> Iterator[Request]:
        yield from requests(20)
        raise Stopped

    service.otherwise = answer
    with Ledger(tmp_path / "ledger") as ledger:
        with pytest.raises(Stopped):
            send_all(model(service), some, ledger, concurrency=8)
        assert len(ledger) == len(service.asked) > 1  # what was on its way is kept


def test_what_waits_for_its_turn_is_not_sent_when_the_job_stops(
    service: Service, tmp_path: Path
) -> None:
    """Neither for the rate nor for another try: the user pressed Ctrl-C and wants to go."""
    faulty = model(service, backoff=60.0)
    service.actions = [lambda h, b: h.answer("Yes.")]
    service.otherwise = lambda h, b: h.fail(500, "oh")
    slow = model(service, requests_per_minute=0.5)
    for chat, enough in ((faulty, 5), (slow, 1)):
        service.asked.clear()
        begun = time.monotonic()
        with Ledger(tmp_path / f"ledger {enough}") as ledger:
            with pytest.raises(Stopped):
                send_all(
                    chat, lambda: requests(50), ledger, concurrency=4,
                    stopping=lambda: len(service.asked) >= enough,  # noqa: B023
                )  # fmt: skip
            assert len(ledger) == 1
        assert len(service.asked) == enough
        assert time.monotonic() - begun < 30  # and not a minute, or two
        service.otherwise = lambda h, b: h.answer("Yes.")


class Own(ChatModel):
    """A chat model of somebody else's: `complete` alone, which raises what it likes."""

    name = "own"
    Options = Options

    def __init__(self, fault: Callable[[int], object]) -> None:
        self.fault, self.calls = fault, 0

    def complete(self, messages: Sequence[Message]) -> str:
        number = int(messages[-1].content.split()[1])
        self.calls += 1
        found = self.fault(number)
        if isinstance(found, BaseException):
            raise found
        return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    "fault", [RuntimeError("\x1b[2Jout of memory"), KeyError("x"), None, 7, ["text"]], ids=repr
)
def test_whatever_one_request_raises_the_others_are_written(tmp_path: Path, fault: object) -> None:
    chat = Own(lambda number: fault if number == 2 else f"Re: {number}")
    with Ledger(tmp_path / "ledger") as ledger:
        tally = send_all(chat, lambda: requests(20), ledger, concurrency=4)
        assert len(ledger) == tally.answered == 19
    ((key, reason),) = tally.unanswered.items()
    assert key == record_of(chat.identity, requests(1, 2)[0]).key
    assert not tally.refused
    assert reason.startswith("chat model `own` failed: ")
    assert "\x1b" not in reason


@pytest.mark.parametrize("error", [ChatError("no credit"), LlavaError("no space"), OSError("x")])
def test_what_ends_the_job_lets_the_others_end_in_peace(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.3)
        handler.answer("Yes.")

    service.otherwise = answer
    with Ledger(tmp_path / "ledger") as ledger:
        real = ledger.write

        async def write(entry: Any) -> None:
            if entry.label == "q4":
                raise error
            await real(entry)

        monkeypatch.setattr(ledger, "write", write)
        with pytest.raises(type(error), match=str(error)):
            send_all(model(service), lambda: requests(200), ledger, concurrency=8)
        assert len(service.asked) < 30
        assert len(ledger) == len(service.asked) - 1


def test_who_gives_the_requests_may_fail(service: Service, tmp_path: Path) -> None:
    def some() -> Iterator[Request]:
        yield from requests(5)
        raise RuntimeError("a plugin's own")

    with Ledger(tmp_path / "ledger") as ledger:
        with pytest.raises(RuntimeError, match="a plugin's own"):
            send_all(model(service), some, ledger, concurrency=8)
        assert len(ledger) == len(service.asked) == 5


def test_a_service_that_answers_may_refuse_many(service: Service, tmp_path: Path) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        if 5 <= int(user_text(body).split()[1]) < 50:
            handler.fail(400, "not this one")
        else:
            handler.answer("Yes.")

    service.otherwise = answer
    with Ledger(tmp_path / "ledger") as ledger:
        tally = send_all(model(service), lambda: requests(60), ledger, concurrency=1)
        assert (tally.answered, len(tally.refused)) == (15, 45)
        # what a resume has left is refused alone, and that ends it as well
        again = send_all(model(service), lambda: requests(60), ledger, concurrency=1)
        assert (again.answered, again.refused) == (0, tally.refused)


# -- money -----------------------------------------------------------------------------------------


def test_a_budget_is_never_passed(service: Service, tmp_path: Path) -> None:
    chat = model(service, price=PRICE, max_tokens=20)
    with Ledger(tmp_path / "ledger") as ledger:
        with pytest.raises(ChatError, match=r"at budget_usd = 0\.05: 0\.0\d+ USD are spent"):
            send_all(chat, lambda: requests(200), ledger, concurrency=8, budget_usd=0.05)
        spent = ledger.spent
        assert len(service.asked) == len(ledger)
        assert spent == pytest.approx(len(ledger) * 0.002)
        assert 0.04 < spent <= 0.05
    with Ledger(tmp_path / "ledger") as ledger:  # more money: it goes on, and asks nothing twice
        send_all(
            model(service, price=PRICE, max_tokens=20), lambda: requests(40), ledger, budget_usd=1
        )
        assert len(ledger) == len(service.asked) == 40


def test_a_budget_needs_a_price(service: Service, tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(ChatError, match="no price is known"):
        send_all(model(service), lambda: requests(1), ledger, budget_usd=1)
    assert not service.asked


def test_a_service_that_counts_nothing_is_counted_here(service: Service, tmp_path: Path) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        handler.json(200, {**completion("Yes, it is."), "usage": None})

    service.otherwise = answer
    chat = model(service, price=PRICE)
    with Ledger(tmp_path / "ledger") as ledger:
        send_all(chat, lambda: requests(1), ledger)
        (found,) = ledger
    sent = chat.count(requests(1)[0].messages)
    assert found.input_tokens == sent
    assert found.output_tokens is not None
    assert found.usd == pytest.approx((sent * 10 + found.output_tokens * 100) / 1e6)


# -- batches ---------------------------------------------------------------------------------------


class Echoing(Handler):
    def in_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        return completion(f"Re: {user_text(body)}")


@pytest.fixture
def batching() -> Iterator[Service]:
    with serve(handler=Echoing) as running:
        yield running


def test_a_batch_is_handed_in_polled_and_collected(batching: Service, tmp_path: Path) -> None:
    chat = model(batching, batch=True, batch_size=4, price=PRICE)
    with Ledger(tmp_path / "ledger") as ledger:
        tally = send_all(chat, lambda: requests(10), ledger)
        assert tally.answered == 10
        for request in requests(10):
            found = ledger.get(record_of(chat.identity, request).key)
            assert found is not None
            assert found.text == f"Re: {request.messages[0].content}"
            assert found.label == request.label
            assert found.usd == pytest.approx(0.001)  # half the price
    assert len(batching.batches) == 3
    for content in batching.files.values():
        for line in content.splitlines():
            row = json.loads(line)
            assert re.fullmatch(r"[0-9a-f]{32}", row["custom_id"])
    with Ledger(tmp_path / "ledger") as ledger:
        assert send_all(chat, lambda: requests(10), ledger).answered == 0
    assert len(batching.batches) == 3


def test_a_batch_on_its_way_is_collected_by_the_next_run(batching: Service, tmp_path: Path) -> None:
    chat = model(batching, batch=True, batch_size=4)
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(Stopped):
        send_all(chat, lambda: requests(10), ledger, stopping=lambda: len(batching.batches) == 3)
    assert not batching.asked
    with Ledger(tmp_path / "ledger") as ledger:
        assert send_all(chat, lambda: requests(12), ledger).answered == 12
        assert len(ledger) == 12
    assert len(batching.batches) == 4  # the two new ones
    assert set(Counter(map(user_text, batching.asked)).values()) == {1}


def inputs(service: Service) -> list[list[bytes]]:
    """Return the lines of the files that batches were made of."""
    files = [data for data in service.files.values() if b'"method"' in data]
    return [data.splitlines(keepends=True) for data in files]


def test_a_batch_is_as_large_as_the_service_takes_in_requests_and_bytes(
    batching: Service, tmp_path: Path
) -> None:
    long = [replace(request, messages=(Message("user", f"{n} {'é' * 40 * n}"),))
            for n, request in enumerate(requests(40))]  # fmt: skip
    chat = model(batching, batch=True, batch_size=9, batch_bytes=20_000)
    with Ledger(tmp_path / "ledger") as ledger:
        tally = send_all(chat, lambda: long, ledger)
        assert (tally.answered, tally.unanswered) == (40, {})
    sent = inputs(batching)
    sizes = [sum(map(len, each)) for each in sent]
    assert max(map(len, sent)) == len(sent[0]) == 9  # short ones: by their number
    assert max(sizes) <= 20_000
    for first, second in pairwise(sent):  # no place was left for the next one
        assert len(first) == 9 or sum(map(len, first)) + len(second[0]) > 20_000
    assert sum(map(len, sent)) == len(
        {json.loads(line)["custom_id"] for each in sent for line in each}
    )


def test_a_request_larger_than_any_batch_is_refused_alone(
    batching: Service, tmp_path: Path
) -> None:
    todo = [*requests(3), Request((Message("user", "x" * 5000),)), *requests(2, 3)]
    with Ledger(tmp_path / "ledger") as ledger:
        tally = send_all(model(batching, batch=True, batch_bytes=4000), lambda: todo, ledger)
    assert tally.answered == 5
    (reason,) = tally.unanswered.values()
    assert "larger than a batch's file may be" in reason
    assert len(tally.refused) == 1


def test_so_many_batches_are_on_their_way_at_once(tmp_path: Path) -> None:
    most = 0

    class Counting(Echoing):
        def work_on(self, batch: dict[str, Any]) -> None:
            nonlocal most
            on_way = [b for b in self.service.batches.values() if b["status"] != "completed"]
            most = max(most, len(on_way))
            super().work_on(batch)

    with serve(handler=Counting) as counting, Ledger(tmp_path / "ledger") as ledger:
        chat = model(counting, batch=True, batch_size=2, batches_at_once=2)
        assert send_all(chat, lambda: requests(11), ledger).answered == 11
        assert len(counting.batches) == 6
    assert most == 2


def test_half_a_line_of_the_journal_is_cut(batching: Service, tmp_path: Path) -> None:
    chat = model(batching, batch=True)
    with Ledger(tmp_path / "ledger") as ledger:
        send_all(chat, lambda: requests(2), ledger)
    journal = tmp_path / "batches.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"coll')
    with Ledger(tmp_path / "ledger") as ledger:
        assert send_all(chat, lambda: requests(3), ledger).answered == 1
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [list(row) for row in rows] == [["mark"], ["collected"], ["collected"]]


class Odd(Echoing):
    """Gives batches as services do that are not OpenAI's own."""

    batch: ClassVar[dict[str, Any]] = {}
    line: ClassVar[dict[str, Any]] = {}
    """Of question 1."""

    def work_on(self, batch: dict[str, Any]) -> None:
        super().work_on(batch)
        if batch["status"] != "completed":
            return
        batch |= self.batch
        name = batch.get("output_file_id")
        if not isinstance(name, str) or name not in self.service.files:
            return
        one = record_of(model(self.service).identity, requests(1, 1)[0]).key
        rows = [json.loads(line) for line in self.service.files[name].splitlines()]
        rows = [{**row, **self.line} if row["custom_id"] == one else row for row in rows]
        self.service.files[name] = "\n".join(map(json.dumps, rows)).encode()


@pytest.mark.parametrize(
    "batch",
    [
        {"error_file_id": ""}, {"error_file_id": None}, {"error_file_id": 0},
        {"error_file_id": []}, {"request_counts": None}, {"request_counts": ["x"]},
        {"request_counts": {"completed": "4", "total": None}}, {"metadata": "x"},
        {"errors": "none"}, {"errors": {"data": "none"}}, {"errors": [1]}, {"created_at": "x"},
    ],
    ids=repr,
)  # fmt: skip
def test_odd_fields_of_a_batch_cost_no_reply(tmp_path: Path, batch: dict[str, Any]) -> None:
    with serve(handler=type("Now", (Odd,), {"batch": batch})) as odd:
        with Ledger(tmp_path / "ledger") as ledger:
            tally = send_all(model(odd, batch=True), lambda: requests(4), ledger)
            assert (tally.answered, len(ledger), tally.unanswered) == (4, 4, {})
        with Ledger(tmp_path / "ledger") as ledger:  # and a resume asks nothing
            assert send_all(model(odd, batch=True), lambda: requests(4), ledger).answered == 0
        assert len(odd.batches) == 1


@pytest.mark.parametrize("name", ["", None, 0, []], ids=repr)
def test_a_batch_without_an_output_leaves_its_requests_open(tmp_path: Path, name: Any) -> None:
    handler = type("Now", (Odd,), {"batch": {"output_file_id": name, "error_file_id": ""}})
    with serve(handler=handler) as odd, Ledger(tmp_path / "ledger") as ledger:
        tally = send_all(model(odd, batch=True), lambda: requests(4), ledger)
        assert (tally.answered, len(tally.unanswered), tally.refused) == (0, 4, set())


@pytest.mark.parametrize(
    ("line", "why", "lasting"),
    [
        ({"response": {"status_code": 400, "body": {"error": {"code": 17, "message": "no"}}}},
         "17 no", True),
        ({"response": {"status_code": 400, "body": {"error": "no"}}}, "no", True),
        ({"response": {"status_code": 400, "body": "no"}}, "no", True),
        ({"response": {"status_code": 400, "body": ["no"]}}, "no", True),
        ({"response": {"status_code": 429, "body": {"error": {"message": "busy"}}}}, "busy", False),
        ({"response": {"status_code": 500, "body": None}}, "no reason given", False),
        ({"response": {"status_code": 200, "body": "yes"}}, "holds no reply", False),
        ({"response": {"status_code": 200, "body": [1]}}, "holds no reply", False),
        ({"response": "no"}, "no", False),
        ({"response": None, "error": "expired"}, "expired", False),
        ({"response": None, "error": {"code": "batch_expired", "message": "late"}}, "late", False),
        ({"response": None, "error": ["late", 7]}, "late; 7", False),
        ({"response": [], "error": None}, "no reason given", False),
        ({"custom_id": 7}, "has no line for it", False),
        ({"custom_id": "zz"}, "has no line for it", False),
    ],
    ids=repr,
)  # fmt: skip
def test_odd_lines_of_a_batch_cost_no_other_reply(
    tmp_path: Path, line: dict[str, Any], why: str, lasting: bool
) -> None:
    with serve(handler=type("Now", (Odd,), {"line": line})) as odd:
        with Ledger(tmp_path / "ledger") as ledger:
            tally = send_all(model(odd, batch=True), lambda: requests(4), ledger)
            assert len(ledger) == 3
        ((key, reason),) = tally.unanswered.items()
        assert key == record_of(model(odd).identity, requests(1, 1)[0]).key
        assert why in reason
        assert tally.refused == ({key} if lasting else set())


def test_a_withheld_reply_of_a_batch_is_a_reply(tmp_path: Path) -> None:
    error = {"error": {"code": "content_filter", "message": "no"}}
    line = {"response": {"status_code": 400, "body": error}}
    handler = type("Now", (Odd,), {"line": line})
    with serve(handler=handler) as odd, Ledger(tmp_path / "ledger") as ledger:
        assert send_all(model(odd, batch=True), lambda: requests(4), ledger).answered == 4
        assert sorted(e.finish for e in ledger) == ["content_filter", *["stop"] * 3]


def test_a_batch_learns_how_the_longest_reply_is_called(tmp_path: Path) -> None:
    class Newer(Echoing):
        def work_on(self, batch: dict[str, Any]) -> None:
            super().work_on(batch)
            name = batch.get("output_file_id")
            if name is None:
                return
            sent = self.service.files[batch["input_file_id"]].splitlines()
            old = {row["custom_id"] for row in map(json.loads, sent) if "max_tokens" in row["body"]}
            error = {"error": {"message": "Unsupported parameter: 'max_tokens'"}}
            rows = [json.loads(line) for line in self.service.files[name].splitlines()]
            for row in rows:
                if row["custom_id"] in old:
                    row["response"] = {"status_code": 400, "body": error}
            self.service.files[name] = "\n".join(map(json.dumps, rows)).encode()

    with serve(handler=Newer) as newer, Ledger(tmp_path / "ledger") as ledger:
        tally = send_all(model(newer, batch=True), lambda: requests(4), ledger)
        assert (tally.answered, tally.unanswered) == (4, {})
        assert len(newer.batches) == 2


@pytest.mark.parametrize(
    "line", [b"[1]\n", b'{"mark": 7}\n', b'{"collected": []}\n', b"\xff\n", b"7\n", b"{}\n"]
)
def test_a_damaged_journal_is_named(batching: Service, tmp_path: Path, line: bytes) -> None:
    (tmp_path / "batches.jsonl").write_bytes(line)
    with (
        Ledger(tmp_path / "ledger") as ledger,
        pytest.raises(DataError, match=r"batches\.jsonl is damaged"),
    ):
        send_all(model(batching, batch=True), lambda: requests(2), ledger)


def test_a_batch_within_a_budget(batching: Service, tmp_path: Path) -> None:
    chat = model(batching, batch=True, price=PRICE, max_tokens=20)
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(ChatError, match="budget_usd"):
        send_all(chat, lambda: requests(100), ledger, budget_usd=0.02)
    assert 0 < len(batching.asked) <= 20


# -- no key anywhere -------------------------------------------------------------------------------


def test_the_key_is_nowhere(service: Service, batching: Service, tmp_path: Path) -> None:
    service.actions = [lambda h, b: h.fail(500, f"Bearer {KEY}")]
    service.otherwise = lambda h, b: h.answer(f"Bearer {KEY}")
    with Ledger(tmp_path / "ledger") as ledger:
        send_all(model(service), lambda: requests(3), ledger)
    (tmp_path / "batch").mkdir()
    with Ledger(tmp_path / "batch" / "ledger") as ledger:
        send_all(model(batching, batch=True), lambda: requests(3), ledger)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix != ".lock"]) == 3
    for path in files:
        assert KEY.encode() not in path.read_bytes()
