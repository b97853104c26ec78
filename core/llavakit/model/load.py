"""Loads a model of any layout that is installed, recognised by the folder's content."""

from __future__ import annotations

import tomllib
from collections.abc import Container, Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from llavakit.contracts.component import Use
from llavakit.contracts.errors import ModelError
from llavakit.contracts.interfaces import Exporter, PromptTemplate
from llavakit.model.folder import load_model, sketch_model
from llavakit.model.llava import LlavaModel
from llavakit.recipe.files import peek_json
from llavakit.recipe.model_choice import MANIFEST, PARTS, ModelRecipe, is_model
from llavakit.registry import Registry

_DTYPES = ("None", "auto", "float32", "float64", "bfloat16", "float16")


def load(
    path: str | Path,
    *,
    registry: Registry | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    base: str | Path | None = None,
    vision: str | Path | None = None,
    template: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Return the model in a folder, whatever its layout: recognised by its content.

    `path` may also be a name on Hugging Face's hub, such as `llava-hf/llava-1.5-7b-hf`.
    The result is a `Model`: it has `generate`, `generate_ids` and `logits`. `device="auto"` is CUDA
    where there is one, else MPS, else the CPU; `dtype`, such as "bfloat16", is by default that of
    the files. Some layouts leave things out: `base` is the folder of the language model that an
    adapter or a projector belongs to, `vision` that of the vision encoder, `template` the name of
    the prompt template. `options` change those of a model folder's parts, as in
    `{"language": {"quantize": "nf4"}}`. Raises ModelError where the folder holds no model that this
    installation reads, or lacks one of these.
    """
    path, kind = Path(path), str(dtype).removeprefix("torch.")
    if kind not in _DTYPES:
        raise ModelError(f"`dtype` is {dtype!r:.80}; it is one of {', '.join(_DTYPES)}")
    dtype = getattr(torch, kind, None)
    target = pick_device(device)
    registry = registry or Registry.installed()
    path = _find(path, registry, "give the folder a run or an export wrote")
    given: dict[str, Any] = {
        name: _find(Path(folder), registry, "give its folder")
        for name, folder in (("base", base), ("vision", vision))
        if folder is not None
    }
    if template is not None:
        registry.get(PromptTemplate, template)
        given["template"] = template
    if is_model(path):
        _refuse_others(path, "llavakit", given, ("template",))
        model = load_model(
            path, registry, device=target, dtype=dtype, template=template, options=options
        )
        return model.eval()  # a new module is in training mode, with dropout
    layouts = registry.all(Exporter)  # not for a model folder: that takes a while
    for name, exporter in layouts.items():
        if exporter.recognises(path):
            if options:
                raise ModelError(
                    f"{path} is in the layout `{name}`; options of its parts can be changed in a "
                    "model folder, so turn it into one with `llava-run import`"
                )
            _refuse_others(path, name, given, signature(exporter.load).parameters)
            return exporter.load(path, device=target, dtype=dtype, **given)
    files = sorted(path.glob("*.json"))  # a pipe among them is no file that can be read, either
    broken = [file.name for file in files if not (file.is_file() and peek_json(file))]
    raise ModelError(
        f"{path} holds no model that is recognised; known layouts: "
        f"{', '.join(('llavakit (model.toml)', *layouts))}"
        + (f". Its {broken[0]} cannot be read as JSON: copy that again" if broken else "")
        + (f"; did you mean {path / 'model'}?" if is_model(path / "model") else "")
    )


def trainable(model: Any, path: Path) -> LlavaModel:
    """Return a loaded model. Raises ModelError for one that can be run alone, as ONNX's."""
    if not isinstance(model, LlavaModel):
        raise ModelError(
            f"{path} can be run, but its layout keeps no weights that a step could go on from; "
            "give the model folder that it was made of"
        )
    return model


def sketch_any(path: Path, registry: Registry, **given: Any) -> LlavaModel | None:
    """Return the model at `path` on the meta device, from its headers: every shape, no weight.

    `given` is what `load` takes. None for what is not on this machine and not known either.
    """
    if not path.exists():
        layouts = registry.all(Exporter).values()
        return next(filter(None, (layout.sketch(path.as_posix()) for layout in layouts)), None)
    if is_model(path):
        with suppress(OSError, ValueError, KeyError):  # `load` says what is wrong
            return sketch_model(_described(path), registry)
    try:
        model = load(path, registry=registry, device=torch.device("meta"), **given)
    except ModelError:  # the same again, or it can be run alone, and not on such a device
        model = load(path, registry=registry, device="cpu", **given)
    return trainable(model, path)


def _described(folder: Path) -> ModelRecipe:
    """Return the parts of a model folder; those made of other files, of the folder's own."""
    manifest = tomllib.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    parts = {name: manifest[name] for name in ModelRecipe.model_fields if name in manifest}
    recipe = ModelRecipe.model_validate(parts)
    for name in PARTS:
        use: Use[Any] = getattr(recipe, name)
        if (folder / name / "config.json").is_file() and "source" in use.options:
            parts[name] = {**parts[name], "source": str(folder / name)}
            parts[name].pop("revision", None)  # of the hub, not of a folder
    return ModelRecipe.model_validate(parts)


def _find(path: Path, registry: Registry, remedy: str) -> Path:
    """Return a folder: `path`, or what is fetched of that name."""
    if path.exists():
        return path
    for exporter in registry.all(Exporter).values():
        if (folder := exporter.fetch(path.as_posix())) is not None:
            return folder
    raise ModelError(f"model {path} does not exist; {remedy}")


def _refuse_others(
    path: Path, layout: str, given: Mapping[str, object], taken: Container[str]
) -> None:
    """Raise ModelError for what was given and the layout has no use for."""
    for name in given:
        if name not in taken:
            raise ModelError(
                f"{path} is in the layout `{layout}`, which needs no `{name}`; leave it out"
            )


def pick_device(name: str | torch.device) -> torch.device:
    """Return a device; `auto` is CUDA where there is one, else Apple's MPS, else the CPU."""
    if isinstance(name, torch.device):
        return name
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(
            f"device `{name}` is none of torch's; use auto, cpu, cuda or mps"
        ) from error
    try:
        torch.zeros(1, device=device).sum().item()  # a name may be known, and its driver absent
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device `{name}` is not available on this machine; use cpu or auto"
        ) from error
    return device
