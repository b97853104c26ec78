"""Builds a model from a recipe, and reads and writes model folders.

model.toml              the parts: component, options, widths; the hash of every file
connector.safetensors   the connector
tiling.safetensors      `image_newline`, where the tiling separates rows
vision/  language/      what the part's `save` wrote; a Hugging Face folder for the built-in ones
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llavakit.contracts.component import Options, Use
from llavakit.contracts.errors import ModelError, RecipeError
from llavakit.contracts.interfaces import PromptTemplate
from llavakit.contracts.networks import Connector, LanguageModel, VisionEncoder
from llavakit.model.llava import LlavaModel
from llavakit.recipe.check import problems_in
from llavakit.recipe.files import differs, digest, listed_file, new_folder, without_none
from llavakit.recipe.model_choice import MANIFEST, PARTS, ModelRecipe
from llavakit.registry import Registry
from llavakit.stream.tiling import Tiling

_FORMAT = 1
_TILING = "tiling.safetensors"


def create_model(
    recipe: ModelRecipe,
    registry: Registry,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    vision: VisionEncoder | None = None,
    language: LanguageModel | None = None,
) -> LlavaModel:
    """Return the recipe's model: pretrained parts where it names some, the rest new.

    New weights depend on `seed` and the part alone. Parts that are given are taken as they are.
    """
    given = {"vision": vision, "language": language}
    seeds = {"vision": seed, "language": seed + 1, "connector": seed + 2}  # none hangs on another

    def make(name: str, use: Use[Any], **context: Any) -> Any:
        torch.manual_seed(seeds[name])
        part = given.get(name)
        return registry.build(use, **context) if part is None else part

    target = torch.device(device)
    with torch.random.fork_rng([target] if target.type == "cuda" else []):  # none of other devices
        return _made_of(recipe, registry, make).to(target)


def sketch_model(recipe: ModelRecipe, registry: Registry) -> LlavaModel:
    """Return the model on the meta device: every shape, no weight, nothing read or fetched."""
    shapes = partial(registry.build, shapes=True)
    with torch.device("meta"):
        return _made_of(recipe, registry, lambda _, use, **widths: shapes(use, **widths))


def _made_of(recipe: ModelRecipe, registry: Registry, make: Callable[..., Any]) -> LlavaModel:
    """Return the model of parts that are made one by one: `make(name, use, **widths)`."""
    vision, language = make("vision", recipe.vision), make("language", recipe.language)
    widths = {"vision_width": vision.width, "language_width": language.width}
    widths["patches"] = vision.tokens(vision.image_size)
    connector = make("connector", recipe.connector, **widths)
    return join_model(recipe, registry, vision, connector, language)


def join_model(
    recipe: ModelRecipe,
    registry: Registry,
    vision: VisionEncoder,
    connector: Connector,
    language: LanguageModel,
) -> LlavaModel:
    """Return the model of these parts; the recipe describes them, and names template and tiling.

    Raises ModelError where one image alone is longer than what the language model reads.
    """
    template = recipe.template or Use[PromptTemplate](use=language.default_template)
    tiling = recipe.tiling or Use[Tiling](use=vision.default_tiling)
    whole = recipe.model_copy(update={"template": template, "tiling": tiling})
    built: dict[str, Any] = {"template": registry.build(template), "tiling": registry.build(tiling)}
    choices = {name: _described(use, registry) for name, use in whole}
    # of one view a folder is what it was before there were tilings
    if tiling.use == "single" and not built["tiling"].varies:
        del choices["tiling"]
    model = LlavaModel(vision, connector, language, choices=choices, **built)
    if (rows := len(model.views.of().index_RK)) >= language.max_length:
        raise ModelError(
            f"one image takes {rows} tokens, but `{language.name}` reads at most "
            f"{language.max_length}; use smaller images, a connector that shortens, or a longer "
            "context"
        )
    return model


def _described(use: Use[Any], registry: Registry, *, inner: bool = False) -> dict[str, Any]:
    """Return a choice as a model folder states it; those within it as they are alone."""
    options = registry.options(use)
    if inner:
        options = options.alone()
        use = type(use)(use=use.use, **options.model_dump(exclude_unset=True))
    table = use.model_dump(mode="json")
    for name, value in options:
        if isinstance(value, Use):
            table[name] = _described(value, registry, inner=True)
        elif isinstance(value, tuple) and value and isinstance(value[0], Use):
            table[name] = [_described(item, registry, inner=True) for item in value]
    return table


def save_model(model: LlavaModel, folder: str | Path) -> None:
    """Write a model folder, whole or not at all."""
    with new_folder(Path(folder)) as partial:
        for name in PARTS:
            inner = _part_folder(partial, name)
            inner.mkdir(exist_ok=True)
            getattr(model, name).save(inner)
        if (newline_E := model.image_newline) is not None:
            save_file({"image_newline": newline_E.detach().contiguous()}, partial / _TILING)
        written = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        files = {file.relative_to(partial).as_posix(): digest(file) for file in written}
        manifest = {
            "format": _FORMAT,
            "widths": {"vision": model.vision.width, "language": model.language.width},
            **{name: without_none(choice) for name, choice in model.choices.items()},
            "sha256": files,
        }
        (partial / MANIFEST).write_text(tomli_w.dumps(manifest), encoding="utf-8")


def _part_folder(folder: Path, part: str) -> Path:
    return folder if part == "connector" else folder / part


def load_model(
    folder: Path,
    registry: Registry,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    template: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> LlavaModel:
    """Return the model in a model folder; `template` names another prompt template than its own.

    `options` change those of its parts, as in `{"language": {"quantize": "nf4"}}`. Raises
    ModelError where a file is missing or changed, or the parts do not fit.
    """
    path = folder / MANIFEST
    try:
        manifest = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelError(
            f"{folder} is no model folder: cannot read {MANIFEST} ({error.strerror}); give the "
            "folder that a run, an import or an export wrote"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid TOML: {error}; export the model again") from error
    if manifest.get("format") != _FORMAT:
        raise ModelError(
            f"{path} has format {manifest.get('format')}, this llavakit reads {_FORMAT}; "
            "install the llavakit that wrote it"
        )
    if not isinstance(manifest.get("sha256"), dict):
        raise ModelError(f"{path} lists no files under [sha256]; copy the whole folder again")
    for name, known in manifest["sha256"].items():
        file = listed_file(folder, name)
        if not file.is_file():
            raise ModelError(f"{folder} lacks {name}; copy the whole folder again")
        # safetensors notices by itself where a large file is cut short
        if differs(file, known):
            raise ModelError(f"{file} differs from what {MANIFEST} says; copy the folder again")

    def read(name: str, use: Use[Any], **widths: int) -> Any:
        return _load_part(use, registry, _part_folder(folder, name), dtype, **widths)

    try:
        parts = {name: manifest[name] for name in ModelRecipe.model_fields if name in manifest}
        recipe = ModelRecipe.model_validate(parts)
        if template is not None:
            recipe = recipe.model_copy(update={"template": Use[PromptTemplate](use=template)})
        for part, changes in (options or {}).items():
            recipe = _change(recipe, part, changes, registry)
        model = _made_of(recipe, registry, read)
        if model.image_newline is not None:
            model.image_newline = nn.Parameter(load_file(folder / _TILING)["image_newline"])
    except RecipeError as error:  # of a package that is not installed here
        raise ModelError(f"{path}: {error}; install the package that has it") from error
    except (KeyError, ValidationError, RuntimeError, OSError, SafetensorError) as error:
        raise ModelError(f"{path} does not describe the weights beside it: {error}") from error
    model.to(device)
    if dtype is not None:
        cast_weights(model, dtype)
    return model


def _change(
    recipe: ModelRecipe, part: str, changes: Mapping[str, Any], registry: Registry
) -> ModelRecipe:
    """Return the recipe with other options for a part. Raises ModelError where it has none such."""
    if part not in PARTS:
        raise ModelError(f"a model has no part `{part}`; there are: {', '.join(PARTS)}")
    use: Use[Any] = getattr(recipe, part)
    changed = type(use).model_validate({"use": use.use, **use.options, **changes})
    try:
        registry.options(changed)
    except ValidationError as error:
        known = registry.chosen(use).Options
        problem = next(problems_in(error, known, (part,), f" of `{use.use}`"))
        raise ModelError("; ".join(filter(None, (problem.message, problem.hint)))) from error
    return recipe.model_copy(update={part: changed})


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Turn the weights to `dtype`, and leave the buffers: rotary frequencies need float32.

    Weights of 4 bits stay as they are.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _load_part(
    use: Use[Any], registry: Registry, folder: Path, dtype: torch.dtype | None, **context: Any
) -> Any:
    """Return a part in `dtype`, read so at once where it has an option for it."""
    component: Any = registry.chosen(use)
    options: Options = registry.options(use)
    if dtype is not None and "dtype" in component.Options.model_fields:
        options = options.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    return registry.make(component, options, folder=folder, **context)
