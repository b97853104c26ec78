"""Whole models on the device against the CPU, and the small recipe: sections of gpu.py."""

from __future__ import annotations

import copy
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from tests.benchmarks.gpu_session import DEVICE, DRY, Session, clocks, relative_error, release
from tests.benchmarks.train_cpu import make_samples
from tests.core.peer import make_pair
from torch import Tensor

from llavakit import LlavaModel, TrainingError
from llavakit.contracts.model import Sampling
from llavakit.model.folder import cast_weights
from llavakit.stream.batch import PackedBatch, pack
from llavakit_plugins.training import compiling

REPOSITORY = Path(__file__).parents[2]
VISION = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14, "projection_dim": 64,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.04,
}  # fmt: skip
QUESTION = "what colour is the circle in the picture ? what shape is the square ?"
NEEDED = ("pydantic", "pydantic_settings", "tomli_w", "timm", "peft", "bitsandbytes", "shtab")


# --- environment ------------------------------------------------------------------------------


def environment(session: Session) -> None:
    """What this machine is, and what of ours it lacks: told before anything is measured."""
    from llavakit import Registry

    name, memory = "CPU (dry run)", 0.0
    if not DRY:
        properties = torch.cuda.get_device_properties(DEVICE)
        name, memory = properties.name, properties.total_memory / 1e9
    session.row(
        "environment",
        device=name,
        memory_GB=memory,
        cuda=torch.version.cuda,
        cores=os.cpu_count(),
        machine=platform.machine(),
        **clocks(),
    )
    missing = []
    for module in NEEDED:
        try:
            importlib.import_module(module)
        except Exception as error:
            missing.append(f"{module} ({type(error).__name__})")
    if missing:
        session.say(f"cannot be imported: {', '.join(missing)}")
    # entry points come with an installed distribution, and not with a folder on the path
    Registry.installed()
    found = len(entry_points(group="llavakit"))
    session.row("plugins", found=found, error=float(not found), limit=0.0)


# --- steps and answers against the CPU ----------------------------------------------------------


def models(session: Session) -> None:
    """A step of either stage, answers, and weights of 4 bits."""
    _, expected = make_pair(VISION, LANGUAGE)
    for learns in (True, False):
        _check_step(session, expected, learns, half=True)
    if session.time_for("nf4", 0 if DRY else 8):
        _check_four_bits(session)
    if session.time_for("recorded steps", 0 if DRY else 8):
        _check_replay(session, copy.deepcopy(expected).to(DEVICE))
    # the kernels in float32, which nobody trains in, are compiled for many seconds
    if session.time_for("answers", 0 if DRY else 10):
        _check_answers(session, expected, copy.deepcopy(expected).to(DEVICE))
    for learns in (True, False):
        if session.time_for(f"float32, stage {1 + learns}", 0 if DRY else 10):
            _check_step(session, expected, learns, half=False)


def _data(model: LlavaModel, count: int = 6) -> tuple[PackedBatch, Tensor]:
    samples = make_samples(6, 40, 0.5, seed=3)[:count]
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(6, 3, 56, 56, generator=draw)[:count]
    return pack(samples, range(count), model.visual_tokens), pixels


def _step(
    model: LlavaModel, batch: PackedBatch, pixels: Tensor, half: bool, learns: bool
) -> dict[str, Tensor]:
    """Return the loss and the gradients of a step, those of all that learns in one tensor."""
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    model.language.requires_grad_(learns)
    if half:  # as the training steps have them: what is frozen is rounded
        for frozen in (model.vision, *([] if learns else [model.language])):
            cast_weights(frozen, torch.bfloat16)
    with torch.no_grad():
        features = model.features(pixels.to(model.device, next(model.vision.parameters()).dtype))
    kind = model.device.type
    with torch.autocast(kind, torch.bfloat16) if half else nullcontext():
        loss = model.loss(batch.to(model.device), features) / len(batch.targets_M)
    loss.backward()
    found = {"loss": loss.detach().cpu()}
    for part in ("connector", "language") if learns else ("connector",):
        gradients = [p.grad for p in _part(model, part).parameters() if p.grad is not None]
        assert gradients
        found[f"d {part}"] = torch.cat([g.flatten().cpu().double() for g in gradients])
    return found


def _part(model: LlavaModel, name: str) -> torch.nn.Module:
    part: torch.nn.Module = getattr(model, name)
    return part


