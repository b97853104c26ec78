"""Held-out samples are looked at while a model trains, and training does not notice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Command, RecipeWriter
from tests.core import processes
from tests.core.engine.test_distributed import llava_run as torchrun

import llavakit

STEADY = ("schedule=constant", "warmup=0.0", "epochs=10")  # step k does not depend on the last one


@pytest.fixture
def held_out(data: Path, tmp_path: Path) -> str:
    """A data set that says the contrary of what is learned: its loss falls, then rises."""
    rows = json.loads((data / "train.json").read_text())[:8]
    other = {"red": "blue", "blue": "red"}
    for row in rows:
        colour = row["conversations"][1]["value"].split()[2]
        row["conversations"][1]["value"] = f"it is {other[colour]} ."
    (tmp_path / "held-out.json").write_text(json.dumps(rows))
    return f'{{ use="conversations", path="{tmp_path}/held-out.json", images="{data}/images" }}'


@pytest.fixture
def train(write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path) -> Callable[..., Path]:
    """A function that runs the second step with these options; returns the run's folder."""

    def call(*overrides: str) -> Path:
        out = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        sets = [part for text in overrides for part in ("--set", f"steps.finetune.{text}")]
        code, _, err = llava_run(write_recipe(), "--out", out, "--set", "steps.1.skip=true", *sets)
        assert code == 0, err
        return out

    return call


def looks(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "validation"]


def step(run: Path) -> Path:
    return run / "02-finetune"


