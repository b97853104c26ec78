"""The hooks a plugin implements: one for each kind of component.

Each hook returns what the plugin adds: a list of classes, or a mapping of names to the places to
import them from, `{"mine": "package.module:Mine"}`. Import heavy libraries inside the hook, or name
the places: then a recipe pays only for what it uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import pluggy

from llavakit.contracts.component import Component

if TYPE_CHECKING:
    from llavakit.contracts.interfaces import (
        Benchmark,
        ChatModel,
        Dataset,
        Exporter,
        Generator,
        PromptTemplate,
        Step,
        Tracker,
    )
    from llavakit.contracts.networks import Connector, LanguageModel, VisionEncoder

KindT = TypeVar("KindT", bound=Component)
Components: TypeAlias = Sequence[type[KindT]] | Mapping[str, str]

PROJECT = "llavakit"  #: pluggy project name, and the entry-point group of plugins

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def llava_vision_encoders() -> Components[VisionEncoder]:
    """Return vision encoders: images in, patch features out."""
    return ()


@hookspec
def llava_connectors() -> Components[Connector]:
    """Return connectors: patch features in, language-model embeddings out."""
    return ()


@hookspec
def llava_language_models() -> Components[LanguageModel]:
    """Return language models: embeddings in, hidden states and logits out."""
    return ()


@hookspec
def llava_prompt_templates() -> Components[PromptTemplate]:
    """Return prompt templates: turns in, text with its learned spans out."""
    return ()


@hookspec
def llava_datasets() -> Components[Dataset]:
    """Return datasets: sequences of samples to train or evaluate on."""
    return ()


@hookspec
def llava_chat_models() -> Components[ChatModel]:
    """Return chat models: messages in, a reply out."""
    return ()


@hookspec
def llava_generators() -> Components[Generator]:
    """Return generators: captions and boxes in, conversations out."""
    return ()


@hookspec
def llava_benchmarks() -> Components[Benchmark]:
    """Return benchmarks: questions, and what makes an answer a good one."""
    return ()


@hookspec
def llava_exporters() -> Components[Exporter]:
    """Return exporters: a model in, a folder in another layout out."""
    return ()


@hookspec
def llava_trackers() -> Components[Tracker]:
    """Return trackers: observers of a run's events."""
    return ()


@hookspec
def llava_steps() -> Components[Step]:
    """Return steps: the things a recipe does, one after another."""
    return ()