def _check_step(session: Session, model: LlavaModel, learns: bool, half: bool) -> None:
    """Compare loss and gradients with those of float32 on the CPU."""
    batch, pixels = _data(model)
    expected = _step(copy.deepcopy(model), batch, pixels, half=False, learns=learns)
    for recompute in (False, True) if half else (False,):
        mine = copy.deepcopy(model).to(DEVICE)
        mine.language.recompute = recompute
        found = _step(mine, batch, pixels, half=half, learns=learns)
        for name, value in expected.items():
            session.row(
                "models",
                what=f"stage {1 + learns}, {name}" + ", recomputed" * recompute,
                precision="bf16" if half else "fp32",
                error=relative_error(found[name], value),
                # of 3 layers in bfloat16: 2^-8 for each of the products that a gradient passes
                limit=(0.01 if name == "loss" else 0.04) if half else 1e-4,
            )
        del mine
        release()


def _check_answers(session: Session, expected: LlavaModel, ours: LlavaModel) -> None:
    """Greedy answers of one prompt and of three together, token for token."""
    for model in (expected, ours):
        model.language.tokenizer.eos_token = None  # random weights end an answer at any time
    for count in (1, 3):
        draw = torch.Generator().manual_seed(count)
        pixels = torch.randn(count, 3, 56, 56, generator=draw)
        texts = [" ".join(["<image>", *QUESTION.split()[n:]]) for n in range(count)]
        found = []
        for model in (expected, ours):
            asked: Any = [(text, [None]) for text in texts]
            given = pixels.to(model.device)
            found.append(model.answer_ids(asked, Sampling(24), raw=True, pixels_IHW=given))
        same = sum(a == b for x, y in zip(*found, strict=True) for a, b in zip(x, y, strict=True))
        session.row(
            "models", what=f"greedy tokens, {count} at once", precision="fp32",
            error=1 - same / (24 * count), limit=0.0,
        )  # fmt: skip


def _check_replay(session: Session, ours: LlavaModel) -> None:
    """Answers whose steps are recorded, some of which end early, beside the same step by step."""
    if DRY:  # nothing is recorded on a CPU
        return
    ours.language.tokenizer.eos_token = None
    pixels = torch.randn(3, 3, 56, 56, device=DEVICE)
    ours.to(torch.bfloat16)
    asked: Any = [(" ".join(["<image>", *QUESTION.split()[n:]]), [None]) for n in range(3)]
    found = []
    replay: Any = ours.language._replay
    for works in (False, True):
        replay._works = works
        ids = ours.answer_ids(asked, Sampling(280), raw=True, pixels_IHW=pixels.bfloat16())
        found.append([token for answer in ids for token in answer])
    recorded = replay._works and replay._last is not None
    wrong = sum(a != b for a, b in zip(*found, strict=True)) / len(found[0])
    session.row(
        "models", what=f"recorded steps ({recorded}) beside usual ones", precision="bf16",
        error=wrong if recorded else 1.0, limit=0.0,
    )  # fmt: skip


