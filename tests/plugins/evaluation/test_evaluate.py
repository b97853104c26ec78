"""The evaluate step: batches that change no answer, nothing asked twice, every layout."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import WORDS, Command, RecipeWriter
from tests.core import processes
from tests.core.engine.test_distributed import llava_run as torchrun
from tests.plugins.chat_server import KEY, Handler, Service, serve, user_text

import llavakit
from llavakit import DataError, LlavaModel, Question, Recipe, Registry, Stopped
from llavakit.cli import main
from llavakit.contracts.model import Sampling
from llavakit.model.folder import create_model, save_model
from llavakit_plugins.evaluation.answering import AnswerFile, Pace, ask
from llavakit_plugins.training import forked

EVALUATE = """\
name = "evaluate"
device = "cpu"

[[steps]]
use = "evaluate"
init = "{model}"
batch_size = 1
max_new_tokens = 6
benchmarks = [{{ use = "vqa", questions = "{questions}", suffix = "" }}]
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model") / "model"


@pytest.fixture
def model(write_recipe: RecipeWriter, model_folder: Path) -> Path:
    """The folder of a small model with random weights."""
    if not model_folder.exists():
        registry = Registry.installed()
        recipe = Recipe.load(write_recipe(), registry)
        save_model(create_model(recipe.parts(), registry, seed=0), model_folder)
    return model_folder


def make_questions(folder: Path, count: int = 30) -> list[Question]:
    """Return questions of many lengths, a third without an image."""
    folder.mkdir(exist_ok=True)
    found = []
    for number in range(count):
        words = " ".join(WORDS[(number * 7 + k) % len(WORDS)] for k in range(1 + number * 5 % 13))
        images = []
        for k in range(number % 3):
            path = folder / f"{number}-{k}.png"
            Image.effect_noise((30 + number, 40), 90).convert("RGB").save(path)
            images.append(path)
        found.append(Question(f"q{number}", words, tuple(images), "a red circle"))
    return found


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return make_questions(tmp_path / "images")


@pytest.fixture
def recipe(model: Path, questions: Sequence[Question], tmp_path: Path) -> Path:
    """A recipe without a model of its own, that asks the questions one at a time."""
    rows = [
        {
            "question_id": q.id, "text": q.prompt, "answer": q.truth,
            "image": [image.name for image in q.images if isinstance(image, Path)],
        }
        for q in questions
    ]  # fmt: skip
    path = tmp_path / "images" / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "evaluate.toml"
    file.write_text(EVALUATE.format(model=model, questions=path))
    return file


def short_problems(shared: Path, folder: Path) -> Path:
    """Write those of the published problems that a small model can read; return the file."""
    table = json.loads((shared / "scienceqa" / "problems.json").read_text())
    short = {
        name: row for name, row in table.items()
        if len(f"{row['hint']} {row['question']} {row['choices']}".split()) < 60
    }  # fmt: skip
    assert len(short) > 90
    path = folder / "problems.json"
    path.write_text(json.dumps(short))
    return path


SIX = Sampling(6)


def quiet(done: int, total: int, note: str = "") -> None:
    """Show nothing."""


def answer(
    model: Any, questions: Sequence[Question], path: Path, batch: int, workers: int = 2
) -> list[str]:
    file = AnswerFile(path, "m", resume=False)
    return ask(
        model,
        questions,
        file,
        SIX,
        Pace(batch, workers),
        progress=quiet,
        stopping=lambda: False,
    )


