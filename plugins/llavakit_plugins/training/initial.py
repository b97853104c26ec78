"""Loads the model that a step starts from: a folder in any layout, or a name on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from shutil import rmtree
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llavakit import LlavaModel, Run, is_model, save_model
from llavakit.contracts.run import ProcessGroup
from llavakit_plugins.huggingface.unread import Unread, being_left, leave_unread
from llavakit_plugins.training.agreement import in_each, in_main
from llavakit_plugins.training.checkpoints import write_whole
from llavakit_plugins.training.starting import StartOptions, change_parts

_READ = ("source", "revision", "config", "dtype", "device", "legacy", "quantize")
"""Options that decide how weights are read: if one of them changes, weights are read again."""


def start(run: Run, options: StartOptions, **given: Any) -> LlavaModel:
    """Return the model that a step starts from; `given` goes to `llavakit.load`, as `device="cpu"`.

    Raises ModelError if it cannot be read, or if `changes` do not fit its parts.
    """
    if options.init is None:
        model: LlavaModel = run.model(**given)
        return model
    again = {part: _among(table, read=True) for part, table in options.changes.items()}
    again = {part: table for part, table in again.items() if table}
    if not again:
        model = run.model(options.init, **options.given, **given)
    elif is_model(options.init):
        model = run.model(options.init, **options.given, options=again, **given)
    else:
        model = _read_again(run, options, again, **given)
    changes = {part: _among(table, read=False) for part, table in options.changes.items()}
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        # new adapters are random: seeded as for a new language model, and without an effect on
        # the numbers that are drawn later
        torch.manual_seed(run.seed + 1)
        return change_parts(model, changes).to(model.device)  # a tiling's row may be new


def start_unread(run: Run, options: StartOptions) -> tuple[LlavaModel, Unread]:
    """Return the model that a step starts from, and its weights that are not read yet.

    One process reads all at once. Of several, each will keep its share alone, or a whole copy.
    """
    if run.process_group.size == 1:
        return start(run, options), Unread()
    with leave_unread() as unread:
        return start(run, options, device="cpu"), unread


def start_with(run: Run, options: StartOptions, weights: Mapping[str, Tensor]) -> LlavaModel | None:
    """Return the model that a step started from with trained `weights`, in the main process.

    All processes must call it. The weights, which may be divided, pass through a mapped file, and
    so do others whose dtype is not that of their file: neither a device nor the memory has to hold
    all of them.
    """
    file, is_main = run.directory / "trained.safetensors", run.process_group.is_main
    write_whole(weights, file if is_main else None)
    if not is_main:
        return None
    alone = replace(run, process_group=ProcessGroup())
    with leave_unread() as unread:
        model = start(alone, options, device="cpu")
    for name, value in load_file(file).items():
        model.get_parameter(name).data = value
    file.unlink()  # what is mapped stays
    unread.read_mapped(model, file)
    return model.requires_grad_(False).eval()


def _among(table: Mapping[str, Any], *, read: bool) -> dict[str, Any]:
    """Return the options that decide how weights are read, or all others."""
    return {name: value for name, value in table.items() if (name in _READ) == read}


def _read_again(
    run: Run, options: StartOptions, again: Mapping[str, Mapping[str, Any]], **given: Any
) -> LlavaModel:
    """Return the model of a foreign layout, its parts read with other options.

    Only a model folder can be read so: the model is made one for the moment.
    """
    folder, group = run.directory / "init", run.process_group

    def make() -> None:
        rmtree(folder, ignore_errors=True)  # an earlier attempt's, that was killed
        whole = run.model(options.init, **options.given, **given)
        if (unread := being_left()) is not None:
            unread.read(whole)
        save_model(whole, folder)

    try:
        in_main(group, make)
        model: LlavaModel = in_each(group, lambda: run.model(folder, options=again, **given))
    finally:
        if group.is_main:
            rmtree(folder, ignore_errors=True)
    return model
