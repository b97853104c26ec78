"""What is learned does not depend on how the work is cut up; the schedule is transformers'."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.conftest import LANGUAGE, Command, RecipeWriter
from tests.core import processes
from tests.forks import runs
from tests.plugins.training.test_forked import where_forks_are
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llavakit import Dataset, Recipe, Registry, Use
from llavakit.model.folder import create_model, load_model
from llavakit.stream.images import open_image
from llavakit_plugins.training import heap
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.kinds import Group
from llavakit_plugins.training.optimiser import Rates, Updates
from llavakit_plugins.training.schedules import Constant, Cosine, FallingOptions
from llavakit_plugins.vision.clip import Clip

Trained = tuple[list[float], list[float], dict[str, Tensor]]
Train = Callable[..., Trained]


@pytest.fixture
def train(write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path) -> Train:
    """A function that trains the second step with these options; returns what came of it."""

    def call(*overrides: str, changes: tuple[tuple[str, str], ...] = ()) -> Trained:
        out = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        sets = [part for text in overrides for part in ("--set", f"steps.finetune.{text}")]
        path = write_recipe(*changes)
        code, _, err = llava_run(path, "--out", out, "--set", "steps.1.skip=true", *sets)
        assert code == 0, err
        lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        events = [line for line in lines if line["event"] == "train"]
        model = out / "model"
        weights = load_file(model / "connector.safetensors")
        weights |= load_file(model / "language" / "model.safetensors")
        return [e["loss"] for e in events], [e["grad_norm"] for e in events], weights

    return call


def assert_equal(left: Trained, right: Trained, tolerance: float) -> None:
    assert left[0] == pytest.approx(right[0], abs=tolerance)
    assert left[1] == pytest.approx(right[1], rel=10 * tolerance)
    for name, weight in left[2].items():
        torch.testing.assert_close(weight, right[2][name], atol=tolerance, rtol=0)


def conversations(data: Path) -> Dataset:
    options = {"path": f"{data}/train.json", "images": f"{data}/images"}
    use = Use[Dataset].model_validate({"use": "conversations", **options})
    return Registry.installed().build(use)


GENTLE = "train={ connector = 1e-4, language = 1e-4 }"


@pytest.mark.parametrize(
    "other",
    [
        ["micro_batch_tokens=8"],  # every sample alone
        ["micro_batch_tokens=100000"],  # all at once
        ["cache_features=false"],
        ["cache_features=false", "workers=2"],
        ["recompute=true"],
    ],
    ids=lambda options: options[-1],
)
def test_how_the_work_is_done_changes_no_loss_and_no_weight(train: Train, other: list[str]) -> None:
    assert_equal(train(GENTLE), train(GENTLE, *other), 2e-6)


def test_the_loss_is_the_mean_over_target_tokens(
    train: Train, write_recipe: RecipeWriter, data: Path, backbones: Path
) -> None:
    """The first loss of a batch of everything, against one sample at a time in float64."""
    losses, _, _ = train("batch_size=24", "epochs=1", "micro_batch_tokens=64")
    registry = Registry.installed()
    recipe = Recipe.load(write_recipe(), registry)
    assert recipe.model is not None
    model = create_model(recipe.model, registry, seed=0)
    samples = conversations(data)
    corpus = Corpus(samples, model, model.template, 2048)
    model = model.double()
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(samples)):
            batch = corpus.pack([index])
            pixels = [model.vision.prepare(open_image(i, "")) for i in samples[index].images]
            features = model.features(torch.stack(pixels).double()) if pixels else None
            hidden = model.language.hidden(model.embed(batch, features), batch.packing)
            logits = model.language.head(hidden)[batch.supervised_rows.index_M]
            total += torch.nn.functional.cross_entropy(
                logits, batch.targets_M, reduction="sum"
            ).item()
            count += len(batch.targets_M)
    assert losses[0] == pytest.approx(total / count, abs=2e-6)
    assert min(len(sample.images) for sample in samples) == 0  # text-only samples among them


def test_samples_with_several_images_and_with_none_go_together(
    train: Train, tmp_path: Path, data: Path
) -> None:
    rows = json.loads((data / "train.json").read_text())
    rows[0] |= {
        "image": ["0.png", "1.png", "0.png"],
        "conversations": [
            {"from": "human", "value": "<image> a <image>"},
            {"from": "gpt", "value": "red ."},
            {"from": "human", "value": "what is <image> ?"},
            {"from": "gpt", "value": "a square ."},
        ],
    }
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    changes = ((f"{data}/train.json", str(tmp_path / "mixed.json")),)
    whole = train(GENTLE, changes=changes)
    assert_equal(whole, train(GENTLE, "micro_batch_tokens=8", changes=changes), 2e-6)
    assert_equal(whole, train(GENTLE, "cache_features=false", changes=changes), 2e-6)


def test_micro_batches_of_text_alone_where_only_the_connector_learns(train: Train) -> None:
    alone = "train={ connector = 1e-2 }"
    whole = train(alone)
    assert_equal(whole, train(alone, "micro_batch_tokens=8"), 2e-6)


@pytest.mark.parametrize("optimiser", ["adamw", "adamw8bit", "muon"])
def test_steps_of_text_alone_where_only_the_connector_learns(train: Train, optimiser: str) -> None:
    options = ("train={ connector = 1e-2 }", "batch_size=1", f'optimiser={{ use = "{optimiser}" }}')
    losses, norms, _ = train(*options)
    assert len(losses) == 48
    assert norms.count(0) == 8  # four texts in each of two epochs
    assert all(map(math.isfinite, losses))


def test_data_without_images_teaches_a_connector_nothing(
    write_recipe: RecipeWriter, refused: Callable[..., str], tmp_path: Path, data: Path
) -> None:
    rows = [row for row in json.loads((data / "train.json").read_text()) if "image" not in row]
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    path = write_recipe((f"{data}/train.json", str(tmp_path / "texts.json")))
    options = ("--set", "steps.1.skip=true", "--set", "steps.finetune.train={ connector = 1e-2 }")
    found = refused(path, "--out", tmp_path / "run", *options)
    assert (
        "`train` names `connector` alone, which learn from images, and the data has none" in found
    )


def test_bf16_learns_the_same_within_its_precision(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    full = train(GENTLE)
    assert not caplog.messages
    half = train(GENTLE, 'precision="bf16"')
    assert "try --set steps.finetune.precision=fp32" in caplog.text  # on a CPU
    assert half[0] == pytest.approx(full[0], rel=0.01)
    assert half[0] != full[0]
    for weight in half[2].values():
        assert weight.dtype == torch.float32


def test_freed_memory_is_kept_on_a_cpu(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[None] = []
    monkeypatch.setattr(heap, "settle", lambda: settled.append(None))
    train()
    assert settled


def test_weights_are_rounded_once_a_step(train: Train) -> None:
    """And not once a micro-batch, which costs a large model some hundredths of its time."""
    casts = []
    down = (LANGUAGE["hidden_size"], LANGUAGE["intermediate_size"])

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
                casts.append(tuple(args[0].shape))
            return func(*args, **kwargs or {})

    counts = []
    for rows in (8, 100_000):  # every sample alone, and all at once
        with cast(Any, Casts)():
            train(GENTLE, 'precision="bf16"', f"micro_batch_tokens={rows}", "max_steps=2")
        counts.append(casts.count(down))
        casts.clear()
    assert counts == [2 * LANGUAGE["num_hidden_layers"]] * 2


def test_images_are_read_by_the_same_processes_all_the_time(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "processes"
    prepare = Clip.prepare

    def noted(self: Clip, image: Image.Image) -> Tensor:
        with seen.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return prepare(self, image)

    monkeypatch.setattr(Clip, "prepare", noted)
    train(GENTLE, "cache_features=false", "workers=2", "epochs=3")
    processes = set(seen.read_text().split())
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


@where_forks_are
def test_those_processes_end_with_the_one_that_is_killed(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    """PyTorch's own look for it every five seconds."""
    options = {"cache_features": "false", "workers": "2", "epochs": "9999"}
    sets = [part for key in options for part in ("--set", f"steps.finetune.{key}={options[key]}")]
    out = tmp_path / "run"
    process = processes.start(
        tmp_path, write_recipe(), "--out", out, "--set", "steps.1.skip=true", *sets
    )
    end = time.monotonic() + 90
    events = out / "events.jsonl"
    while not events.exists() or '"train"' not in events.read_text():
        assert time.monotonic() < end, (tmp_path / "terminal.txt").read_text()
        time.sleep(0.05)
    tasks = Path(f"/proc/{process.pid}/task")
    readers = {int(pid) for task in tasks.glob("*/children") for pid in task.read_text().split()}
    assert len(readers) >= 2
    process.kill()
    assert processes.finish(process) == -signal.SIGKILL
    end = time.monotonic() + 2
    while any(map(runs, readers)):
        assert time.monotonic() < end, "they read on"
        time.sleep(0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_leave_as_they_came(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, backbones: Path, precision: str
) -> None:
    out = tmp_path / "run"
    setting = f'steps.pretrain.precision="{precision}"'
    code, _, err = llava_run(
        write_recipe(), "--out", out, "--set", "steps.2.skip=true", "--set", setting
    )
    assert code == 0, err
    for part in ("vision", "language"):
        trained = load_file(out / "model" / part / "model.safetensors")
        for name, weight in load_file(backbones / part / "model.safetensors").items():
            assert torch.equal(trained[name], weight), name


def test_what_training_rounds_to_bf16_does_not_touch_rotary_positions(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert llava_run(write_recipe(), "--out", out, "--set", "steps.2.skip=true").code == 0
    model = load_model(out / "model", Registry.installed(), dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    floating = [b for b in model.language.buffers() if b.is_floating_point()]
    assert floating
    assert all(buffer.dtype == torch.float32 for buffer in floating)


def test_only_the_named_parts_learn_each_at_its_rate(train: Train, backbones: Path) -> None:
    _, _, weights = train("train={ connector = 1e-2 }")
    for name, weight in load_file(backbones / "language" / "model.safetensors").items():
        assert torch.equal(weights[name], weight)
    _, _, weights = train("train={ language = 1e-9, connector = 1e-2 }")
    moved = [
        (weights[name] - weight).abs().max().item()
        for name, weight in load_file(backbones / "language" / "model.safetensors").items()
    ]
    assert max(moved) < 1e-7


def test_the_vision_encoder_can_learn_too(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, backbones: Path
) -> None:
    out = tmp_path / "run"
    setting = "steps.finetune.train={ vision = 1e-3, connector = 1e-3 }"
    code, _, err = llava_run(
        write_recipe(), "--out", out, "--set", "steps.1.skip=true", "--set", setting
    )
    assert code == 0, err
    before = load_file(backbones / "vision" / "model.safetensors")
    after = load_file(out / "model" / "vision" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("layers.0" in name for name in changed)
    assert not any("layers.2" in name for name in changed)  # behind the features of layer -2


# -- schedule and clipping -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "share"), [(1, 0.0), (7, 0.0), (50, 0.03), (40, 0.5), (4651, 0.03)]
)
def test_the_learning_rate_is_that_of_transformers(steps: int, share: float) -> None:
    from transformers import get_cosine_schedule_with_warmup

    parameter = torch.nn.Parameter(torch.zeros(1))
    peer = torch.optim.SGD([parameter], lr=2.0)
    schedule = get_cosine_schedule_with_warmup(peer, math.ceil(share * steps), steps)
    ours = Rates(Cosine(FallingOptions()), steps, share)
    for step in range(steps):
        assert 2.0 * ours(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        peer.step()
        schedule.step()


def test_steps_are_those_of_adamw_behind_a_clipped_gradient() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(6, 5, 3)
    mine, peer = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours = Updates([Group({"w": mine}, 0.1, 0.01)], Rates(Constant(), 6, 0.0), clip=0.5)
    theirs: Any = torch.optim.AdamW([peer], lr=0.1, weight_decay=0.01)
    for step in range(6):
        mine.grad, peer.grad = gradients[step].clone(), gradients[step].clone()
        norm, rate = ours.step(step)
        assert norm.item() == pytest.approx(gradients[step].norm().item())
        assert rate == 0.1
        torch.nn.utils.clip_grad_norm_([peer], 0.5)
        theirs.step()
        torch.testing.assert_close(mine, peer, atol=1e-7, rtol=1e-6)
        assert mine.grad is None


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_after_what_is_no_number_no_weight_and_no_state_changes(fault: str) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimiser = Updates([Group({"w": weight}, 0.1)], Rates(Constant(), 6, 0.0))
    kept: dict[str, Tensor] = {}
    for step in range(6):
        weight.grad = torch.randn(5, 3)
        loss = torch.tensor(1.0)
        if step == 3:
            kept = {name: tensor.clone() for name, tensor in optimiser.tensors().items()}
            if fault == "loss":
                loss = loss * float("nan")
            else:
                weight.grad[2, 1] = float("inf")
        norm, _ = optimiser.step(step, loss)
        assert math.isfinite(norm.item()) == (step != 3 or fault == "loss")
    assert set(kept) == {"parameter/w", "step/w", "exp_avg/w", "exp_avg_sq/w"}
    for name, tensor in optimiser.tensors().items():
        assert torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize("log_every", [2, 100])
def test_how_often_the_loss_is_looked_at_changes_nothing(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, log_every: int
) -> None:
    found = []
    for name, change in (("a", []), ("b", [("log_every = 1", f"log_every = {log_every}")])):
        out = tmp_path / name
        assert llava_run(write_recipe(*change), "--out", out).code == 0
        state = json.loads(next((out / "02-finetune").rglob("state.json")).read_text())["state"]
        found.append((state["losses"], load_file(out / "model" / "connector.safetensors")))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 6
    for name, weight in found[0][1].items():
        assert torch.equal(weight, found[1][1][name])


def test_max_steps_and_epochs_decide_the_steps(train: Train) -> None:
    assert len(train("max_steps=2")[0]) == 2
    assert len(train("epochs=3", "batch_size=7")[0]) == 3 * 4


def test_shuffling_shows_every_sample_once_an_epoch(data: Path, write_recipe: RecipeWriter) -> None:
    registry = Registry.installed()
    model = create_model(Recipe.load(write_recipe(), registry).model, registry, seed=0)
    corpus = Corpus(conversations(data), model, model.template, 2048)
    epochs = [
        [sample for batch in corpus.epoch(3, epoch, 7, 64) for sample in batch.all_samples]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]
    again = [s for batch in corpus.epoch(3, 0, 7, 1000) for s in batch.all_samples]
    assert [set(again[i : i + 7]) for i in range(0, 24, 7)] == [
        set(epochs[0][i : i + 7]) for i in range(0, 24, 7)
    ]


def test_held_out_loss_is_measured(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, data: Path
) -> None:
    held = f'{{ use = "conversations", path = "{data}/train.json", images = "{data}/images" }}'
    out = tmp_path / "run"
    code, _, err = llava_run(
        write_recipe(), "--out", out,
        "--set", f"steps.finetune.held_out={held}", "--set", "steps.finetune.max_steps=1",
        "--set", "steps.finetune.batch_size=24", "--set", "steps.finetune.warmup=0.5",
    )  # fmt: skip
    assert code == 0, err
    metrics = json.loads((out / "02-finetune" / "artifact.json").read_text())["metrics"]
    # the only step is the first of its warm-up, at rate 0: nothing was learned
    assert metrics["held_out_loss"] == pytest.approx(metrics["loss"], abs=2e-6)
