"""LLaVA as a small core and a set of plugins. Names are loaded when they are first used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llavakit.contracts.component import Component, InputPath, Options, Use
    from llavakit.contracts.data import ImageContext, Message, Question, Reply, Sample, Score, Turn
    from llavakit.contracts.errors import (
        ChatError,
        DataError,
        LlavaError,
        ModelError,
        PluginError,
        RecipeError,
        ReplyError,
        TrainingError,
    )
    from llavakit.contracts.hooks import hookimpl
    from llavakit.contracts.interfaces import (
        Benchmark,
        Build,
        ChatModel,
        Dataset,
        Exporter,
        Generator,
        Outcome,
        PromptTemplate,
        Run,
        Segment,
        Step,
        Stopped,
        Tracker,
    )
    from llavakit.contracts.networks import Connector, LanguageModel, VisionEncoder
    from llavakit.model.llava import LlavaModel
    from llavakit.recipe.recipe import Recipe
    from llavakit.registry import Registry

_HOMES = {
    "contracts.component": ("Component", "InputPath", "Options", "Use"),
    "contracts.errors": (
        "ChatError",
        "DataError",
        "LlavaError",
        "ModelError",
        "PluginError",
        "RecipeError",
        "ReplyError",
        "TrainingError",
    ),
    "contracts.hooks": ("hookimpl",),
    "contracts.interfaces": (
        "Benchmark",
        "Build",
        "ChatModel",
        "Dataset",
        "Exporter",
        "Generator",
        "Outcome",
        "PromptTemplate",
        "Run",
        "Segment",
        "Step",
        "Stopped",
        "Tracker",
    ),
    "model.llava": ("LlavaModel",),
    "contracts.networks": ("Connector", "LanguageModel", "VisionEncoder"),
    "recipe.recipe": ("Recipe",),
    "registry": ("Registry",),
    "contracts.data": ("ImageContext", "Message", "Question", "Reply", "Sample", "Score", "Turn"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    vision: str | Path | None = None,
    template: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Return the model in a folder, whatever its layout: recognised by its content.

    `path` may also be a name on Hugging Face's hub, such as `llava-hf/llava-1.5-7b-hf`.
    The result has `generate`, `generate_ids` and `logits`. `device="auto"` is CUDA where there is
    one, else the CPU. Some layouts leave things out: `base` is the folder of the language model
    that an adapter or a projector belongs to, `vision` that of the vision encoder, `template` the
    name of the prompt template. `options` change those of a model folder's parts, as in
    `{"language": {"quantize": "nf4"}}`. Raises ModelError where the folder holds no model that
    this installation reads, or lacks one of these.
    """
    from llavakit.model.load import load_any

    return load_any(
        Path(path),
        device=device,
        dtype=dtype,
        base=None if base is None else Path(base),
        vision=None if vision is None else Path(vision),
        template=template,
        options=options,
    )


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"llavakit.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'llavakit' has no attribute {name!r}")


__all__ = [
    "Benchmark",
    "Build",
    "ChatError",
    "ChatModel",
    "Component",
    "Connector",
    "DataError",
    "Dataset",
    "Exporter",
    "Generator",
    "ImageContext",
    "InputPath",
    "LanguageModel",
    "LlavaError",
    "LlavaModel",
    "Message",
    "ModelError",
    "Options",
    "Outcome",
    "PluginError",
    "PromptTemplate",
    "Question",
    "Recipe",
    "RecipeError",
    "Registry",
    "Reply",
    "ReplyError",
    "Run",
    "Sample",
    "Score",
    "Segment",
    "Step",
    "Stopped",
    "Tracker",
    "TrainingError",
    "Turn",
    "Use",
    "VisionEncoder",
    "hookimpl",
    "load",
]