def _check_four_bits(session: Session) -> None:
    """Weights of 4 bits beside transformers' own, and a step of adapters on them (QLoRA)."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        session.say(f"nf4 is not checked: bitsandbytes is not here ({type(error).__name__})")
        return
    from tests.conftest import make_tokenizer
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    from llavakit.contracts.packing import Packing
    from llavakit_plugins.language.lora import LoraOptions
    from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions

    dtype = torch.float32 if DRY else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**LANGUAGE)).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
        theirs = LlamaForCausalLM.from_pretrained(
            folder, quantization_config=how, device_map={"": str(DEVICE)}, dtype=dtype
        )
        given: dict[str, Any] = {"source": folder, "quantize": "nf4", "dtype": str(dtype)[6:]}
        given["device"] = DEVICE.type
        small = Vicuna.create(VicunaOptions(**given)).eval()
        adapted = Vicuna.create(VicunaOptions(**given, lora=LoraOptions(rank=8, dropout=0.0)))
    ids = torch.randint(3, 500, (40,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    packing = Packing.of([40], DEVICE)
    with torch.no_grad():
        expected = theirs(input_ids=ids[None]).logits[0]
        found = small.logits(small.hidden(small.embed(ids), packing))
    session.row(
        "models", what="nf4 beside transformers'", precision=str(dtype)[6:],
        error=relative_error(found, expected), limit=2e-2,  # some CPUs, too, compute in bfloat16
    )  # fmt: skip
    adapted.requires_grad_(False)
    learning = [p.requires_grad_(True) for _, p in adapted.trainable()]
    before = [p.detach().clone() for p in learning]
    optimiser = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    for _ in range(4):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
            hidden = adapted.hidden(adapted.embed(ids), packing)
            loss = adapted.loss(hidden[:-1], ids[1:]) / 39
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    moved = any(not torch.equal(a, b) for a, b in zip(before, learning, strict=True))
    well = moved and all(loss == loss for loss in losses) and losses[-1] < losses[0]
    session.row(
        "models", what=f"QLoRA, loss {losses[0]:.3f} to {losses[-1]:.3f}", precision="bf16",
        error=float(not well), limit=0.0,
    )  # fmt: skip


# --- torch.compile ------------------------------------------------------------------------------


def compiled(session: Session) -> None:
    """A step of either stage with `compile = true`, beside the same without; two lengths."""
    _, model = make_pair(VISION, LANGUAGE)
    model.to(DEVICE)
    batches = [_data(model, count) for count in (6, 4)]
    if DRY:
        compiling.BACKEND = "eager"
    for learns in (True, False):
        expected = [_step(model, *each, half=not DRY, learns=learns) for each in batches]
        begun = time.monotonic()
        blocks = compiling.Compiled(model, encoder=True)
        graphs = []
        try:
            for each, plain in zip(batches, expected, strict=True):
                found = _step(model, *each, half=not DRY, learns=learns)
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
                for what, value in found.items():
                    session.row(
                        "compile",
                        what=f"stage {1 + learns}, {what}, {len(each[1])} samples",
                        seconds=round(time.monotonic() - begun, 1),
                        error=relative_error(value, plain[what]),
                        limit=1e-4 if DRY else 0.03,
                    )
            again = graphs[1] - graphs[0]
            session.row(
                "compile", what=f"stage {1 + learns}, compiled again for another length",
                graphs=graphs[0], error=float(again), limit=0.0,
            )  # fmt: skip
        except TrainingError as error:
            session.row("compile", what=str(error)[:500], error=1.0, limit=0.0)
        finally:
            blocks.undo()


# --- the small recipe ---------------------------------------------------------------------------

LESS = {  # for the dry run: every step, and nothing learned
    "steps.scenes.train": 48, "steps.scenes.test": 8,
    "steps.backbones.contrastive.steps": 3, "steps.backbones.contrastive.batch_size": 8,
    "steps.backbones.text.steps": 3, "steps.pretrain.max_steps": 3, "steps.finetune.max_steps": 40,
    "steps.finetune.log_every": 1, "steps.export.heatmaps": 1,
}  # fmt: skip


def tiny(session: Session) -> None:
    """recipes/tiny.toml: interrupted in its second stage, then resumed to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        changes = {"device": DEVICE.type} | (LESS if DRY else {"steps.finetune.log_every": 10})
        command = [sys.executable, "-m", "llavakit", str(REPOSITORY / "recipes" / "tiny.toml")]
        command += ["--out", str(out)]
        for key, value in changes.items():
            command += ["--set", f"{key}={value}"]
        begun = time.monotonic()
        with _started(command) as process:
            while process.poll() is None and not _trains(out, 3 if DRY else 100):
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            code = process.wait()
        session.row(
            "tiny", what="interrupted, code 130", seconds=time.monotonic() - begun,
            error=float(code != 130), limit=0.0,
        )  # fmt: skip
        with _started([*command, "--resume"]) as process:
            code = process.wait()
        seconds = time.monotonic() - begun
        events = _events(out)
        resumed = any(event["event"] == "resumed" for event in events)
        session.row(
            "tiny", what="resumed to the end", seconds=seconds,
            error=float(code != 0 or not resumed), limit=0.0,
        )  # fmt: skip
        for event in events:
            if event["event"] == "done":
                told = {key: event[key] for key in event if key not in ("time", "event")}
                session.row("tiny: steps", **told)
        accuracy = max(float(event.get("sighted_accuracy", 0)) for event in events)
        session.goal("tiny", "accuracy", 0.0 if DRY else 0.9, accuracy)
        speeds = [float(event["samples_per_s"]) for event in events if _is_second(event)]
        speed = statistics.median(speeds) if speeds else 0.0
        session.say(
            f"tiny: {seconds:.0f} s, accuracy {accuracy:.3f}, stage 2 {speed:.0f} samples/s"
        )


@contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    roots = [str(REPOSITORY / root) for root in ("core", "plugins", "kernels")]
    path = os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()


def _events(out: Path) -> list[dict[str, Any]]:
    try:
        lines = (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _trains(out: Path, step: int) -> bool:
    """Say whether the second stage has come to a step."""
    return any(_is_second(event) and event["at"] >= step for event in _events(out))


def _is_second(event: dict[str, Any]) -> bool:
    return bool(event["event"] == "train" and event["step"].endswith("finetune"))