def metrics(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((step(run) / "artifact.json").read_text())["metrics"]
    return found


def weights(model: Path) -> dict[str, bytes]:
    files = model.rglob("*.safetensors")
    return {file.relative_to(model).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    "options",
    [
        ["cache_features=false"],  # its loader draws from the random state
        ["train={ vision=1e-3, connector=1e-2, language=1e-2 }"],
        ['precision="bf16"', "recompute=true"],
    ],
    ids=lambda options: options[0],
)
def test_training_does_not_notice(
    train: Callable[..., Path], held_out: str, options: list[str]
) -> None:
    plain = train(*options)
    watched = train(*options, f"held_out={held_out}", "validate_every=1", "samples=3")
    assert len(looks(watched)) == 7
    assert weights(plain / "model") == weights(watched / "model")
    newest = "checkpoints/step-000006/state.safetensors"
    assert (step(plain) / newest).read_bytes() == (step(watched) / newest).read_bytes()


def test_a_look_sees_the_model_of_its_step(train: Callable[..., Path], held_out: str) -> None:
    """Against runs that end at that step, the best one's among them."""
    long = train(*STEADY, f"held_out={held_out}", "validate_every=5")
    seen = {look["at"]: look["held_out_loss"] for look in looks(long)}
    assert list(seen) == [0, 5, 10, 15, 20, 25, 30]
    best = min(seen, key=lambda at: seen[at])
    assert 0 < best < 30  # or nothing below could fail
    assert metrics(long)["best_step"] == best
    assert metrics(long)["best_held_out_loss"] == pytest.approx(seen[best], abs=1e-6)
    assert metrics(long)["held_out_loss"] == pytest.approx(seen[30], abs=1e-6)
    assert [look["best"] for look in looks(long)] == [
        at == min((a for a in seen if a <= at), key=lambda a: seen[a]) for at in seen
    ]
    short = train(*STEADY, f"held_out={held_out}", f"max_steps={best}")
    assert metrics(short)["held_out_loss"] == pytest.approx(seen[best], abs=1e-6)
    assert weights(short / "model") == weights(step(long) / "best")
    assert weights(long / "model") != weights(step(long) / "best")
    assert "best_step" not in metrics(short)
    assert not (step(short) / "best").exists()


def test_the_best_model_goes_on_where_that_is_asked_for(
    train: Callable[..., Path], held_out: str
) -> None:
    options = (*STEADY, f"held_out={held_out}", "validate_every=5")
    last, best = train(*options), train(*options, "keep_best=true")
    assert weights(best / "model") == weights(step(last) / "best")
    assert weights(step(best) / "last") == weights(last / "model")
    assert (best / "model").resolve() == (step(best) / "best").resolve()
    moved = best.rename(best.with_name("elsewhere"))
    assert weights(moved / "model") == weights(step(last) / "best")


def test_answers_are_those_the_model_gives(
    train: Callable[..., Path], held_out: str, data: Path, tmp_path: Path
) -> None:
    run = train(f"held_out={held_out}", "validate_every=5", "samples=3")
    rows = json.loads((tmp_path / "held-out.json").read_text())
    assert [look["at"] for look in looks(run)] == [0, 5, 6]
    model = llavakit.load(run / "model")
    asked = [rows[0], rows[2], rows[5]]  # three of eight, spread; the last one without an image
    assert "image" not in asked[2]
    answers = [
        {
            "id": row["id"],
            "question": row["conversations"][0]["value"].removeprefix("<image>\n"),
            "answer": model.generate(
                row["conversations"][0]["value"].removeprefix("<image>\n"),
                images=[data / "images" / row["image"]] if "image" in row else [],
            ),
            "truth": row["conversations"][1]["value"],
            "image": str(data / "images" / row["image"]) if "image" in row else None,
        }
        for row in asked
    ]
    assert looks(run)[-1]["answers"] == answers
    assert looks(run)[0]["answers"] != answers


def test_the_report_shows_the_curve_and_the_answers(
    train: Callable[..., Path], held_out: str
) -> None:
    run = train(f"held_out={held_out}", "validate_every=3", "samples=2")
    page = (run / "report.html").read_text()
    sections = json.loads((step(run) / "artifact.json").read_text())["sections"]
    curve, gallery = sections
    expected = [[look["at"], pytest.approx(look["held_out_loss"], abs=1e-6)] for look in looks(run)]
    assert curve["series"]["held out"] == expected
    assert "Held-out answers while it learns" in page
    assert page.count("step 3") == len(gallery["cards"]) == 2
    assert [label for label, _ in gallery["cards"][0]["lines"]] == [
        "question", "step 0", "step 3", "step 6", "truth",
    ]  # fmt: skip
    assert (step(run) / gallery["cards"][0]["image"]).is_file()


# a best newer than the last checkpoint; one half dropped; before the best model takes its place
@pytest.mark.parametrize("number", [38, 52, 112])
def test_killed_before_any_write_it_resumes_to_the_same(
    write_recipe: RecipeWriter, tmp_path: Path, held_out: str, whole: Path, number: int
) -> None:
    text = write_recipe().read_text()
    options = (
        f"epochs = 2\nkeep_best = true\nvalidate_every = 1\nsamples = 2\nheld_out = {held_out}"
    )
    path = tmp_path / "watched.toml"
    path.write_text(text.replace("epochs = 2", options))
    if not (whole / "run").exists():
        assert processes.run(tmp_path, path, "--out", whole / "run") == 0
    out = tmp_path / "run"
    assert processes.run(tmp_path, path, "--out", out, kill_at=number) == -9
    assert processes.run(tmp_path, path, "--out", out, "--resume") == 0
    for model in ("best", "last", "model"):
        assert weights(step(out) / model) == weights(step(whole / "run") / model)
    kept = [looks_kept(run) for run in (out, whole / "run")]
    assert kept[0] == kept[1]
    assert metrics(out) == metrics(whole / "run")
    names = [path.name for path in (step(out) / "checkpoints").glob("best-*")]
    assert names == [f"best-{metrics(out)['best_step']:06.0f}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def looks_kept(run: Path) -> list[Any]:
    state = json.loads((step(run) / "checkpoints" / "step-000006" / "state.json").read_text())
    found: list[Any] = state["state"]["looks"]
    return found


def test_a_loss_that_is_no_number_is_never_the_best(
    train: Callable[..., Path], held_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavakit_plugins.training import validation

    monkeypatch.setattr(validation, "held_out_loss", lambda *_: math.nan)
    run = train(f"held_out={held_out}", "validate_every=3", "keep_best=true")
    assert [look["held_out_loss"] for look in looks(run)] == [None] * 3
    assert (run / "model").resolve() == (step(run) / "last").resolve()
    assert not (step(run) / "best").exists()


def test_damaged_best_weights_are_named(
    train: Callable[..., Path],
    held_out: str,
    write_recipe: RecipeWriter,
    refused: Callable[..., str],
) -> None:
    options = [f"held_out={held_out}", "validate_every=3"]
    run = train(*options)
    (step(run) / "artifact.json").unlink()
    (best,) = (step(run) / "checkpoints").glob("best-*/state.safetensors")
    torch.testing.assert_close(load_file(best), load_file(best))  # it is whole, so far
    best.write_bytes(best.read_bytes()[:-8])
    sets = [part for text in options for part in ("--set", f"steps.finetune.{text}")]
    text = refused(write_recipe(), "--out", run, "--resume", "--set", "steps.1.skip=true", *sets)
    assert str(best) in text
    assert "damaged" in text


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("validate_every=2", "name a data set there"),
        ("keep_best=true", "`keep_best` needs `validate_every`"),
        ("samples=-1", "option `samples` of `finetune`"),
        ("train={ connector = true }", "`train` of `finetune`: true and false are no numbers"),
        ("epochs=true", "`epochs` of `finetune`: true and false are no numbers"),
        ("max_steps=true", "`max_steps` of `finetune`: true and false are no numbers"),
        ("betas=[false, 0.9]", "`betas` of `finetune`: true and false are no numbers"),
        ("parallel={ shard = true }", "true and false are no numbers"),
        ("processes=9", "`processes = 9` share the samples of a step, and `batch_size = 8`"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    write_recipe: RecipeWriter, refused: Callable[..., str], option: str, sentence: str
) -> None:
    assert sentence in refused(write_recipe(), "--set", f"steps.finetune.{option}")


def test_features_of_an_encoder_that_learns_are_not_kept(
    write_recipe: RecipeWriter, refused: Callable[..., str]
) -> None:
    path = write_recipe()
    learns = ("--plan", "--set", "steps.finetune.train={ vision = 1e-4 }", "--set")
    said = refused(path, *learns, "steps.finetune.cache_features=true")
    assert "`cache_features` is for a frozen encoder: `train` names `vision`" in said


def test_a_template_that_the_tokenizer_lacks_is_refused_before_training(
    write_recipe: RecipeWriter, refused: Callable[..., str], tmp_path: Path
) -> None:
    own = ("--set", 'steps.finetune.template={ use = "chat-template" }')
    for more in (("--plan",), ("--out", tmp_path / "run")):
        assert "the tokenizer has no chat template" in refused(write_recipe(), *more, *own)
    assert not (tmp_path / "run").exists()


def test_a_quoted_number_is_one(write_recipe: RecipeWriter, llava_run: Command) -> None:
    sets = ("--set", "steps.finetune.batch_size='4'")
    assert llava_run(write_recipe(), "--plan", *sets).code == 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("layer = -1", "layer"),
        ("norm = true", "norm"),
        ('select = "cls_patch"', "select"),
        ('dtype = "bfloat16"', "dtype"),
        ('products = "onednn"', "products"),
        ("config = { num_hidden_layers = 3 }", "config"),
    ],
)
def test_what_changes_no_pixels_is_not_prepared(
    write_recipe: RecipeWriter, refused: Callable[..., str], change: str, name: str
) -> None:
    prepare = f'steps.finetune.prepare={{ aspect = "pad", {change} }}'
    said = refused(write_recipe(), "--plan", "--set", prepare)
    assert f"`prepare` of `clip`: `{name}` changes no pixels" in said


def test_every_option_of_pixels_may_be_prepared(
    write_recipe: RecipeWriter, llava_run: Command
) -> None:
    pixels = (
        'aspect = "squash", mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5], fast = true, '
        'interpolation = "bilinear", backend = "torchvision"'
    )
    done = llava_run(write_recipe(), "--plan", "--set", f"steps.finetune.prepare={{ {pixels} }}")
    assert done.code == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["false", "true"])
