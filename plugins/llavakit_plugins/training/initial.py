"""Loads the model that a step starts from: a folder in any layout, or a name on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from shutil import rmtree
from typing import Any, Self

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors.torch import load_file
from torch import Tensor

from llavakit import (
    PARTS,
    LlavaModel,
    ModelError,
    Options,
    Run,
    Tiling,
    is_model,
    problems_in,
    save_model,
)
from llavakit.contracts.component import ModelPath
from llavakit.contracts.run import Planner
from llavakit_plugins.huggingface.hub import PretrainedOptions, find_file, missing_source
from llavakit_plugins.huggingface.unread import Unread, being_left, leave_unread
from llavakit_plugins.training.checkpoints import write_whole

_ALONE = ("adapter_config.json", "mm_projector.bin")
"""Files that a checkpoint of the original LLaVA may hold instead of full weights."""
_READ = ("source", "revision", "config", "dtype", "device", "legacy", "quantize")
"""Options that decide how weights are read: if one of them changes, weights are read again."""


class LoadOptions(Options):
    """What some layouts do not store in their folder; see docs/layouts.md."""

    base: ModelPath | None = None
    """The language model that an adapter, a projector or a delta builds on."""
    vision: ModelPath | None = None
    """The vision encoder."""
    template: str | None = None
    """The name of the prompt template."""


class StartOptions(Options):
    """Options of every step that starts from a model."""

    init: ModelPath | None = None
    """A model folder in any layout, or a name on the hub. By default the model of the newest
    earlier step."""
    load: LoadOptions = LoadOptions()
    """What the layout of `init` does not store."""
    changes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Changed options of the parts of `init`: `{ language = { lora = { rank = 128 } } }`."""

    @model_validator(mode="after")
    def _are_about_a_folder(self) -> Self:
        stated = [name for name in ("load", "changes") if name in self.model_fields_set]
        if self.init is None and stated:
            raise ValueError(f"`{stated[0]}` is about the model that `init` names: state `init`")
        if unknown := sorted(self.changes.keys() - {*PARTS}):
            raise ValueError(f"`changes`: a model has no part `{unknown[0]}`, but {_LISTED}")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """Keyword arguments for `llavakit.load` besides the folder."""
        return {name: value for name, value in self.load if value is not None}


_LISTED = ", ".join(PARTS)


def missing_model(options: StartOptions) -> str | None:
    """Return a sentence about a model of the hub that must be downloaded first, or None."""
    for path in (options.init, options.load.base, options.load.vision):
        if path is None or path.exists() or path.as_posix().startswith("@"):
            continue
        source = PretrainedOptions(source=path.as_posix())
        if any(find_file(source, name) for name in _ALONE):
            continue
        if missing_source("the model", source) is not None:
            return (
                f"the weights of the model `{path}` are not on this machine; fetch them with "
                f"`hf download {path}`, or give the folder that holds them"
            )
    return None


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
        return change_parts(model, changes)


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
    with leave_unread() as unread:
        model = start(run, options, device="cpu")
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
    try:
        if group.is_main:
            rmtree(folder, ignore_errors=True)  # an earlier attempt's, that was killed
            whole = run.model(options.init, **options.given, **given)
            if (unread := being_left()) is not None:
                unread.read(whole)
            save_model(whole, folder)
        group.broadcast(None)
        model: LlavaModel = run.model(folder, options=again, **given)
        group.broadcast(None)
    finally:
        if group.is_main:
            rmtree(folder, ignore_errors=True)
    return model


def own_row(model: LlavaModel, tiling: Tiling) -> Tiling:
    """Return a step's tiling. Raises ModelError where it asks for a row that the model lacks."""
    if tiling.separates and model.image_newline is None:
        raise ModelError(
            f"`tiling` of the step: `{tiling.name}` asks for a learned row between lines, and the "
            "model's own tiling has none; choose it under [model.tiling], or set `newline = false`"
        )
    return tiling


def sketch_start(planner: Planner, options: StartOptions) -> None:
    """Tell the planner which model the step starts from."""
    change = partial(change_parts, changes=options.changes)
    planner.start(options.init, change, **options.given)


def change_parts(model: LlavaModel, changes: Mapping[str, Mapping[str, Any]]) -> LlavaModel:
    """Return a model that shares `model`'s networks and has other options.

    `changes` are options by part, such as `{"vision": {"layer": -1}}`. Raises ModelError for
    options that a part does not have, and for a context that has no room for one image.
    """
    parts = {name: getattr(model, name) for name in PARTS}
    choices = dict(model.choices)
    for name, table in changes.items():
        part, choice = parts[name], {**choices[name], **table}
        stated = {key: value for key, value in choice.items() if key != "use"}
        try:
            options = part.Options.model_validate(stated)
        except ValidationError as error:
            problem = next(problems_in(error, part.Options, (name,), f" of `{part.name}`"))
            sentence = "; ".join(filter(None, (problem.message, problem.hint)))
            raise ModelError(f"`changes`: {sentence}") from error
        parts[name] = part.with_options(options)
        choices[name] = choice
    if not changes:
        return model
    changed = LlavaModel(
        **parts, template=model.template, choices=choices,
        tiling=model.tiling, image_newline=model.image_newline,
    )  # fmt: skip
    if (rows := len(changed.views.of().index_RK)) >= changed.language.max_length:
        raise ModelError(
            f"`changes`: one image takes {rows} tokens, but the language model "
            f"reads {changed.language.max_length}; leave it a longer context"
        )
    return changed.train(model.training)
