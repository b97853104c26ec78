"""`llava-run predict`: any questions, any model, several processes, any kill, one file."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.conftest import WORDS, Command, RecipeWriter
from tests.core import processes
from tests.core.engine.test_distributed import llava_run as torchrun
from tests.plugins.chat_server import KEY, Handler, Service, images_of, serve, user_text

import llavakit
from llavakit import Recipe, Registry
from llavakit.cli import main
from llavakit.model.folder import create_model, save_model
from llavakit_plugins.generation.requests.ledger import Ledger

SHORT = ("--device", "cpu", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture
def model(made: Path, write_recipe: RecipeWriter) -> Path:
    """The folder of a small model with random weights."""
    folder = made / "model"
    if not folder.exists():
        registry = Registry.installed()
        recipe = Recipe.load(write_recipe(), registry)
        save_model(create_model(recipe.parts(), registry, seed=0), folder)
    return folder


@pytest.fixture
def questions(made: Path) -> Path:
    """LLaVA's JSON lines: 40 questions of many lengths, with no image, one or two."""
    path = made / "questions.jsonl"
    if path.exists():
        return path
    rows = []
    for number in range(40):
        text = " ".join(WORDS[(number * 7 + k) % len(WORDS)] for k in range(1 + number * 5 % 13))
        names = []
        for k in range(number % 3):
            names.append(f"{number}-{k}.png")
            noise = Image.effect_noise((30 + number, 40), 90).convert("RGB")
            noise.save(made / names[-1])
        row: dict[str, Any] = {"question_id": number, "text": text, "category": "conv"}
        if names:
            row["image"] = names[0] if len(names) == 1 else names
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def alone(model: Path, questions: Path) -> list[str]:
    """Return what `generate` answers to each question by itself."""
    loaded = llavakit.load(model, device="cpu")
    found = []
    for row in rows(questions):
        names = row.get("image", [])
        names = [names] if isinstance(names, str) else names
        images = [questions.parent / name for name in names]
        found.append(loaded.generate(row["text"], images=images, max_new_tokens=6))
    return found


def test_questions_become_answers(
    model: Path, questions: Path, tmp_path: Path, llava_run: Command
) -> None:
    out = tmp_path / "answers.jsonl"
    code, _, err = llava_run("predict", model, questions, out, *SHORT, "--batch-size", 7)
    assert code == 0, err
    assert "40/40" in err
    found = rows(out)
    asked = rows(questions)
    assert [row["text"] for row in found] == alone(model, questions)
    assert len({row["text"] for row in found}) > 5  # else equal answers would prove little
    for row, question in zip(found, asked, strict=True):
        assert row["question_id"] == question["question_id"]
        assert row["prompt"] == question["text"].strip()
        assert row["model_id"] == str(model)
        assert row["category"] == "conv"
        assert row["metadata"] == {"max_new_tokens": 6, "temperature": 0.0}
    assert len({row["answer_id"] for row in found}) == 40
    assert sorted(path.name for path in tmp_path.iterdir() if "answers" in path.name) == [out.name]
    before = out.read_bytes()
    code, _, err = llava_run("predict", model, questions, out, *SHORT)
    assert code == 0
    assert "done before" in err
    assert out.read_bytes() == before


def test_processes_share_the_questions(
    model: Path, questions: Path, tmp_path: Path, llava_run: Command, refused: Callable[..., str]
) -> None:
    outs = [tmp_path / f"{count}.jsonl" for count in (1, 3)]
    for count, out in zip((1, 3), outs, strict=True):
        settings = (*SHORT, "--batch-size", 7, "--processes", count)
        code, _, err = llava_run("predict", model, questions, out, *settings)
        assert code == 0, err
        assert "40/40" in err
    assert outs[0].read_bytes() == outs[1].read_bytes()
    said = refused("predict", model, questions, tmp_path / "no.jsonl", *SHORT, "--processes", 0)
    assert "--processes" in said


