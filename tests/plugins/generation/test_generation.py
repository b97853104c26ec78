"""The step `generate` with a chat model behind it: its data, its money, and what a crash costs."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from tests import published
from tests.core.processes import finish, start
from tests.plugins.chat_server import (
    KEY,
    TEACHER,
    Handler,
    Service,
    lesson,
    serve,
    teach,
    user_text,
)

from llavakit import Message, Registry
from llavakit.cli import main
from llavakit.recipe.recipe import Recipe
from llavakit_plugins.datasets.conversations import Conversations
from llavakit_plugins.generation.coco import convert_coco, is_coco
from llavakit_plugins.generation.contexts import Contexts
from llavakit_plugins.generation.requests.ledger import Ledger, hash_messages

SHARED = published.folder()
KINDS = ("conversation", "detail", "reasoning")

RECIPE = (
    """\
name = "taught"
seed = 3

[[steps]]
use = "generate"
contexts = "{contexts}"
concurrency = 8
{more}
"""
    + TEACHER
    + """\
backoff = 0.02
timeout = 20
"""
)


@pytest.fixture
def service() -> Iterator[Service]:
    with serve(Service(otherwise=teach)) as running:
        yield running


def contexts(folder: Path, count: int) -> Path:
    path = folder / "contexts.jsonl"
    rows = [
        {
            "id": f"{number:04}", "image": f"{number:04}.jpg",
            "captions": [f"Thing number {number}.", "Some thing."],
            "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}],
        }
        for number in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(folder: Path, service: Service, count: int = 12, more: str = "") -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(contexts=contexts(folder, count), url=service.url, more=more))
    return path


def made(folder: Path) -> dict[str, bytes]:
    names = [f"{name}.json" for name in ("instruct", "captions", *KINDS)]
    return {name: (folder / "01-generate" / name).read_bytes() for name in names}


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_job_from_contexts_to_data(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.actions = [
        lambda h, b: h.answer("I'm sorry, I can't."),
        lambda h, b: h.fail(500, "oh"),
        lambda h, b: h.answer(f"Sure!\n{lesson(b)}"),
    ]
    recipe, out = write_recipe(tmp_path, service), tmp_path / "run"
    assert main([str(recipe), "--out", str(out)]) == 0
    step = out / "01-generate"
    rows = json.loads((step / "instruct.json").read_text())
    assert [row["id"] for row in rows] == [f"{n:04}-{kind}" for n in range(12) for kind in KINDS]
    for row in rows:
        assert list(row) == ["id", "image", "conversations"]
        assert [turn["from"] for turn in row["conversations"]][:2] == ["human", "gpt"]
        assert row["conversations"][0]["value"].count("<image>") == 1
    for kind in KINDS:
        alone = json.loads((step / f"{kind}.json").read_text())
        assert alone == [row for row in rows if row["id"].endswith(kind)]
    # each row is a line
    lines = (step / "instruct.json").read_text().splitlines()
    assert [json.loads(line.strip(",")) for line in lines[1:-1]] == rows
    assert (lines[0], lines[-1]) == ("[", "]")
    origins = rows_of(step / "provenance.jsonl")
    assert [origin["id"] for origin in origins] == [row["id"] for row in rows]
    assert origins[0]["refused"] == ["the teacher refuses"]
    assert origins[0]["draw"] == 1
    assert origins[0]["usd"] == pytest.approx(0.002)
    assert all(origin["model"] == "gpt-4o-2024-08-06" for origin in origins)
    assert len({origin["prompt"] for origin in origins}) == 36
    assert Counter(origin["verdict"] for origin in origins)["repaired"] == 1
    assert not (step / "rejected.jsonl").read_text()
    captions = json.loads((step / "captions.json").read_text())
    assert len(captions) == 12
    with Ledger(step / "ledger.sqlite") as ledger:
        assert len(ledger) == 37
        assert ledger.spent == pytest.approx(37 * 0.002)
    artifact = json.loads((step / "artifact.json").read_text())
    assert artifact["metrics"]["usd"] == pytest.approx(37 * 0.002)
    events = rows_of(out / "events.jsonl")
    assert [event["usd"] for event in events if event["event"] == "asked"][-1] == (
        pytest.approx(37 * 0.002)
    )
    page = (step / "review.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "I&#39;m sorry" not in page  # the reply that was replaced is not the one shown
    assert page.count('<article class="reply') == 36
    # how questions begin: as many as the data have, the longest bar for the most frequent
    questions = [row["conversations"][0]["value"] for row in rows if "conversation" in row["id"]]
    questions += [row["conversations"][2]["value"] for row in rows if "conversation" in row["id"]]
    begins = Counter(" ".join(q.replace("<image>", "").lower().split()[:2]) for q in questions)
    assert begins == {"what is": 12, "what else": 12}
    for begin, count in begins.items():
        assert re.search(
            rf'<td>{begin}</td>.*width="100\.0%".*<td class="number">{count}</td>.*50\.0 %', page
        )
    assert "The two first words of 24 questions, which begin in 2 ways." in page
    assert "Thing number 7" in page
    report = (out / "report.html").read_text()
    assert "What became of the replies" in report
    said = capsys.readouterr()
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert KEY not in path.read_text(errors="replace"), path
    assert KEY not in said.out + said.err
    # the data set reads what the step wrote
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number:04}.jpg")
    options = Conversations.Options(path=step / "instruct.json", images=tmp_path / "images")
    assert len(Conversations(options)) == 36


def test_the_price_is_known_before(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("OPENAI_API_KEY")  # a plan needs no key
    recipe = write_recipe(tmp_path, service)
    assert main([str(recipe), "--plan"]) == 0
    text = capsys.readouterr().out
    assert "36 requests" in text
    assert "(counted; as o200k_base)" in text
    assert not service.asked
    # the same, from what is then really sent
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 0
    import tiktoken

    encoding = tiktoken.get_encoding("o200k_base")
    sent = sum(
        3 + sum(4 + len(encoding.encode(message["content"])) for message in body["messages"])
        for body in service.asked
    )
    assert f"{sent:,} tokens sent" in text
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    least = sent * 10 / 1e6
    assert least < plan["steps"]["01-generate"]["cost_usd"] < least + 36 * 1024 * 100 / 1e6


def test_the_price_is_of_the_contexts_that_are_drawn(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, service, more='kinds = ["detail"]\ncounts = { detail = 5 }\n')
    path = tmp_path / "contexts.jsonl"
    rows = rows_of(path)
    for number, row in enumerate(rows):
        row["captions"][0] += f" Thing {number}." * number**2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(recipe), "--plan"]) == 0
    planned = capsys.readouterr().out
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 0
    import tiktoken

    encoding = tiktoken.get_encoding("o200k_base")
    sent = sum(
        3 + sum(4 + len(encoding.encode(message["content"])) for message in body["messages"])
        for body in service.asked
    )
    assert f"5 requests; {sent:,} tokens sent" in planned


def test_an_unknown_price_is_not_said_to_be_nothing(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, service), tmp_path / "run"
    recipe.write_text(recipe.read_text().replace("price =", "# price ="))
    assert main([str(recipe), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "price not known" in said
    assert "USD" not in said
    assert "0.00 USD" not in (out / "01-generate" / "review.html").read_text()
    metrics = json.loads((out / "01-generate" / "artifact.json").read_text())["metrics"]
    assert "usd" not in metrics
    events = [event for event in rows_of(out / "events.jsonl") if event["event"] == "asked"]
    assert events[-1]["usd"] is None


@pytest.mark.parametrize("generator", ["", '\ngenerator = { use = "offline" }'])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("contexts = '{folder}/empty'", "empty holds no contexts"),
        ("held_out = '{folder}/empty'", "empty holds no contexts"),
        ("instances = '{folder}/empty'", "`instances` are COCO's boxes, but"),
        ('kinds = ["detail"]\ncounts = {{ reasoning = 3 }}', "`reasoning` is not among `kinds`"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    change: str, sentence: str, generator: str,
) -> None:  # fmt: skip
    (tmp_path / "empty").write_text("\n\n")
    recipe = write_recipe(tmp_path, service, more=change.format(folder=tmp_path))
    lines = recipe.read_text().splitlines()
    if change.startswith("contexts"):
        lines = [line for line in lines if not line.startswith(f'contexts = "{tmp_path}')]
    if generator:
        lines = [*lines[: lines.index("[steps.generator]")], generator]
    recipe.write_text("\n".join(lines))
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert sentence in capsys.readouterr().err
    assert not service.asked
    assert not (tmp_path / "run" / "01-generate").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "0001"}, "has context `0001` more than once"),
        ({"image": "../secret.jpg"}, "image `../secret.jpg` of context `0003` of"),
        ({"captions": ["half a \ud83d"]}, "contexts.jsonl:4: a text ends within a character"),
        (
            {"instances": [{"category": "a", "bbox": [0.9, 0.5, 0.1, 0.6]}]},
            "contexts.jsonl:4: the box of `a` ends before it begins",
        ),
    ],
)
def test_what_could_not_be_used_is_said_before_it_is_paid_for(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    change: dict[str, Any], said: str,
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path, service, count=4)
    path = tmp_path / "contexts.jsonl"
    rows = rows_of(path)
    rows[3] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not service.asked


def test_who_is_refused_leaves_no_folder(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY[::-1])
    recipe, out = write_recipe(tmp_path, service), tmp_path / "run"
    assert main([str(recipe), "--out", str(out)]) == 2
    assert not (out / "01-generate").exists()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main([str(recipe), "--out", str(out)]) == 0
    assert not (out / "superseded").exists()


def test_the_built_in_recipe_has_a_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["instruct158k", "--plan"]) == 0
    text = capsys.readouterr().out
    assert "158,000 requests" in text
    assert "services: " in text
    assert (
        Recipe.load(
            Path(__file__).parents[3] / "recipes" / "instruct158k.toml", Registry.installed()
        ).model
        is None
    )


def test_what_stays_unusable_is_kept_aside(service: Service, tmp_path: Path) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        if "number 3." in user_text(body):
            handler.answer("I'm sorry, I can't help with that.")
        elif "number 5." in user_text(body):
            handler.fail(400, "too long")
        elif "number 7." in user_text(body) or "number 8." in user_text(body):
            handler.answer(
                lesson({**body, "messages": [body["messages"][0], {"content": "Same."}]})
            )
        else:
            teach(handler, body)

    service.otherwise = answer
    recipe, out = write_recipe(tmp_path, service, more="attempts = 2\n"), tmp_path / "run"
    assert main([str(recipe), "--out", str(out)]) == 0
    aside = {row["id"]: row for row in rows_of(out / "01-generate" / "rejected.jsonl")}
    assert set(aside) == {f"{number:04}-{kind}" for number in (3, 5, 8) for kind in KINDS}
    for kind in KINDS:
        assert aside[f"0003-{kind}"]["refused"] == ["the teacher refuses"] * 2
        assert "too long" in aside[f"0005-{kind}"]["unanswered"]
        assert aside[f"0008-{kind}"]["refused"] == ["the same as the reply on another image"] * 2
    asked = Counter(map(user_text, service.asked))
    assert {count for text, count in asked.items() if "number 3." in text} == {2, 4}
    rows = json.loads((out / "01-generate" / "instruct.json").read_text())
    assert len(rows) == 27
    page = (out / "01-generate" / "review.html").read_text()
    sample, _, unusable = page.partition("What stayed unusable")
    assert "attempt 2: the teacher refuses" in sample  # there is a reply to show
    assert "0005-" not in sample
    assert unusable.count("too long") == 3


AWAY = {
    "nobody is there": None,
    "429 without end": lambda h, b: h.fail(429, "slow down"),
    "500 without end": lambda h, b: h.fail(500, "oh"),
    "no HTTP": lambda h, b: h.raw(b"HTTP/1.1 abc OK\r\n\r\n"),
    "replies that are none": lambda h, b: h.json(200, {"choices": []}),
}
QUICK = [
    "--set", "steps.generate.generator.chat.retries=0",
    "--set", "steps.generate.generator.chat.patience=0",
]  # fmt: skip


@pytest.mark.parametrize("fault", AWAY.values(), ids=AWAY)
def test_a_service_that_is_down_is_not_taken_for_done(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Any
) -> None:
    recipe, out = write_recipe(tmp_path, service, 2), tmp_path / "run"
    down = recipe.read_text()
    if fault is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            down = down.replace(service.url, f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    else:
        service.otherwise = fault
    recipe.write_text(down)
    command = [str(recipe), "--out", str(out), *QUICK]
    for again in ([], ["--resume"]):
        assert main([*command, *again]) == 2
        said = capsys.readouterr()
        assert "6 of 6 requests have no answer for now" in said.err
        assert "--resume" in said.err
        assert "done" not in said.out
    assert not (out / "01-generate" / "artifact.json").exists()


@pytest.mark.parametrize("fault", [AWAY["500 without end"], AWAY["429 without end"]])
def test_what_has_no_answer_for_now_is_asked_by_a_resume_alone(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Any
) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        if "number 3." in user_text(body):
            fault(handler, body)
        else:
            teach(handler, body)

    service.otherwise = answer
    recipe, out = write_recipe(tmp_path, service), tmp_path / "run"
    command = [str(recipe), "--out", str(out), *QUICK]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "3 of 36 requests have no answer for now" in said
    step = out / "01-generate"
    assert len(json.loads((step / "instruct.json").read_text())) == 33  # to be looked at
    aside = rows_of(step / "rejected.jsonl")
    assert {row["id"] for row in aside} == {f"0003-{kind}" for kind in KINDS}
    assert all("status" in row["unanswered"] for row in aside)
    service.asked.clear()
    service.otherwise = teach
    assert main([*command, "--resume"]) == 0
    assert len(service.asked) == 3
    assert all("number 3." in user_text(body) for body in service.asked)
    assert len(json.loads((step / "instruct.json").read_text())) == 36


def test_a_service_that_refuses_few_requests_all_is_not_taken_for_done(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.otherwise = lambda h, b: h.fail(400, "no such field")
    recipe, out = write_recipe(tmp_path, service, 2), tmp_path / "run"
    assert main([str(recipe), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "the service refuses all of 6 requests; the last: " in said
    assert "no such field" in said
    assert len(service.asked) == 6  # what is refused is not asked again in the same run


def test_replies_of_which_none_can_be_used_are_not_taken_for_done(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.otherwise = lambda h, b: h.answer("I'm sorry, I can't.")
    recipe, out = write_recipe(tmp_path, service, 2, "attempts = 1\n"), tmp_path / "run"
    for again in ([], ["--resume"]):
        assert main([str(recipe), "--out", str(out), *again]) == 2
        assert "of 6 conversations none can be used" in capsys.readouterr().err
        assert len(service.asked) == 6
    assert (out / "01-generate" / "review.html").is_file()


def test_what_the_world_sends_drives_no_terminal(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids, names of images, replies and what a service complains of."""
    evil = "\x1b[2J\x1b]0;owned\x07\x9b31m"

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        if "number 1." in user_text(body):
            handler.fail(400, f"no {evil}")
        elif "number 2." in user_text(body):
            handler.answer(f"A picture {evil}.")
        else:
            handler.answer(lesson(body), model=f"gpt {evil}")

    service.otherwise = answer
    recipe, out = write_recipe(tmp_path, service, 4, "attempts = 1\n"), tmp_path / "run"
    path = tmp_path / "contexts.jsonl"
    rows = rows_of(path)
    for row in rows:
        row |= {"id": f"{row['id']}{evil}", "image": f"{row['id']}{evil}.jpg"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(recipe), "--out", str(out)]) == 0
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    assert main([str(recipe), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert r"\x1b[2J" in said.err
    for text in (said.out, said.err, (out / "report.md").read_text(), events_of(out)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def events_of(out: Path) -> str:
    return (out / "events.jsonl").read_text()


def test_given_replies_make_the_same_bytes(service: Service, tmp_path: Path) -> None:
    """Whatever the order in which replies come, and without asking anybody."""
    draw = random.Random(0)

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(draw.random() / 50)
        teach(handler, body)

    service.otherwise = answer
    recipe = write_recipe(tmp_path, service)
    assert main([str(recipe), "--out", str(tmp_path / "a")]) == 0
    assert main([str(recipe), "--out", str(tmp_path / "b"), "--set", "steps.1.concurrency=3"]) == 0
    count = len(service.asked)
    text = recipe.read_text()
    head = text[: text.index("[steps.generator.chat]")]
    ledger = tmp_path / "a" / "01-generate" / "ledger.sqlite"
    replay = tmp_path / "replay.toml"
    replay.write_text(f'{head}[steps.generator.chat]\nuse = "replay"\npath = "{ledger}"\n')
    assert main([str(replay), "--out", str(tmp_path / "c")]) == 0
    assert len(service.asked) == count
    assert made(tmp_path / "a") == made(tmp_path / "b") == made(tmp_path / "c")


def test_tiny_makes_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Whatever the concurrency, and however a process orders its sets."""
    built_in = Path(__file__).parents[3] / "recipes" / "tiny.toml"
    table = tomllib.loads(built_in.read_text())
    steps = [step for step in table["steps"] if step["use"] in ("scenes", "generate")]
    assert [step["use"] for step in steps] == ["scenes", "generate"]
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tomli_w.dumps({"name": "tiny", "steps": steps}))
    small = ["--set", "steps.scenes.train=60", "--set", "steps.scenes.test=24"]
    assert main([str(recipe), "--out", str(tmp_path / "a"), *small]) == 0
    command = [sys.executable, "-m", "llavakit.cli", str(recipe), "--out", str(tmp_path / "b")]
    other = ["--set", "steps.generate.concurrency=1"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([*command, *small, *other], env=environment, check=True, capture_output=True)
    folders = [tmp_path / run / "02-generate" for run in "ab"]
    first, second = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.json")}
        for folder in folders
    )
    data = [name for name in first if name not in ("begun.json", "artifact.json")]
    assert set(data) == {
        f"{folder}{name}.json"
        for folder in ("", "held-out/")
        for name in ("captions", "instruct", *KINDS)
    }
    assert {name: first[name] for name in data} == {name: second[name] for name in data}
    assert len(json.loads(first["instruct.json"])) == 180


def test_a_budget_stops_and_more_money_goes_on(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, service, more="budget_usd = 0.04\n"), tmp_path / "run"
    command = [
        str(recipe),
        "--out",
        str(out),
        "--set",
        "steps.generate.generator.chat.max_tokens=40",
    ]
    assert main(command) == 2
    assert "stopped at budget_usd = 0.04" in capsys.readouterr().err
    before = len(service.asked)
    assert 0 < before < 36
    with Ledger(out / "01-generate" / "ledger.sqlite") as ledger:
        assert ledger.spent <= 0.04
        asked = [row for row in rows_of(out / "events.jsonl") if row["event"] == "asked"]
        assert asked[-1]["replies"] == len(ledger)
        assert asked[-1]["usd"] == pytest.approx(ledger.spent)
    assert (out / "01-generate" / "review.html").is_file()  # to look at what there is
    # another budget is another recipe: the folder is set aside, what it paid for is not
    assert main([*command, "--set", "steps.generate.budget_usd=10"]) == 0
    assert len(service.asked) == 36
    assert len(json.loads((out / "01-generate" / "instruct.json").read_text())) == 36


def test_counts_draw_contexts_for_each_kind(service: Service, tmp_path: Path) -> None:
    more = "counts = { conversation = 5, detail = 2, reasoning = 7 }\n"
    recipe, out = write_recipe(tmp_path, service, more=more), tmp_path / "run"
    assert main([str(recipe), "--out", str(out)]) == 0
    rows = json.loads((out / "01-generate" / "instruct.json").read_text())
    kinds = Counter(row["id"].partition("-")[2] for row in rows)
    assert kinds == {"conversation": 5, "detail": 2, "reasoning": 7}
    assert len({row["id"] for row in rows}) == 14


# -- SIGKILL ---------------------------------------------------------------------------------------


class Valve:
    """Lets through so many replies, and no more until it is opened further."""

    def __init__(self) -> None:
        self.left: float = 0
        self.life = 0
        self._moved = threading.Condition()

    def open(self, replies: float) -> None:
        """Begin another life of the job; requests of earlier ones get no answer any more."""
        with self._moved:
            self.left = replies
            self.life += 1
            self._moved.notify_all()

    def answer(self, handler: Handler, body: dict[str, Any]) -> None:
        with self._moved:
            life = self.life
            while self.left <= 0 and self.life == life:
                self._moved.wait()
            if self.life != life:
                handler.hang_up()
                return
            self.left -= 1
        teach(handler, body)


def untold(text: str) -> str:
    """Return a recipe with a model whose tokens are estimated: no vocabulary is to be loaded."""
    return text.replace('"gpt-4o"', '"teacher"')


@pytest.mark.parametrize(
    ("kills", "count"), [(4, 40), pytest.param(50, 420, marks=pytest.mark.slow)]
)
def test_killed_at_any_time_it_asks_nothing_twice_and_loses_nothing(
    service: Service, tmp_path: Path, kills: int, count: int
) -> None:
    valve = Valve()
    service.otherwise = valve.answer
    recipe, out = write_recipe(tmp_path, service, count), tmp_path / "run"
    recipe.write_text(untold(recipe.read_text()))
    ledger = out / "01-generate" / "ledger.sqlite"
    draw = random.Random(1)
    kept: dict[str, str] = {}
    for _ in range(kills):
        before = len(service.asked)
        replies = draw.randrange(25)  # all of them together are fewer than the job needs
        valve.open(replies)
        process = start(tmp_path, recipe, "--out", out, "--resume")
        if draw.random() < 0.8:  # the others are killed somewhere before they ask anything
            wait_for(lambda: len(service.asked) > before + replies, process)  # noqa: B023
        time.sleep(draw.random() * 0.1)  # the replies are being written down, or are on the disk
        assert process.pid is not None
        assert process.exitcode is None, terminal(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL, terminal(tmp_path)
        again = {prompt_hash(body) for body in service.asked[before:]} & set(kept)
        assert not again, "what is in the ledger was asked for again"
        now = {}
        if ledger.is_file():
            with Ledger(ledger, writable=False) as found:
                now = {entry.prompt: entry.text for entry in found}
        assert now.items() >= kept.items(), "a reply that was in the ledger is lost"
        kept = now
    assert kept
    before = len(service.asked)
    valve.open(math.inf)
    process = start(tmp_path, recipe, "--out", out, "--resume")
    assert finish(process) == 0, terminal(tmp_path)
    assert not {prompt_hash(body) for body in service.asked[before:]} & set(kept)
    rows = json.loads((out / "01-generate" / "instruct.json").read_text())
    assert [row["id"] for row in rows] == [f"{n:04}-{kind}" for n in range(count) for kind in KINDS]
    # only what was on its way or being written when a kill came was asked for twice
    assert len(service.asked) <= 3 * count + kills * (8 + 2)
    with Ledger(ledger) as found:
        assert len(found) == 3 * count


@pytest.mark.slow
def test_killed_before_each_of_its_writes_it_ends_with_the_same_data(
    service: Service, tmp_path: Path
) -> None:
    """From the first folder to the report: also where it sets up, and where it writes the data."""
    recipe, out = write_recipe(tmp_path, service, 2), tmp_path / "run"
    recipe.write_text(untold(recipe.read_text()))
    assert main([str(recipe), "--out", str(tmp_path / "whole")]) == 0
    expected, needed = made(tmp_path / "whole"), len(service.asked)
    assert needed == 6
    writes = 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        writes += 1
        code = finish(start(tmp_path, recipe, "--out", out, "--resume", kill_at=writes))
    assert code == 0, terminal(tmp_path)
    assert writes > 20
    assert made(out) == expected
    # a kill right before a reply is written loses it, and the one that was on its way beside it
    assert len(service.asked) <= 2 * needed + 2 * needed
    with Ledger(out / "01-generate" / "ledger.sqlite") as found:
        assert len(found) == needed


def wait_for(condition: Callable[[], bool], process: BaseProcess, seconds: float = 240) -> None:
    """Wait for what a process does; how long it takes on a loaded machine is not the question."""
    end = time.monotonic() + seconds
    while not condition() and process.exitcode is None:
        assert time.monotonic() < end, "the process does nothing"
        time.sleep(0.002)


def terminal(folder: Path) -> str:
    """Return the end of what processes said, to be shown where a test fails."""
    return (folder / "terminal.txt").read_text()[-2000:]


def prompt_hash(body: dict[str, Any]) -> str:
    return hash_messages([Message(m["role"], m["content"]) for m in body["messages"]])


# -- COCO ------------------------------------------------------------------------------------------


def coco(folder: Path, rows: list[dict[str, Any]]) -> tuple[Path, Path]:
    """Write COCO's two files for rows of the shared kind, on images of 640 x 480 pixels."""
    names = sorted({item["category"] for row in rows for item in row["instances"]})
    images = [
        {"id": int(row["id"]), "file_name": row["image"], "width": 640, "height": 480}
        for row in rows
    ]
    texts = [
        {"id": number, "image_id": int(row["id"]), "caption": caption}
        for number, (row, caption) in enumerate((r, c) for r in rows for c in r["captions"])
    ]
    boxes = [
        {
            "id": number, "image_id": int(row["id"]), "iscrowd": 0,
            "category_id": names.index(item["category"]) + 1, "segmentation": [[1.5, 2.5]],
            "bbox": [
                item["bbox"][0] * 640, item["bbox"][1] * 480,
                (item["bbox"][2] - item["bbox"][0]) * 640,
                (item["bbox"][3] - item["bbox"][1]) * 480,
            ],
        }
        for number, (row, item) in enumerate((r, i) for r in rows for i in r["instances"])
    ]  # fmt: skip
    random.Random(0).shuffle(texts)
    texts.sort(key=lambda text: text["id"] % 5)  # captions of an image lie apart, in their order
    captions, instances = folder / "captions.json", folder / "instances.json"
    captions.write_text(json.dumps({"info": {}, "images": images, "annotations": texts}))
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    instances.write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": categories})
    )
    return captions, instances


def test_cocos_files_give_the_contexts_that_llava_bench_has(tmp_path: Path) -> None:
    path = SHARED / "coco80" / "caps_boxes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    captions, instances = coco(tmp_path, rows)
    assert is_coco(captions)
    assert not is_coco(path)
    convert_coco(captions, instances, tmp_path / "out.jsonl")
    expected, found = Contexts(path), Contexts(tmp_path / "out.jsonl")
    assert len(rows) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert (one.id, one.image, one.boxes) == (other.id, other.image, other.boxes)
        assert sorted(" ".join(c.split()) for c in one.captions) == sorted(other.captions)
    expected.close()
    found.close()


def test_images_of_coco_that_nobody_described_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 4, "height": 4} for n in range(3)]
    said = [{"id": 1, "image_id": 1, "caption": "a red bus"}]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": said}))
    convert_coco(path, None, tmp_path / "out.jsonl")
    assert [row["image"] for row in rows_of(tmp_path / "out.jsonl")] == ["1.jpg"]
    assert f"2 images of {path} have no captions" in caplog.text


