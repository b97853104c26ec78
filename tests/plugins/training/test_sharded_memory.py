"""No process holds a whole copy of what is divided: while it is read, and while it is written."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import LANGUAGE, RecipeWriter
from tests.core import processes

SHAPE = {**LANGUAGE, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10}


def own() -> int:
    """Return the bytes that only this process can give back: what is mapped from files is shared.

    What is free, but not given back, would hide what is taken next.
    """
    gc.collect()
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    return _anonymous()


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def at_most(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return what `work` returns, and the most bytes that the process took in the meantime."""
    before, ended, seen = own(), threading.Event(), []

    def look() -> None:
        while not ended.wait(0.002):
            seen.append(_anonymous())

    looking = threading.Thread(target=look)
    looking.start()
    result = work()
    ended.set()
    looking.join()
    return result, max(*seen, _anonymous()) - before


def read_and_write(arguments: list[str]) -> None:
    """Divide the model among 4 processes, then in two groups of 2; write what was read."""
    import llavakit
    from llavakit_plugins.huggingface.unread import leave_unread
    from llavakit_plugins.training.checkpoints import write_whole
    from llavakit_plugins.training.parallel import shard
    from llavakit_plugins.training.torchrun import join

    folder, found = Path(arguments[1]), {}

    def divided(parts: int) -> Any:
        with leave_unread() as unread:
            model = llavakit.load(arguments[0], device="cpu").requires_grad_(True)
        device = torch.device("cpu")
        shard(model, group, device, parts, half=False, encoder=False, unread=unread)
        return model

    with join("cpu") as (group, _):
        divided(4)  # what libraries keep of their own
        for parts in (4, 2):
            model, found[f"read in {parts}"] = at_most(partial(divided, parts))
            weights = dict(model.language.named_parameters())
            path = folder / f"{parts}.safetensors" if group.is_main else None
            _, found[f"written from {parts}"] = at_most(partial(write_whole, weights, path))
            del model, weights
        (folder / f"{group.rank}.json").write_text(json.dumps(found))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a process holds")
@pytest.mark.parametrize("filed", [torch.float32, torch.bfloat16], ids=["as-filed", "converted"])
def test_no_process_holds_a_whole_copy_of_what_is_divided(
    filed: torch.dtype, write_recipe: RecipeWriter, tmp_path: Path, backbones: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from llavakit import Recipe, Registry, save_model
    from llavakit.model.folder import create_model

    large = tmp_path / "large"
    shutil.copytree(backbones / "language", large)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(large)
    recipe = Recipe.load(write_recipe((f"{backbones}/language", str(large))), Registry.installed())
    made = create_model(recipe.model, Registry.installed(), seed=0)
    made.language.to(filed)  # model.toml says float32, as Vicuna's recipes do of its float16
    save_model(made, tmp_path / "model")
    count = sum(p.numel() for p in made.language.parameters())
    block = 4 * sum(p.numel() for p in made.language.blocks[0].parameters())
    ended = processes.run_ranks(tmp_path, 4, tmp_path / "model", tmp_path, program=read_and_write)
    assert ended.code == 0, ended.said
    for rank in range(4):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for parts in (2, 4):
            share = 4 * count / parts
            assert share / 2 < found[f"read in {parts}"] < share + block, (rank, found, share)
            assert found[f"written from {parts}"] < 4 * block, (rank, found, block)
    for parts in (2, 4):  # and it is the same model that arrives
        written = load_file(tmp_path / f"{parts}.safetensors")
        for name, weight in made.language.named_parameters():
            assert torch.equal(written[name], weight.float()), name
