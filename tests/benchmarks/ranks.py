"""One training on 1, 2 and 4 processes: what each costs rank 0; two sections of scale_cpu.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread

RANKS = (1, 2, 4)
STEPS = 6
SHAPE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 12, "vocab_size": 2048, "max_position_embeddings": 256,
}  # fmt: skip
RECIPE = """\
name = "ranks"
device = "cpu"

[model]
connector = { use = "mlp" }
vision = { use = "clip", source = "@/vision" }
language = { use = "vicuna", source = "@/language" }
template = { use = "vicuna_v1", system = "" }

[[steps]]
use = "finetune"
train = { connector = 1e-4, language = 1e-4 }
batch_size = 16
micro_batch_tokens = 256
log_every = 1
checkpoint_every = 1000
data = { use = "conversations", path = "@/rows.json", images = "@" }
"""


def ranks() -> None:
    """Samples a second, and memory of rank 0, in training a language model of 4 layers.

    32M weights in float32, divided among the processes, each with one thread; 16 samples of about
    60 tokens a step, a checkpoint at the end. `MB` is the most that rank 0 has for itself, less
    what it has after its imports; `state` is what a plan says of that: weights, gradients and
    moments. The rest is activations, blocks that are gathered, and the copy that a checkpoint of
    divided weights is written from while training goes on.
    """
    print(f"{'ranks':>5} {'samples/s':>10} {'to one':>7} {'MB':>6} {'to one':>7} {'state MB':>9}")
    with TemporaryDirectory() as name:
        folder = Path(name)
        recipe = _prepare(folder)
        first: tuple[float, float] | None = None
        for number in RANKS:
            rate, most = _train(folder, recipe, number)
            first = first or (rate, most)
            print(
                f"{number:5} {rate:10.2f} {rate / first[0]:6.2f}x {most:6.0f} "
                f"{most / first[1]:6.2f}x {_planned(recipe, number):9.0f}",
                flush=True,
            )


def pause() -> None:
    """How long a checkpoint of divided weights holds up 4 processes: see checkpoint_pause.py."""
    program = Path(__file__).with_name("checkpoint_pause.py")
    print(_torchrun(4, str(program)).strip())


def _prepare(folder: Path) -> Path:
    """Write a model of random weights, made by transformers, and rows; return the recipe."""
    from tests.benchmarks.synthetic import small_model
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    CLIPVisionModel(CLIPVisionConfig(**small)).save_pretrained(folder / "vision")  # type: ignore[arg-type]
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "language")  # type: ignore[arg-type]
    small_model()[0].language.tokenizer.save_pretrained(folder / "language")
    text = "a small red cat sits on a large old house near a green tree . " * 2
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    rows = [{"id": str(number), "conversations": turns} for number in range(16 * STEPS)]
    (folder / "rows.json").write_text(json.dumps(rows))
    recipe = folder / "ranks.toml"
    recipe.write_text(RECIPE.replace("@", str(folder)))
    return recipe


def _train(folder: Path, recipe: Path, number: int) -> tuple[float, float]:
    """Return samples a second from step to step, and MB of rank 0."""
    run, found = folder / f"run-{number}", folder / f"{number}.json"
    _torchrun(number, __file__, str(found), str(recipe), "--out", str(run))
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rates = [line["samples_per_s"] for line in lines if line["event"] == "train"]
    return median(rates[2:]), json.loads(found.read_text())["mb"]


def _torchrun(number: int, *words: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(number), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # what is freed goes back at once: glibc would keep the blocks that FSDP gathers and frees
    environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def _planned(recipe: Path, number: int) -> float:
    from llavakit import Recipe, Registry, make_plan

    registry = Registry.installed()
    sets = [f"machine.devices={number}", "machine.tflops=1"]
    plan = make_plan(Recipe.load(recipe, registry, sets), registry)
    memory = plan.steps["01-finetune"].memory
    return 1e3 * sum(memory[kind] for kind in ("weights", "gradients", "moments"))


def _one_rank() -> int:
    """Run the command as one process of torchrun; rank 0 writes down its memory."""
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama  # noqa: F401

    from llavakit.cli import main

    before = _own_mb()
    most = [before]

    def look() -> None:
        while True:
            most[0] = max(most[0], _own_mb())
            time.sleep(0.02)

    Thread(target=look, daemon=True).start()
    code = main(sys.argv[2:])
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps({"mb": most[0] - before}))
    return code


def _own_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    ended = _one_rank()
    sys.stdout.flush()
    os._exit(ended)  # the process group's threads may abort while the interpreter finalises
