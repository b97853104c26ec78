"""Teachers and judges that are shown the image: what they get, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.conftest import Command
from tests.plugins.chat_server import (
    Handler,
    Service,
    completion,
    images_of,
    lesson,
    teach,
    user_text,
)

from llavakit import ChatModel, DataError, Registry, Use
from llavakit_plugins.evaluation.benchmarks.llava_bench import LlavaBench

RECIPE = """\
name = "seen"

[[steps]]
use = "generate"
contexts = "{folder}/contexts.jsonl"
images = "{folder}/images"
kinds = ["conversation", "detail"]
concurrency = 4

[steps.generator]
use = "prompted"
images = true

[steps.generator.chat]
use = "openai"
model = "gpt-4o"
base_url = "{url}"
price = {{ input = 10, output = 100 }}
backoff = 0.02
"""


@pytest.fixture
def recipe(service: Service, tmp_path: Path) -> Path:
    """A recipe with five contexts and their images, of different colours."""
    service.otherwise = teach
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(5):
        image = Image.new("RGB", (64, 64), (50 * number, 10, 10))
        image.save(tmp_path / "images" / f"{number}.png")
        rows.append({"id": f"{number}", "image": f"{number}.png", "captions": [f"Thing {number}."]})
    (tmp_path / "contexts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "seen.toml"
    path.write_text(RECIPE.format(folder=tmp_path, url=service.url))
    return path


def check_bodies(service: Service, folder: Path) -> None:
    """Each request shows the image that its text is about, and says that it does."""
    assert len(service.asked) == 10
    for body in service.asked:
        ((kind, data),) = images_of(body)
        number = user_text(body).partition(".")[0].split()[-1]
        assert kind == "image/png"
        assert data == (folder / "images" / f"{number}.png").read_bytes()
        assert isinstance(body["messages"][-1]["content"], list)
        assert all(isinstance(message["content"], str) for message in body["messages"][:-1])
        assert "This time you can see the photograph" in body["messages"][0]["content"]


def test_a_teacher_sees_each_image(
    service: Service, recipe: Path, tmp_path: Path, llava_run: Command
) -> None:
    code, _, err = llava_run(recipe, "--out", tmp_path / "run")
    assert code == 0, err
    check_bodies(service, tmp_path)
    samples = json.loads((tmp_path / "run" / "01-generate" / "instruct.json").read_text())
    assert len(samples) == 10
    # another picture under the same name is another question; the others are paid for
    Image.new("RGB", (64, 64), (9, 99, 9)).save(tmp_path / "images" / "3.png")
    again = ("--out", tmp_path / "run", "--set", "seed=5")
    code, _, err = llava_run(recipe, *again)
    assert code == 0, err
    assert len(service.asked) == 12


def test_a_batch_shows_each_image(
    service: Service, recipe: Path, tmp_path: Path, llava_run: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Handler, "in_batch", lambda self, body: completion(lesson(body)))
    chat = "steps.generate.generator.chat"
    sets = ("--set", f"{chat}.batch=true", "--set", f"{chat}.poll_seconds=0.02")
    code, _, err = llava_run(recipe, "--out", tmp_path / "run", *sets)
    assert code == 0, err
    check_bodies(service, tmp_path)


def test_a_plan_counts_the_images(recipe: Path, service: Service, llava_run: Command) -> None:
    def sent(*sets: str) -> int:
        out = llava_run(recipe, "--plan", *sets).out
        assert not service.asked
        return int(" ".join(out.split()).partition(" tokens sent")[0].split()[-1].replace(",", ""))

    blind = sent("--set", "steps.generate.generator.images=false")
    seen = sent()
    # one square of 512 pixels each, by OpenAI's guide; the sentence that tells of the image is text
    said = 10 * len(["This", "time", "you", "can", "see", "the", "photograph"])
    assert 10 * 255 + said < seen - blind < 10 * (255 + 120)
    low = sent("--set", 'steps.generate.generator.chat.detail="low"')
    assert seen - low == 10 * 170
    unknown = llava_run(recipe, "--plan", "--set", "steps.generate.generator.chat.model=mine").out
    assert "what its images count as is not known; state `image_tokens`" in " ".join(
        unknown.split()
    )
    assert " USD for 01-generate" not in unknown
    stated = "steps.generate.generator.chat.image_tokens=576"
    model = "steps.generate.generator.chat.model=mine"
    priced = llava_run(recipe, "--plan", "--set", model, "--set", stated).out
    assert "what its images count as" not in priced
    assert " USD for 01-generate" in priced


def test_images_that_cannot_be_shown_are_said_before_anything_is_paid(
    recipe: Path, service: Service, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "images" / "4.png").unlink()
    said = refused(recipe, "--out", tmp_path / "run")
    assert "4.png of context `4` does not exist" in said
    text = recipe.read_text().replace(f'images = "{tmp_path}/images"\n', "")
    recipe.write_text(text)
    said = refused(recipe, "--out", tmp_path / "run")
    assert "the generator shows images: name their folder with the step's `images`" in said
    assert not service.asked


# -- a judge ---------------------------------------------------------------------------------------


def bench(folder: Path, service: Service, **more: Any) -> LlavaBench:
    (folder / "images").mkdir(exist_ok=True)
    questions, references = [], []
    for number in range(3):
        pixels = np.full((9, 9, 3), 60 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        row = {"question_id": number, "image": f"{number}.png", "text": "What is it?"}
        questions.append({**row, "category": "conv"})
        references.append({"question_id": number, "text": f"Reference {number}."})
    for name, rows in (("questions", questions), ("references", references)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = {"use": "openai", "model": "gpt-4o", "base_url": service.url}
    options = {
        "questions": folder / "questions.jsonl", "references": folder / "references.jsonl",
        "images": folder / "images", "judge": Use[ChatModel].model_validate(judge), **more,
    }  # fmt: skip
    return LlavaBench(LlavaBench.Options(**options), build=Registry.installed().build)


def test_a_judge_sees_the_image_of_its_question(service: Service, tmp_path: Path) -> None:
    service.otherwise = lambda h, b: h.answer("8 6\nFine.")
    benchmark = bench(tmp_path, service, show_images=True, concurrency=1)
    questions = benchmark.questions()
    # asked with the images of others, as `blind` does: the judge sees the true ones
    blind = [replace(q, images=questions[0].images) for q in questions]
    score = benchmark.score(blind, ["a", "b", "c"])
    assert score.metrics["relative_all"] == pytest.approx(75)
    for body in service.asked:
        ((_, data),) = images_of(body)
        number = user_text(body).partition("Reference ")[2][0]
        assert data == (tmp_path / "images" / f"{number}.png").read_bytes()
        assert "judge by what you see" in user_text(body)
        assert "You cannot see the image" not in user_text(body)
        assert "[Context]" not in user_text(body)


def test_a_plan_counts_what_the_judge_is_sent(
    service: Service, tmp_path: Path, llava_run: Command
) -> None:
    bench(tmp_path, service, show_images=True)
    recipe = tmp_path / "judged.toml"
    recipe.write_text(
        f"""\