def count_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which this process adds each prompt that it asks."""
    asked: list[str] = []
    plain = LlavaModel.answer

    def watch(self: LlavaModel, prompts: Any, *more: Any, **named: Any) -> list[str]:
        asked.extend(prompt for prompt, _ in prompts)
        return plain(self, prompts, *more, **named)

    monkeypatch.setattr(LlavaModel, "answer", watch)
    return asked


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- batches ---------------------------------------------------------------------------------------


def test_batches_answer_as_one_at_a_time_does(
    model: Path, questions: Sequence[Question], tmp_path: Path
) -> None:
    loaded = llavakit.load(model, device="cpu")
    alone = [loaded.generate(q.prompt, images=list(q.images), max_new_tokens=6) for q in questions]
    assert len(set(alone)) >= 8  # else equal answers would prove little
    for batch, workers in ((1, 0), (4, 0), (7, 3), (64, 1)):
        assert answer(loaded, questions, tmp_path / "a.jsonl", batch, workers) == alone


def test_batches_are_of_like_length(
    model: Path, questions: Sequence[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = llavakit.load(model, device="cpu")
    seen: list[list[int]] = []
    plain = LlavaModel.answer

    def watch(self: LlavaModel, prompts: Any, *more: Any, **named: Any) -> list[str]:
        lengths = [loaded.logits(prompt, images).shape[0] for prompt, images in prompts]
        seen.append(lengths)
        return plain(self, prompts, *more, **named)

    monkeypatch.setattr(LlavaModel, "answer", watch)
    answer(loaded, questions, tmp_path / "a.jsonl", 8)
    assert [len(batch) for batch in seen] == [8, 8, 8, 6]
    flat = [length for batch in seen for length in batch]
    assert flat == sorted(flat)


def test_an_answer_that_ends_early_is_gone_on_with(
    model: Path, questions: Sequence[Question], tmp_path: Path
) -> None:
    """Transformers is given the same tokens: prompt, first answer and what is put behind it."""
    from transformers import LlavaForConditionalGeneration

    loaded = llavakit.load(model, device="cpu")
    export_folder = tmp_path / "hf"
    assert main(["export", str(model), str(export_folder), "--format", "hf"]) == 0
    peer: Any = LlavaForConditionalGeneration.from_pretrained(export_folder)
    asked = [replace(q, then="###\nANSWER:") for q in questions[:4]]
    said = answer(loaded, asked, tmp_path / "a.jsonl", 3)
    firsts = answer(loaded, questions[:4], tmp_path / "b.jsonl", 3)
    for question, first, text in zip(asked, firsts, said, strict=True):
        start = f"{first}\n###\nANSWER:".strip()
        assert text.startswith(start)
        rows = loaded.prompt(
            question.prompt, question.images, begun=f" {first}".rstrip() + " ###\nANSWER:"
        ).expand(loaded.visual_tokens)
        ids = torch.from_numpy(np.where(rows.visual, peer.config.image_token_id, rows.token_ids))
        pixels = loaded.prepare(question.images)
        images = {} if pixels is None else {"pixel_values": pixels}
        found = peer.generate(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=64,
            do_sample=False, **images,
        )  # fmt: skip
        new = loaded.decode(found[0, len(ids) :].tolist())
        assert text == f"{start} {new}".strip()
    # one that holds it already is left alone
    held = [replace(q, then=first[:3]) for q, first in zip(questions[:4], firsts, strict=True)]
    assert answer(loaded, held, tmp_path / "c.jsonl", 3) == firsts


def test_a_missing_image_is_named(
    model: Path, questions: Sequence[Question], tmp_path: Path
) -> None:
    loaded = llavakit.load(model, device="cpu")
    broken = Question("lost", "what ?", (tmp_path / "none.png",))
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"none\.png of questions .*`lost`.* does not exist"):
            answer(loaded, [broken], tmp_path / "a.jsonl", 8, workers)


def test_a_question_that_leaves_no_room_is_named_before_any_is_asked(
    model: Path, questions: Sequence[Question], tmp_path: Path
) -> None:
    loaded = llavakit.load(model, device="cpu")
    long = Question("long", "what " * 300)
    with pytest.raises(DataError, match=r"question `long` leaves no room .* at most 256 tokens"):
        answer(loaded, [*questions, long], tmp_path / "a.jsonl", 8)
    assert rows(tmp_path / "a.jsonl") == []


class Talker:
    """A layout that can only generate, as an exported one may."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, prompt: str, images: Sequence[Any], *, max_new_tokens: int) -> str:
        self.asked.append(prompt)
        return f"{prompt} {len(images)}"