def test_any_teacher_can_be_told_of_cocos_files(tmp_path: Path) -> None:
    rows = rows_of(SHARED / "coco80" / "caps_boxes.jsonl")
    captions, instances = coco(tmp_path, [row for row in rows if row["instances"]][:7])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[[steps]]\nuse = "generate"\ncontexts = "{captions}"\ninstances = "{instances}"\n'
        'counts = { detail = 3 }\ngenerator = { use = "offline" }\n'
    )
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 0
    made = json.loads((tmp_path / "run" / "01-generate" / "instruct.json").read_text())
    assert Counter(row["id"].partition("-")[2] for row in made) == {
        "conversation": 7, "detail": 3, "reasoning": 7,
    }  # fmt: skip


PLAIN = "0123456789abcdef0123456789abcdef"
SECRETS = {
    f'api_key = "{KEY}"': KEY,
    'api_key = "no-usual-form"': "no-usual-form",
    'token = "no-usual-form"': "no-usual-form",
    "password = 'no-usual-form'": "no-usual-form",
    f'key_env = "{KEY}"': KEY,
    f'key_file = "{KEY}"': KEY,
    f'key_file = "{PLAIN}"': PLAIN,
    'extra = { api_key = "no-usual-form" }': "no-usual-form",
    'extra = { headers = { Authorization = "no-usual-form" } }': "no-usual-form",
    f'extra = {{ user = "{KEY}" }}': KEY,
    'base_url = "https://me:no-usual-form@host/v1"': "no-usual-form",
    'base_url = "https://no-usual-form@host/v1"': "no-usual-form",
    'base_url = "https://host:1/v1#no-usual-form"': "no-usual-form",
    'base_url = "https://host/v1?no-usual-form"': "no-usual-form",
    'base_url = "https://host/v1?key=no-usual-form"': "no-usual-form",
    f'base_url = "https://host/{KEY}/v1"': KEY,
    f'base_url = "https://host:x/{PLAIN}/v1"': PLAIN,
}