name = "judged"
[[steps]]
use = "evaluate"
init = "{tmp_path}"
[[steps.benchmarks]]
use = "llava-bench"
questions = "{tmp_path}/questions.jsonl"
references = "{tmp_path}/references.jsonl"
images = "{tmp_path}/images"
show_images = true
judge = {{ use = "openai", model = "gpt-4o", base_url = "{service.url}", price = {{ input = 1e6, output = 0 }} }}
"""  # noqa: E501
    )
    judge = "steps.evaluate.benchmarks.1.judge"

    def usd(*sets: str) -> float:
        out = " ".join(llava_run(recipe, "--plan", *sets).out.split())
        assert "judge: 3 requests" in out or "judge: 6 requests" in out, out
        return float(out.partition(" tokens sent, ")[2].partition(" USD")[0].replace(",", ""))

    whole = usd()
    low = usd("--set", f"{judge}.detail=low")
    assert whole - low == pytest.approx(3 * 170)  # one square an image, a dollar a token
    swapped = usd("--set", "steps.evaluate.benchmarks.1.swap=true")
    assert swapped == pytest.approx(2 * whole)
    assert not service.asked


def test_a_judge_that_sees_nothing_needs_contexts(service: Service, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs `contexts`.* or `show_images = true`"):
        bench(tmp_path, service)
    contexts = tmp_path / "contexts.jsonl"
    rows = [{"image": f"{n}.png", "caption": f"Thing {n}"} for n in range(3)]
    contexts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    service.otherwise = lambda h, b: h.answer("8 6\nFine.")
    for show in (False, True):
        benchmark = bench(tmp_path, service, contexts=contexts, show_images=show)
        benchmark.score(benchmark.questions(), ["a", "b", "c"])
        body = service.asked[-1]
        assert "[Context]\nThing" in user_text(body)
        assert ("You cannot see the image" in user_text(body)) != show
        assert isinstance(body["messages"][-1]["content"], list) == show