def test_what_is_there_already_is_not_replaced(
    model: Path, questions: Path, tmp_path: Path, llava_run: Command, refused: Callable[..., str]
) -> None:
    out = tmp_path / "answers.jsonl"
    few = ("--limit", 3)
    assert llava_run("predict", model, questions, out, *SHORT, *few).code == 0
    for other in (("--limit", 4), ("--limit", 3, "--max-new-tokens", 7), (*few, "--model-id", "x")):
        said = refused("predict", model, questions, out, *SHORT, *other)
        assert "is there already, and not with these questions' answers of this model" in said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    others: list[Any] = ["text", [1], 3, {}]  # of another's program
    for metadata in others:
        lines[0]["metadata"] = metadata
        out.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        assert "is there already" in refused("predict", model, questions, out, *SHORT, *few)
    out.write_text("my own notes\n")
    assert "not valid JSON" in refused("predict", model, questions, out, *SHORT, *few)
    assert out.read_text() == "my own notes\n"


# -- kills -----------------------------------------------------------------------------------------


def settle(path: Path, lines: int, process: Any) -> None:
    end = time.monotonic() + 60
    while process.is_alive() and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("sampled", [(), ("--temperature", "0.9", "--top-p", "0.95")])
def test_killed_at_any_moment_it_arrives_at_the_same_file(
    model: Path, questions: Path, tmp_path: Path, llava_run: Command, sampled: tuple[str, ...]
) -> None:
    command = ("predict", model, questions)
    how = (*SHORT, "--batch-size", 3, *sampled)
    assert llava_run(*command, tmp_path / "whole.jsonl", *how).code == 0
    out = tmp_path / "answers.jsonl"
    partial = tmp_path / "answers.jsonl.work" / "answers.jsonl"
    draw = random.Random(5)
    killed = 0
    for attempt in range(4):
        process = processes.start(tmp_path, *command, out, *how)
        settle(partial, 1 + attempt * 9, process)
        time.sleep(draw.random() * 0.02)
        if process.is_alive() and not out.exists():
            process.kill()
            killed += processes.finish(process) == -signal.SIGKILL
            if partial.exists() and attempt == 1:
                with partial.open("ab") as file:  # as a kill within a write may leave it
                    file.write(b'{"question_id": 39, "prompt": "half')
    assert killed >= 2, (tmp_path / "terminal.txt").read_text()
    done = len(rows_of_whole_lines(partial)) if partial.exists() else 0
    assert done, "nothing was kept"
    assert processes.run(tmp_path, *command, out, *how) == 0, (
        tmp_path / "terminal.txt"
    ).read_text()
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.parent.exists()


def rows_of_whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.mark.parametrize("number", [2, 5, 8, 11])
def test_a_kill_before_any_write_loses_no_line(
    model: Path, questions: Path, tmp_path: Path, number: int
) -> None:
    """Every call that changes the disk may be the last one."""
    few = ("--limit", 4, "--batch-size", 2)
    command = ("predict", model, questions, tmp_path / "a.jsonl", *SHORT, *few)
    code = processes.run(tmp_path, *command, kill_at=number, below=str(tmp_path / "a.jsonl"))
    assert code in (0, -signal.SIGKILL)
    assert processes.run(tmp_path, *command) == 0, (tmp_path / "terminal.txt").read_text()
    assert [row["question_id"] for row in rows(tmp_path / "a.jsonl")] == [0, 1, 2, 3]


def test_other_settings_do_not_go_on_with_the_work(
    model: Path, questions: Path, tmp_path: Path, refused: Callable[..., str], llava_run: Command
) -> None:
    out = tmp_path / "a.jsonl"
    command = ("predict", model, questions, out, *SHORT, "--batch-size", 2)
    process = processes.start(tmp_path, *command)
    settle(tmp_path / "a.jsonl.work" / "answers.jsonl", 2, process)
    process.kill()
    processes.finish(process)
    said = refused(*command, "--temperature", 0.5)
    assert "a.jsonl.work holds answers that were made with another `sampling`" in said
    os.utime(model / "model.toml", (1, 1))
    assert "with another `files of the model`" in refused(*command)