def test_several_devices_see_the_same(
    write_recipe: RecipeWriter, tmp_path: Path, held_out: str, shard: str
) -> None:
    """Two processes, with whole weights and with divided ones, against one."""
    sets = [
        part
        for text in (
            f"held_out={held_out}",
            "validate_every=2",
            "samples=2",
            "keep_best=true",
            "train={ connector = 1e-4, language = 1e-4 }",
        )
        for part in ("--set", f"steps.finetune.{text}")
    ]
    arguments = (write_recipe(), "--set", "steps.1.skip=true", *sets)
    one, two = tmp_path / "one", tmp_path / "two"
    alone = torchrun(1, *arguments, "--out", one)
    assert alone.returncode == 0, alone.stderr
    shared = torchrun(2, *arguments, "--set", f"steps.finetune.shard={shard}", "--out", two)
    assert shared.returncode == 0, shared.stderr
    assert [look["at"] for look in looks(two)] == [0, 2, 4, 6]
    for mine, theirs in zip(looks(two), looks(one), strict=True):
        assert mine["held_out_loss"] == pytest.approx(theirs["held_out_loss"], abs=2e-6)
        assert mine["best"] == theirs["best"]
        assert mine["answers"] == theirs["answers"]
    for model in ("best", "last"):
        for name, weight in tensors(step(one) / model).items():
            torch.testing.assert_close(tensors(step(two) / model)[name], weight, atol=2e-6, rtol=0)
    assert (two / "model").resolve() == (step(two) / "best").resolve()


def tensors(model: Path) -> dict[str, torch.Tensor]:
    found = load_file(model / "connector.safetensors")
    return found | load_file(model / "language" / "model.safetensors")
