"""No layout is read or imported with two copies of the weights in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.checkpoints.test_layouts_original import make as make_original
from tests.plugins.made_checkpoints import make_hf

LIMIT = 1.3
"""Of the weights' size as they are in memory afterwards; of a pickle's, which is read whole."""

PROBE = """\
import gc, json, sys
from pathlib import Path
from typing import Any
import torch
import llavakit
from llavakit.cli import main

def read(name):
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    return int(lines[name].split()[0]) * 1024

def peak(call):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = read("VmRSS")
    kept = call()
    return read("VmHWM") - before

home = Path(sys.argv[1])
sources = {
    "native": (home / "native", {}),
    "hf": (home / "hf", {}),
    "original": (home / "shards" / "checkpoint", {"vision": home / "shards" / "clip"}),
    "pickles": (home / "pickles" / "checkpoint", {"vision": home / "pickles" / "clip"}),
}
found = {}
for name, (folder, more) in (("first", sources["pickles"]), *sources.items()):
    for dtype in (None, torch.bfloat16):
        load = lambda: llavakit.load(folder, device="cpu", dtype=dtype, **more)
        found[f"{name} {dtype}"] = peak(load)
    if name != "native":
        flags = [text for key, value in more.items() for text in (f"--{key}", str(value))]
        command = ["import", str(folder), str(home / f"{name}-imported"), *flags]
        found[f"{name} import"] = peak(lambda: main(command))
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_there_is_one_copy_of_the_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration as Theirs

    from llavakit.cli import main

    language: dict[str, Any] = {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6,
        "num_attention_heads": 8, "vocab_size": 1000, "max_position_embeddings": 256,
    }  # fmt: skip
    make_original(tmp_path / "shards", language=language, shards=True)
    make_original(tmp_path / "pickles", language=language, pickle=True)
    make_hf(tmp_path / "hf")  # for its tokenizer and processor
    table = json.loads((tmp_path / "hf" / "config.json").read_text())
    table["text_config"] = LlamaConfig(**language).to_dict()
    theirs = Theirs(LlavaConfig(**table))
    theirs.save_pretrained(tmp_path / "hf")
    size = 4 * sum(parameter.numel() for parameter in theirs.parameters())
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "native")]) == 0

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROBE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    measured = {what: peak for what, peak in found.items() if not what.startswith("first")}
    assert len(measured) == 11
    for what, peak in measured.items():
        held = size / 2 if what.endswith("bfloat16") and "pickles" not in what else size
        assert peak < LIMIT * held, f"{what}: {peak / held:.2f}"