# -- several processes -----------------------------------------------------------------------------


def test_two_processes_arrive_where_one_does(
    model: Path, questions: Path, tmp_path: Path, llava_run: Command
) -> None:
    command = ("predict", model, questions)
    how = (*SHORT, "--batch-size", 3, "--temperature", "0.8")
    assert llava_run(*command, tmp_path / "one.jsonl", *how).code == 0
    out = tmp_path / "two.jsonl"
    # what a killed attempt of two processes left: some in each one's file
    known = rows(tmp_path / "one.jsonl")
    process = processes.start(tmp_path, *command, out, *how)
    work = tmp_path / "two.jsonl.work"
    settle(work / "answers.jsonl", 2, process)
    process.kill()
    processes.finish(process)
    part = [row for row in known if row["question_id"] in (38, 39)]
    (work / "answers.jsonl.rank1").write_text("".join(json.dumps(row) + "\n" for row in part))
    run = torchrun(2, *command, out, *how)
    assert run.returncode == 0, run.stderr
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not work.exists()
    said = torchrun(2, *command, out, *how)
    assert said.returncode == 0
    assert said.stderr.count("done before") == 1


# -- rows of other forms ---------------------------------------------------------------------------


def test_conversations_are_asked_their_last_question(
    model: Path, data: Path, tmp_path: Path, llava_run: Command
) -> None:
    out = tmp_path / "a.jsonl"
    images = ("--images", data / "images")
    code, _, err = llava_run("predict", model, data / "train.json", out, *images, *SHORT)
    assert code == 0, err
    found = {row["question_id"]: row for row in rows(out)}
    for row in json.loads((data / "train.json").read_text()):
        *history, question, answer = row["conversations"]
        own = found[row["id"]]
        assert own["prompt"] == question["value"]
        assert own["truth"] == answer["value"]
        roles = {"human": "user", "gpt": "assistant"}
        expected = [{"role": roles[t["from"]], "content": t["value"]} for t in history]
        assert own.get("history", []) == expected