@pytest.mark.parametrize(("line", "secret"), SECRETS.items())
def test_a_secret_in_a_recipe_is_refused_and_not_shown(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, secret: str
) -> None:
    recipe = write_recipe(tmp_path, service)
    name = line.partition(" ")[0]
    rest = [own for own in recipe.read_text().splitlines() if not own.startswith(name)]
    recipe.write_text("\n".join([*rest, line, ""]))
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert f"recipe.toml:{len(rest) + 1}: " in said.err
    assert name in said.err
    assert secret not in said.out + said.err
    assert not (tmp_path / "run").exists()
    key, _, value = line.partition(" = ")
    command = [str(write_recipe(tmp_path, service)), "--out", str(tmp_path / "run")]
    assert main([*command, "--set", f"steps.generate.generator.chat.{key}={value}"]) == 2
    assert secret not in capsys.readouterr().err


def test_what_may_be_a_key_within_an_address_is_written_nowhere(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, service, 2), tmp_path / "run"
    recipe.write_text(recipe.read_text().replace("/v1", f"/{PLAIN}/v1"))
    assert main([str(recipe), "--out", str(out)]) == 0
    assert main([str(recipe), "--out", str(out)]) == 0  # the same run still, and done
    assert all(path.startswith(f"/{PLAIN}/v1") for path in service.paths)
    said = capsys.readouterr()
    assert "done before" in said.err
    assert len(service.asked) == 6
    assert PLAIN not in said.out + said.err
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert PLAIN not in path.read_text(errors="replace"), path


@pytest.mark.parametrize(
    "line", [f'api_key = "{KEY}"', 'api_key = "no-usual-form"', f'key_env = "{KEY}"']
)
def test_a_key_in_a_recipe_is_refused_and_not_shown(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    recipe = write_recipe(tmp_path, service)
    recipe.write_text(f"{recipe.read_text()}{line}\n")
    assert main([str(recipe), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert line.partition(" ")[0] in said.err
    for text in (said.out, said.err):
        assert KEY not in text
        assert "no-usual-form" not in text
    assert not (tmp_path / "run").exists()
    name = "steps.generate.generator.chat.api_key"
    assert main([str(write_recipe(tmp_path, service)), "--set", f"{name}={KEY}"]) == 2
    assert KEY not in capsys.readouterr().err
