"""Which model a step starts from: its options, and what a plan makes of them. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError, model_validator

from llavakit import PARTS, ModelError, Options, Registry, Tiling, Use, problems_in
from llavakit.contracts.component import ModelPath
from llavakit.contracts.run import Planner
from llavakit_plugins.huggingface.hub import PretrainedOptions, find_file, missing_source

if TYPE_CHECKING:
    from llavakit import LlavaModel

_ALONE = ("adapter_config.json", "mm_projector.bin")
"""Files that a checkpoint of the original LLaVA may hold instead of full weights."""


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
    """Changed options of the parts of `init`, `{ language = { lora = { rank = 128 } } }`, and of
    its tiling, `{ tiling = { use = "anyres" } }`."""

    @model_validator(mode="after")
    def _are_about_a_folder(self) -> Self:
        stated = [name for name in ("load", "changes") if name in self.model_fields_set]
        if self.init is None and stated:
            raise ValueError(f"`{stated[0]}` is about the model that `init` names: state `init`")
        if unknown := sorted(self.changes.keys() - {*_CHANGED}):
            raise ValueError(f"`changes`: a model has no part `{unknown[0]}`, but {_LISTED}")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """Keyword arguments for `llavakit.load` besides the folder."""
        return {name: value for name, value in self.load if value is not None}


_CHANGED = (*PARTS, "tiling")
_LISTED = ", ".join(_CHANGED)


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

    `changes` are options by part, such as `{"vision": {"layer": -1}}`, or of its tiling. Raises
    ModelError for options that a part does not have, and for a context that has no room for one
    image.
    """
    parts = {name: getattr(model, name) for name in PARTS}
    choices = dict(model.choices)
    tiling, newline_E = model.tiling, model.image_newline
    for name, table in changes.items():
        if name == "tiling":
            tiling, choices[name] = _other_tiling(choices.get(name), table)
            newline_E = newline_E if tiling.separates else None
            if not tiling.varies:
                del choices[name]
            continue
        part, choice = parts[name], {**choices[name], **table}
        parts[name] = part.with_options(_options(part, choice, name))
        choices[name] = choice
    if not changes:
        return model
    changed = type(model)(  # a model, or a plan's outline of one
        **parts, template=model.template, choices=choices, tiling=tiling, image_newline=newline_E
    )
    if (rows := len(changed.views.of().index_RK)) >= changed.language.max_length:
        raise ModelError(
            f"`changes`: one image takes {rows} tokens, but the language model "
            f"reads {changed.language.max_length}; leave it a longer context"
        )
    return changed.train(model.training)


def _other_tiling(
    before: Mapping[str, Any] | None, table: Mapping[str, Any]
) -> tuple[Tiling, dict[str, Any]]:
    """Return a tiling with changed options, and the choice that makes it again."""
    usual = before or {"use": "single"}
    name = table.get("use", usual["use"])
    if not isinstance(name, str):
        raise ModelError(f"`changes`: `use` of `tiling` is a name, got {name!r:.40}")
    choice = {**usual, **table} if name == usual["use"] else dict(table)
    use, registry = Use[Tiling].model_validate(choice), Registry.installed()
    _options(registry.chosen(use), choice, "tiling")
    return registry.build(use), choice


def _options(component: Any, choice: Mapping[str, Any], name: str) -> Any:
    """Return a component's options. Raises ModelError for those that it does not have."""
    stated = {key: value for key, value in choice.items() if key != "use"}
    try:
        return component.Options.model_validate(stated)
    except ValidationError as error:
        problem = next(problems_in(error, component.Options, (name,), f" of `{component.name}`"))
        sentence = "; ".join(filter(None, (problem.message, problem.hint)))
        raise ModelError(f"`changes`: {sentence}") from error