def test_messages_are_asked_behind_their_history(
    model: Path, questions: Path, tmp_path: Path, llava_run: Command, service: Service
) -> None:
    picture = questions.parent / "1-0.png"
    image = {"type": "image", "image": picture.name}
    text = {"type": "text", "text": "what is it ?"}
    history = [
        {"role": "system", "content": "a red circle"},
        {"role": "user", "content": [image, text]},
        {"role": "assistant", "content": "it is red ."},
    ]
    last = [{"role": "user", "content": "what shape ?"}]
    rows_ = [
        {"id": "one", "messages": [{"role": "user", "content": [image, text]}]},
        {"id": "four", "messages": [*history, *last, {"role": "assistant", "content": "a square"}]},
    ]
    path = questions.parent / "messages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    out = tmp_path / "a.jsonl"
    code, _, err = llava_run("predict", model, path, out, *SHORT)
    assert code == 0, err
    loaded = llavakit.load(model, device="cpu")
    one, four = rows(out)
    assert one["text"] == loaded.generate("what is it ?", images=[picture], max_new_tokens=6)
    shown = [{"type": "image", "image": picture}, text]
    asked = [history[0], {"role": "user", "content": shown}, history[2], *last]
    assert four["text"] == loaded.generate(asked, max_new_tokens=6)
    assert four["truth"] == "a square"
    assert four["prompt"] == "what shape ?"
    assert [message["role"] for message in four["history"]] == ["system", "user", "assistant"]
    assert "history" not in one
    # and a service is asked the same
    out = tmp_path / "b.jsonl"
    assert llava_run("predict", service.url, path, out).code == 0
    sent = max(service.asked, key=lambda body: len(body["messages"]))
    assert [message["role"] for message in sent["messages"]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert sent["messages"][1]["content"][-1]["text"] == "what is it ?"
    assert images_of(sent) == [("image/png", picture.read_bytes())]
    assert sent["messages"][-1]["content"] == "what shape ?"


def test_an_exported_model_answers_as_the_one_it_was_made_of(
    model: Path, questions: Path, tmp_path: Path, llava_run: Command
) -> None:
    pytest.importorskip("onnxruntime")
    few = (*SHORT, "--limit", 9)
    folder = tmp_path / "onnx"
    assert llava_run("export", model, folder, "--format", "onnx").code == 0
    found = {}
    for name, place in (("native", model), ("onnx", folder)):
        out = tmp_path / f"{name}.jsonl"
        code, _, err = llava_run("predict", place, questions, out, *few, "--batch-size", 4)
        assert code == 0, err
        found[name] = [row["text"] for row in rows(out)]
    assert found["onnx"] == found["native"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "needs `question_id`"),
        ({"question_id": 1, "text": "a", "image": "../x.png"}, "lies outside"),
        ({"question_id": 1, "text": "a", "image": "none.png"}, "none.png of question `1`"),
        ({"question_id": 0, "text": "a"}, "`0` occur more than once"),
        ({"id": "z", "conversations": [{"from": "gpt", "value": "a"}]}, "z"),
        ({"question_id": 1, "text": "<image> a"}, "0 images for 1 `<image>`"),
        ({"question_id": 1, "text": "\ud83d"}, "half an emoji"),
        ({"question_id": 1, "text": "a", "image": "0" * 5000}, "000 of question `1`"),
    ],
)
def test_rows_that_ask_nothing_are_named(
    model: Path, tmp_path: Path, refused: Callable[..., str], row: dict[str, Any], said: str
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question_id": 0, "text": "what ?"}) + "\n" + json.dumps(row))
    found = refused("predict", model, path, tmp_path / "a.jsonl", *SHORT)
    assert said in found
    assert "q.jsonl" in found
    assert not (tmp_path / "a.jsonl.work").exists()


def test_numbers_of_questions_stay_numbers(model: Path, tmp_path: Path, llava_run: Command) -> None:
    asked = [{"role": "user", "content": "what ?"}]
    given = [{"question_id": 7, "text": "what ?"}, {"question_id": 8, "messages": asked},
             {"id": 9, "messages": asked}, {"id": "10", "messages": asked}]  # fmt: skip
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    code, _, err = llava_run("predict", model, path, tmp_path / "a.jsonl", *SHORT)
    assert code == 0, err
    assert [row["question_id"] for row in rows(tmp_path / "a.jsonl")] == [7, 8, 9, "10"]


def test_wrong_uses_are_refused(
    model: Path, questions: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "a.jsonl"
    for arguments, said in (
        ((model, tmp_path / "none.jsonl", out), "none.jsonl does not exist"),
        (
            (model, questions, out, "--limit", 0),
            "--batch-size, --processes, --concurrency and --limit",
        ),
        ((model, questions, out, "--workers", -1), "--workers is 0 or more"),
        (
            (model, questions, out, "--batch-size", 0),
            "--batch-size, --processes, --concurrency and --limit",
        ),
        ((model, questions, out, "--temperature", -1), "temperature"),
        ((model, questions, out, "--set", "quantize=nf4"), "write it as part.option=value"),
        ((tmp_path / "nowhere", questions, out), "nowhere does not exist"),
    ):
        assert said in refused("predict", *arguments)
    assert not any(tmp_path.glob("a.jsonl*"))  # no work in progress is left, either


# -- a service -------------------------------------------------------------------------------------


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        handler.answer(f"{len(images_of(body))} images: {user_text(body)}")

    with serve(Service(otherwise=answer)) as running:
        yield running


def test_a_service_answers_and_is_paid_once(
    service: Service,
    questions: Path,
    tmp_path: Path,
    llava_run: Command,
    refused: Callable[..., str],
) -> None:
    out = tmp_path / "a.jsonl"
    quick = ("--set", "retries=0", "--concurrency", 1, "--max-new-tokens", 9)
    command = ("predict", service.url, questions, out, *quick)
    good = service.otherwise
    service.actions = [*[good] * 6, *[lambda h, b: h.fail(500, "down")] * 30]
    said = refused(*command)
    assert "10 requests in a row got no answer" in said or "have no answer for now" in said
    assert "--resume" not in said
    assert not out.exists()
    service.actions = []
    before = len(service.asked)
    # the seventh question is refused for good: it alone has no answer
    service.actions = [lambda h, b: h.fail(400, "too rude")]
    code, _, err = llava_run(*command)
    assert code == 0, err
    assert len(service.asked) - before == 40 - 6
    found = rows(out)
    asked = rows(questions)
    assert [row["question_id"] for row in found] == [row["question_id"] for row in asked]
    assert [row["text"] == "" for row in found].count(True) == 1
    assert found[6]["metadata"]["finish"] == "refused"
    assert "too rude" in found[6]["metadata"]["error"]
    for row, question in zip(found, asked, strict=True):
        names = question.get("image", [])
        count = 1 if isinstance(names, str) else len(names)
        assert row["text"] in ("", f"{count} images: {question['text'].strip()}")
        assert row["model_id"] == "gpt-4o"  # the only one that it lists
    body = service.asked[-1]
    assert (body["max_tokens"], body["temperature"], "seed" in body) == (9, 0.0, False)
    before = len(service.asked)
    assert llava_run(*command).code == 0
    out.unlink()  # what was paid for is in the folder of the work
    assert llava_run(*command).code == 0
    assert len(service.asked) == before + 1  # the refused one
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in everything


def test_a_service_is_stated_as_a_chat_model_is(
    service: Service,
    questions: Path,
    tmp_path: Path,
    llava_run: Command,
    refused: Callable[..., str],
) -> None:
    few = ("--limit", 2, "--set", "model=other", "--temperature", 0.5, "--stop", "END")
    assert llava_run("predict", service.url, questions, tmp_path / "a.jsonl", *few).code == 0
    body = service.asked[-1]
    assert (body["model"], body["seed"], body["stop"]) == ("other", 0, ["END"])
    assert "may hold no key" in refused(
        "predict", service.url, questions, tmp_path / "b.jsonl", "--set", f"extra.api_key={KEY}"
    )
    said = refused("predict", service.url, questions, tmp_path / "c.jsonl", "--template", "plain")
    assert "are of a model folder, not of a service" in said
    assert "torchrun" in torchrun(2, "predict", service.url, questions, tmp_path / "d").stderr


def test_killed_it_asks_the_service_nothing_twice(
    service: Service, questions: Path, tmp_path: Path
) -> None:
    slow = service.otherwise

    def wait(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.01)
        slow(handler, body)

    service.otherwise = wait
    out = tmp_path / "a.jsonl"
    command = ("predict", service.url, questions, out, "--concurrency", 2)
    process = processes.start(tmp_path, *command)
    ledger, end = tmp_path / "a.jsonl.work" / "ledger.sqlite", time.monotonic() + 60

    def replies() -> int:
        with Ledger(ledger, writable=False) as found:
            return len(found)

    while process.is_alive() and (not ledger.exists() or replies() < 8):
        assert time.monotonic() < end
        time.sleep(0.001)
    process.kill()
    assert processes.finish(process) == -signal.SIGKILL
    assert processes.run(tmp_path, *command) == 0
    assert len(rows(out)) == 40
    assert 40 <= len(service.asked) <= 40 + 2 + 1  # those that were on their way


def test_main_says_that_it_was_stopped(
    model: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from llavakit_plugins.evaluation import answering

    plain = answering.AnswerFile.append

    def interrupted(self: Any, *arguments: Any) -> None:
        plain(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(answering.AnswerFile, "append", interrupted)
    out = tmp_path / "a.jsonl"
    arguments = ["predict", str(model), str(questions), str(out), *SHORT, "--batch-size", "4"]
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(rows(tmp_path / "a.jsonl.work" / "answers.jsonl")) == 4
    monkeypatch.undo()
    assert main(arguments) == 0
    assert len(rows(out)) == 40
