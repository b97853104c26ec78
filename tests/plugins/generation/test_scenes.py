"""The small world: what is drawn, what is said of it, and what the teacher makes of that."""

from __future__ import annotations

import json
import os
import re
import signal
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from tests import published
from tests.core.processes import small_disk
from tests.runs import run_in

from llavakit import DataError, ImageContext, LlavaError
from llavakit.cli import main
from llavakit.contracts.data import RESPONSE_KINDS, Box
from llavakit_plugins.generation import scenes as world
from llavakit_plugins.generation.contexts import read_contexts, write_contexts
from llavakit_plugins.generation.scenes import (
    CANVASES,
    COLOURS,
    FAMILY,
    SIDE,
    WORDS,
    Scene,
    compose,
)
from llavakit_plugins.generators.offline import Offline, OfflineOptions, place_of, understand
from llavakit_plugins.steps import scenes
from llavakit_plugins.steps.scenes import Scenes, ScenesOptions
from llavakit_plugins.training import forks, workers

SHARED = published.folder()


def test_no_glyph_of_one_split_is_drawn_in_the_other() -> None:
    used = {
        split: {digit.glyph for scene in compose(split, 120, 0) for digit in scene.digits}
        for split in ("train", "test")
    }
    assert used["train"]
    assert used["test"]
    assert not used["train"] & used["test"]


def test_every_digit_is_the_handwritten_one_it_is_said_to_be() -> None:
    truth = load_digits().target
    for scene in compose("test", 30, 1):
        for digit in scene.digits:
            assert truth[digit.glyph] == digit.value