def test_a_layout_that_only_generates_answers_one_by_one(
    recipe: Path, questions: Sequence[Question], tmp_path: Path, llava_run: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    talker = Talker()
    monkeypatch.setattr(llavakit, "load", lambda path, device: talker)
    assert llava_run(recipe, "--out", tmp_path / "run").code == 0
    found = rows(tmp_path / "run" / "01-evaluate" / "vqa.jsonl")
    assert [row["text"] for row in found] == [f"{q.prompt} {len(q.images)}" for q in questions]
    assert talker.asked == [q.prompt for q in questions]
    text = recipe.read_text() + 'losses = [{ use = "conversations", path = "x.json" }]'
    (tmp_path / "x.json").write_text('[{"conversations": [{"from": "human", "value": "a"}]}]')
    recipe.write_text(text.replace("x.json", str(tmp_path / "x.json")))
    ended = llava_run(recipe, "--out", tmp_path / "run2")
    assert ended.code == 2
    assert "its layout tells no losses; leave `losses` out" in ended.err


def test_two_processes_score_as_one_does(recipe: Path, tmp_path: Path, llava_run: Command) -> None:
    """Each answers its share; the answers, the metrics and the report are those of one."""
    sets = ("--set", "steps.evaluate.batch_size=4", "--set", "steps.evaluate.blind=true")
    assert llava_run(recipe, "--out", tmp_path / "one", *sets).code == 0
    run = torchrun(2, recipe, "--out", tmp_path / "two", *sets)
    assert run.returncode == 0, run.stderr
    found = {}
    for name in ("one", "two"):
        step = tmp_path / name / "01-evaluate"
        assert not list(step.glob("*.rank*"))
        answers = [
            [{**row, "answer_id": "", "model_id": ""} for row in rows(step / f"vqa{blind}.jsonl")]
            for blind in ("", "-blind")
        ]
        done = json.loads((step / "artifact.json").read_text())
        found[name] = (answers, done["metrics"], done["sections"])
    assert found["one"] == found["two"]


# -- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [1, 2])
def test_killed_it_goes_on_and_asks_nothing_twice(
    recipe: Path, tmp_path: Path, llava_run: Command, monkeypatch: pytest.MonkeyPatch, shares: int
) -> None:
    several = ("--set", f"steps.evaluate.processes={shares}")
    assert llava_run(recipe, "--out", tmp_path / "whole", *several).code == 0
    whole = rows(tmp_path / "whole" / "01-evaluate" / "vqa.jsonl")
    out = tmp_path / "run"
    file = out / "01-evaluate" / "vqa.jsonl"
    process = processes.start(tmp_path, recipe, "--out", out, *several)
    end = time.monotonic() + 90
    while not file.exists() or file.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < end, (tmp_path / "terminal.txt").read_text()
        assert process.is_alive(), (tmp_path / "terminal.txt").read_text()
        time.sleep(0.001)
    process.kill()
    assert processes.finish(process) == -signal.SIGKILL
    before = file.read_bytes()
    kept = before.count(b"\n")
    assert kept < len(whole), "it was done before it was killed; ask more"
    file.write_bytes(before + b'{"question_id": "q3", "text": "half')  # as a kill may leave it
    asked = count_asked(monkeypatch)
    monkeypatch.setattr(forked, "may_fork", lambda: False)  # what is asked elsewhere is not seen
    assert llava_run(recipe, "--out", out, *several, "--resume").code == 0
    assert len(asked) == len(whole) - kept
    found = rows(file)
    for row in (*whole, *found):
        row.pop("answer_id")
    assert found == whole


def test_stopped_it_keeps_what_was_answered(
    model: Path, questions: Sequence[Question], tmp_path: Path
) -> None:
    loaded = llavakit.load(model, device="cpu")
    path = tmp_path / "a.jsonl"
    looks = iter((False, True))
    with pytest.raises(Stopped):
        ask(
            loaded, questions, AnswerFile(path, "m", resume=False), SIX, Pace(4, 1),
            progress=quiet, stopping=lambda: next(looks),
        )  # fmt: skip
    assert len(rows(path)) == 8
    shown: list[int] = []
    ask(
        loaded, questions, AnswerFile(path, "m", resume=True), SIX, Pace(4, 1),
        progress=lambda done, total, note="": shown.append(done), stopping=lambda: False,
    )  # fmt: skip
    assert shown == [8, 12, 16, 20, 24, 28, 30]
    assert len(rows(path)) == 30


def test_a_changed_question_is_asked_again(
    model: Path, questions: Sequence[Question], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    talker = Talker()
    answer(talker, questions[:3], path, 1)
    changed = [questions[0], Question(questions[1].id, "what else ?"), questions[2]]
    file = AnswerFile(path, "m", resume=True)
    found = ask(talker, changed, file, SIX, Pace(1, 0), progress=quiet, stopping=lambda: False)
    assert found[1] == "what else ? 0"
    assert len(talker.asked) == 4


# -- a whole evaluation ----------------------------------------------------------------------------


def test_answers_are_in_the_originals_format_and_score_the_same_by_the_command(
    shared: Path, model: Path, tmp_path: Path, llava_run: Command
) -> None:
    problems = short_problems(shared, tmp_path)
    recipe = tmp_path / "evaluate.toml"
    text = EVALUATE.format(model=model, questions="").partition("benchmarks =")[0]
    chosen = f'{{ use = "scienceqa", problems = "{problems}", with_images = false, limit = 20 }}'
    recipe.write_text(f"{text}benchmarks = [{chosen}]\nmodel_id = 'small'\nblind = false\n")
    run = tmp_path / "run"
    code, _, err = llava_run(recipe, "--out", run, "--set", "steps.evaluate.batch_size=20")
    assert code == 0, err
    file = run / "01-evaluate" / "scienceqa.jsonl"
    first = rows(file)[0]
    assert {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} <= set(first)
    assert first["model_id"] == "small"
    metrics = json.loads((run / "01-evaluate" / "artifact.json").read_text())["metrics"]
    ask_score = ["score", "scienceqa", "--problems", problems, "--predictions", file, "--json"]
    data = json.loads(llava_run(*ask_score).out)
    assert len(data["missing"]) == data["count"] - 20
    right = metrics["sighted_accuracy"] * 20
    assert data["correct"] == pytest.approx(right)
    assert "ScienceQA (QCM-LEA): right answers, %" in (run / "report.md").read_text()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def review(handler: Handler, body: dict[str, Any]) -> None:
        long = len(user_text(body)) % 2
        handler.answer(f"8 {4 + long}\nIt is {'good' if long else 'bad'}.")

    with serve(Service(otherwise=review)) as service:
        yield service


def pictures(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (12, 9), (len(name) * 9, 80, 20)).save(folder / name)
    return folder


def test_the_recipe_evaluates_any_model_folder(
    shared: Path, model: Path, tmp_path: Path, llava_run: Command, service: Service
) -> None:
    """`llava-run evaluate` on the published questions, a judge behind a real HTTP server."""
    bench = shared / "llava_bench_coco"
    asked = rows(bench / "questions.jsonl")
    names = sorted({row["image"] for row in asked})
    images = pictures(tmp_path / "images", names)
    contexts = tmp_path / "contexts.jsonl"
    contexts.write_text("".join(json.dumps({"image": n, "caption": n}) + "\n" for n in names))
    pope = tmp_path / "pope.jsonl"
    objects = [
        {"question_id": n, "image": name, "text": "Is there a dog in it?", "category": "popular"}
        for n, name in enumerate(names[:6])
    ]
    pope.write_text("".join(json.dumps(row) + "\n" for row in objects))
    labels = [{**row, "label": "no"} for row in objects]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "coco_pope_popular.json").write_text(
        "".join(json.dumps(row) + "\n" for row in labels)
    )
    gpt3 = shared / "scienceqa" / "gpt3_outputs.json"
    problems = short_problems(shared, tmp_path)
    table = json.loads(problems.read_text())
    for identity in list(table)[:8]:
        if table[identity]["image"]:
            pictures(tmp_path / "science" / "test" / identity, ["image.png"])
    own = {
        "init": model,
        "max_new_tokens": 4,
        "examples": 3,
        "benchmarks.1.questions": bench / "questions.jsonl",
        "benchmarks.1.references": bench / "gpt4_answers.jsonl",
        "benchmarks.1.contexts": contexts,
        "benchmarks.1.images": images,
        "benchmarks.1.judge.base_url": service.url,
        "benchmarks.1.judge.retries": 0,
        "benchmarks.1.limit": 12,
        "benchmarks.2.skip": "true",
        "benchmarks.scienceqa.problems": problems,
        "benchmarks.scienceqa.images": tmp_path / "science",
        "benchmarks.scienceqa.limit": 8,
        "benchmarks.scienceqa.second": gpt3,
        "benchmarks.scienceqa.ensemble": "complement",
        "benchmarks.pope.questions": pope,
        "benchmarks.pope.labels": tmp_path / "labels",
        "benchmarks.pope.images": images,
    }
    sets = [
        part for key, value in own.items() for part in ("--set", f"steps.evaluate.{key}={value}")
    ]
    assert "no model of its own" in llava_run("evaluate", *sets, "--plan").out
    run = tmp_path / "run"
    code, _, err = llava_run("evaluate", "--out", run, *sets, "--set", "device=cpu")
    assert code == 0, err
    assert len(service.asked) == 12
    done = json.loads((run / "01-evaluate" / "artifact.json").read_text())
    metrics = done["metrics"]
    prefix = "llava-bench-coco_sighted"
    reviews = rows(run / "01-evaluate" / "llava-bench-coco-scoring" / "reviews.jsonl")
    expected = 100 * sum(b for _, b in (r["tuple"] for r in reviews)) / (8 * 12)
    assert metrics[f"{prefix}_relative_all"] == pytest.approx(expected)
    assert {f"{prefix}_relative_conv", f"{prefix}_relative_low"} <= set(metrics)
    assert metrics["pope_sighted_silent"] + 6 * metrics["pope_sighted_accuracy"] <= 6
    published = json.loads(gpt3.read_text())["predicted"]
    stated = [i for i in list(table)[:8] if json.loads(gpt3.read_text())["outputs"][i]]
    right = sum(published[i] == table[i]["answer"] for i in stated)
    assert metrics["scienceqa_sighted_accuracy_second"] == right / 8
    page = (run / "report.md").read_text()
    for title in ("llava-bench-coco: LLaVA-Bench: relative score", "pope: POPE", "scienceqa: Sci"):
        assert title in page
    assert "It is good." in page or "It is bad." in page
    assert re.search(r"reference", page)
    assert "## Model" not in page


@pytest.mark.parametrize(
    "line",
    ['{"question_id": 1}', '{"question_id": 1, "prompt": "a", "image": 5, "text": "x"}',
     '{"question_id": 1, "prompt": "a", "image": [], "text": 3}'],
)  # fmt: skip
def test_answers_of_something_else_are_named(tmp_path: Path, line: str) -> None:
    good = AnswerFile(tmp_path / "a.jsonl", "m", resume=False)
    good.append([Question(0, "a", (), "")], ["x"])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not an answer that this run wrote"):
        AnswerFile(tmp_path / "a.jsonl", "m", resume=True)


def test_a_judge_that_falls_silent_leaves_no_score_and_a_resume_asks_what_is_left(
    shared: Path, model: Path, tmp_path: Path, llava_run: Command, service: Service
) -> None:
    """A score of the questions that happened to be answered would be taken for the score."""
    bench = shared / "llava_bench_coco"
    asked = rows(bench / "questions.jsonl")[:6]
    names = sorted({row["image"] for row in asked})
    contexts = tmp_path / "contexts.jsonl"
    contexts.write_text("".join(json.dumps({"image": n, "caption": n}) + "\n" for n in names))
    recipe = tmp_path / "judged.toml"
    recipe.write_text(
        f"""\
name = "judged"
device = "cpu"
[[steps]]
use = "evaluate"
init = "{model}"
max_new_tokens = 4
[[steps.benchmarks]]
use = "llava-bench"
questions = "{bench / "questions.jsonl"}"
references = "{bench / "gpt4_answers.jsonl"}"
contexts = "{contexts}"
images = "{pictures(tmp_path / "images", names)}"
limit = 6
[steps.benchmarks.judge]
use = "openai"
model = "gpt-4o"
base_url = "{service.url}"
retries = 0
price = {{ input = 2, output = 4 }}
"""
    )
    good = service.otherwise
    service.actions = [
        good,
        good,
        lambda handler, body: handler.fail(500, "boom"),
        lambda handler, body: handler.fail(400, "too long"),
        lambda handler, body: handler.hang_up(),
    ]
    run = tmp_path / "run"
    code, _, err = llava_run(recipe, "--out", run)
    assert code == 2
    assert "the judge left 2 of 6 questions without an answer (`" in err
    assert "what it answered is kept" in err
    assert "run again later with --resume" in err
    assert len(service.asked) == 6
    answers = (run / "01-evaluate" / "llava-bench.jsonl").read_bytes()
    service.actions = [good, lambda handler, body: handler.fail(400, "too long"), good]
    code, _, err = llava_run(recipe, "--out", run, "--resume")
    assert code == 0, err
    assert len(service.asked) == 6 + 3  # the two, and the one that is refused for good
    reviews = rows(run / "01-evaluate" / "llava-bench-scoring" / "reviews.jsonl")
    assert len(reviews) == 6
    assert sum(review["tuple"] is None for review in reviews) == 1
    metrics = json.loads((run / "01-evaluate" / "artifact.json").read_text())["metrics"]
    assert metrics["sighted_unparsed"] == 1
    spent = (100 * 2 + 10 * 4) / 1e6  # of each reply, by what the service says it took
    assert metrics["sighted_judge_usd"] == pytest.approx(5 * spent)
    assert "asking the judge, 0.00 USD" in err
    service.actions = []
    code, _, err = llava_run(recipe, "--out", run, "--set", "seed=1")
    assert code == 0, err
    assert "it is done again" in err
    assert len(service.asked) == 9 + 1  # the refused one alone: the others are paid for
    written = [json.loads(line)["text"] for line in answers.splitlines()]
    final = rows(run / "01-evaluate" / "llava-bench.jsonl")
    assert sorted(row["text"] for row in final) == sorted(written)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("max_new_tokens=0", "`max_new_tokens` of `evaluate`"),
        ("max_new_tokens=1000000001", "`max_new_tokens` of `evaluate`"),
        ("benchmarks=[]", "step `evaluate` measures nothing: name a benchmark"),
        ("benchmarks.vqa.skip=true", "step `evaluate` measures nothing: name a benchmark"),
    ],
)
def test_what_evaluates_nothing_is_refused(
    recipe: Path, refused: Callable[..., str], tmp_path: Path, change: str, sentence: str
) -> None:
    out = tmp_path / "run"
    for more in (("--plan",), ("--out", out)):
        assert sentence in refused(recipe, *more, "--set", f"steps.evaluate.{change}")
    assert not out.exists()


def test_a_recipe_without_a_model_needs_a_folder(refused: Callable[..., str]) -> None:
    text = refused("evaluate")
    assert "missing option `model`" in text
    assert "`evaluate` needs one: add [model], or state `init`" in text