def drawn(scene: Scene) -> NDArray[np.uint8]:
    """A scene by scikit-learn's own reader of the glyphs, in float64."""
    glyphs = load_digits().images
    pixels = np.empty((SIDE, SIDE, 3))
    pixels[:] = CANVASES[scene.canvas]
    for digit in scene.digits:
        left, top, right, bottom = digit.corners
        glyph = Image.fromarray((glyphs[digit.glyph] * 15.9).astype(np.uint8))
        large = glyph.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        alpha = np.asarray(large, float)[..., None] / 255
        under = pixels[top:bottom, left:right]
        under += alpha * (np.array(COLOURS[digit.colour]) - under)
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("moved", [False, True], ids=["its file", "its reader"])
def test_glyphs_are_scikit_learns(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world._glyphs.cache_clear()
    if moved:  # as another version may keep its files elsewhere
        spec = ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(world, "find_spec", lambda name: spec)
    for scene in compose("train", 4, 0):
        assert np.abs(np.asarray(scene.draw(), int) - drawn(scene)).max() <= 1  # of float32
    world._glyphs.cache_clear()


def test_without_scikit_learn_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    world._glyphs.cache_clear()
    monkeypatch.setattr(world, "find_spec", lambda name: None)
    with pytest.raises(LlavaError, match=r"pip install 'llavakit\[demo\]'"):
        next(compose("train", 1, 0))


def test_a_family_shares_everything_but_its_digits() -> None:
    scenes = list(compose("train", 20, 2))
    assert len(scenes) == 20 * FAMILY
    for begin in range(0, len(scenes), FAMILY):
        family = scenes[begin : begin + FAMILY]
        looks = {
            (scene.canvas, tuple((digit.place, digit.colour) for digit in scene.digits))
            for scene in family
        }
        assert len(looks) == 1
        assert len({tuple(digit.value for digit in scene.digits) for scene in family}) == FAMILY


def test_the_picture_shows_what_the_annotation_says() -> None:
    for scene in compose("train", 12, 3):
        pixels = np.asarray(scene.draw()).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        ground = np.array(CANVASES[scene.canvas])
        inked = np.abs(pixels - ground).sum(axis=2) > 60
        allowed = np.zeros_like(inked)
        for digit in scene.digits:
            left, top, right, bottom = digit.corners
            allowed[top:bottom, left:right] = True
            own = pixels[top:bottom, left:right].reshape(-1, 3)
            darkest = own[np.abs(own - np.array(COLOURS[digit.colour])).sum(axis=1).argmin()]
            assert np.abs(darkest - np.array(COLOURS[digit.colour])).sum() < 90
        assert not (inked & ~allowed).any()


def test_contexts_survive_writing_and_reading(tmp_path: Path) -> None:
    contexts = [
        scene.context(f"{number}", f"{number}.png")
        for number, scene in enumerate(compose("test", 3, 0))
    ]
    write_contexts(tmp_path / "c.jsonl", contexts)
    assert list(read_contexts(tmp_path / "c.jsonl")) == contexts


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"id": "1"', r"c.jsonl:2:11: not valid JSON"),
        ('{"id": "1", "image": "a.png"}', r"c.jsonl:2: a context needs .*'captions'"),
        (
            '{"id":"1","image":"a","captions":[],"instances":[{"category":"c","bbox":[1]}]}',
            r"c.jsonl:2: a `bbox` has four numbers",
        ),
        ("[1, 2]", r"c.jsonl:2: a context needs"),
        ('{"id":null,"image":"a","captions":["c"]}', r"c.jsonl:2: a context needs .* `id`"),
        ('{"id":"1","image":{},"captions":["c"]}', r"c.jsonl:2: a context needs .* `image`"),
        ('{"id":"1","image":"a","captions":["c"],"instances":[1]}', r"c.jsonl:2: a context needs"),
        *(
            (
                f'{{"id":"1","image":"a","captions":["c"],"instances":[{{"category":{category},'
                f'"bbox":{box}}}]}}',
                r"c.jsonl:2: ",
            )
            for category, box in [
                ("null", "[0,0,1,1]"), ('"c"', '"0101"'), ('"c"', '["0","0","1","1"]'),
                ('"c"', "[true,0,1,1]"), ('"c"', "[NaN,0,1,1]"), ('"c"', "[0,0,1,1e999]"),
                ('"c"', f"[0,0,1,{'9' * 400}]"), ('"c"', f"[0,0,1,{'9' * 5000}]"),
            ]
        ),
        ("[" * 100_000, r"c.jsonl:2: nested too deeply"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "0", "image": "a.png", "captions": ["A cat."]}\n' + line + "\n")
    with pytest.raises(DataError, match=sentence):
        list(read_contexts(path))


def test_a_mark_in_front_of_contexts_does_no_harm(tmp_path: Path) -> None:
    line = '{"id": "0", "image": "a.png", "captions": ["A cat."]}'
    for begin in ("\ufeff", "\ufeff\n", "\n\ufeff"):
        (tmp_path / "c.jsonl").write_text(f"{begin}{line}\n\ufeff{line}\n", encoding="utf-8")
        assert [context.id for context in read_contexts(tmp_path / "c.jsonl")] == ["0", "0"]


def test_processes_draw_what_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ScenesOptions(train=600, test=40, single=8)
    monkeypatch.setattr(scenes, "_TOGETHER", 64)
    Scenes(options).run(run_in(tmp_path / "some"))
    monkeypatch.setattr(workers, "may_fork", lambda: False)
    Scenes(options).run(run_in(tmp_path / "one"))
    drawn = {
        folder: {
            path.relative_to(tmp_path / folder): path.read_bytes()
            for path in (tmp_path / folder).rglob("*")
            if path.is_file()
        }
        for folder in ("some", "one")
    }
    assert len(drawn["one"]) == 648 + 3
    assert drawn["some"] == drawn["one"]


@pytest.mark.skipif(not forks.may_fork(), reason="only Linux forks")
def test_a_process_that_is_killed_while_it_draws_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getpid()

    def killed(*_: object) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(scenes, "save_image", killed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(LlavaError, match="that drew scenes was killed"):
        Scenes(ScenesOptions(train=16, test=8)).run(run_in(tmp_path / "run"))


@pytest.mark.parametrize("kilobytes", [60, 700])
def test_a_full_disk_while_scenes_are_drawn_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kilobytes: int
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "s"\n[[steps]]\nuse = "scenes"\ntrain = 2048\ntest = 8\n')
    with small_disk(tmp_path / "disk", kilobytes):
        assert main([str(recipe), "--out", str(tmp_path / "disk" / "run")]) == 2
        assert not list((tmp_path / "disk").rglob(".*.partial"))
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "free some space" in said
    assert "Traceback" not in said


def answer_from_truth(question: str, places: dict[str, tuple[str, str]], canvas: str) -> list[str]:
    """Return the words a right answer has, from the drawing's own record, not from its captions."""
    if question in ("Which digit is there?", "What colour is the digit?", "Where is the digit?"):
        ((place, words),) = places.items()
        return [place, *words]
    if match := re.fullmatch(r"Which digit is there at the (\w+)\?", question):
        return [match[1], places[match[1]][0]]
    if match := re.fullmatch(r"What colour is the digit at the (\w+)\?", question):
        return [match[1], places[match[1]][1]]
    if question == "What colour is the canvas?":
        return [canvas]
    if question == "How many digits are there?":
        return [WORDS[len(places)]]
    if match := re.fullmatch(r"Is there a digit at the (\w+)\?", question):
        return ["yes", *places[match[1]]] if match[1] in places else ["no", match[1], "empty"]
    raise AssertionError(question)


def test_every_answer_of_the_teacher_is_true_of_the_picture() -> None:
    teacher = Offline(OfflineOptions(turns=5))
    asked = set()
    for number, scene in enumerate(compose("train", 60, 5)):
        places = {d.place: (WORDS[d.value], d.colour) for d in scene.digits}
        turns = teacher.generate(scene.context(str(number), "x.png"), "conversation")
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            question = human.text.removeprefix("<image>\n")
            words = set(re.findall(r"\w+", gpt.text.lower()))
            assert words >= set(answer_from_truth(question, places, scene.canvas))
            asked.add(question.split()[0])
    assert asked == {"Which", "What", "Where", "How", "Is"}


def test_sums_and_orders_are_right() -> None:
    teacher = Offline(OfflineOptions())
    for number, scene in enumerate(compose("train", 40, 6)):
        _, answer = teacher.generate(scene.context(str(number), "x.png"), "reasoning")
        values = [digit.value for digit in scene.digits]
        expected = {
            "sum": sum(values), "largest": max(values), "smallest": min(values),
        }  # fmt: skip
        if match := re.search(r"so the (\w+) is (\w+)\.$", answer.text):
            numbers = [*WORDS, *["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen"]]
            numbers += ["sixteen", "seventeen", "eighteen"]
            assert numbers[expected[match[1]]] == match[2]
        else:
            assert answer.text.endswith("odd." if values[0] % 2 else "even.")


def test_the_teacher_repeats_itself_and_a_seed_changes_it() -> None:
    scene = next(iter(compose("train", 1, 0)))
    contexts = [scene.context(str(number), "x.png") for number in range(20)]

    def say(seed: int) -> list[object]:
        teacher = Offline(OfflineOptions(seed=seed))
        return [teacher.generate(context, kind) for context in contexts for kind in RESPONSE_KINDS]

    assert say(0) == say(0)
    assert say(0) != say(1)


def test_a_context_without_boxes_is_named() -> None:
    with pytest.raises(DataError, match="context `7` has no boxes"):
        understand(ImageContext("7", "a.jpg", ("A cat.",)))


def test_a_place_is_the_nearest_edge() -> None:
    assert place_of(Box("cat", (0.3, 0.0, 0.7, 0.2))) == "top"
    assert place_of(Box("cat", (0.0, 0.3, 0.2, 0.9))) == "left"
    assert place_of(Box("cat", (0.8, 0.2, 1.0, 0.7))) == "right"
    assert place_of(Box("cat", (0.4, 0.6, 0.7, 1.0))) == "bottom"


def test_the_teacher_speaks_of_real_images_too() -> None:
    teacher = Offline(OfflineOptions())
    contexts = list(read_contexts(SHARED / "coco80" / "caps_boxes.jsonl"))
    boxed = [context for context in contexts if context.boxes]
    assert len(boxed) > 50
    for context in boxed:
        for kind in RESPONSE_KINDS:
            turns = teacher.generate(context, kind)
            assert [turn.role for turn in turns[:2]] == ["human", "gpt"]
            assert turns[0].text.startswith("<image>\n")
            assert all(turn.text.strip() for turn in turns)
        (count,) = [
            gpt.text
            for human, gpt in zip(
                *(teacher.generate(context, "detail")[part::2] for part in (0, 1)), strict=True
            )
        ]
        assert json.dumps(count)
