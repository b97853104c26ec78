"""The hooks a plugin implements: one for each kind of component.

Each hook returns the classes that the plugin adds. Import heavy libraries inside the hook, so
that a recipe pays only for the kinds it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from llavakit.interfaces import (
        Benchmark,
        ChatModel,
        Dataset,
        Exporter,
        Generator,
        PromptTemplate,
        Step,
        Tracker,
    )
    from llavakit.networks import Connector, LanguageModel, VisionEncoder

PROJECT = "llavakit"  #: pluggy project name, and the entry-point group of plugins

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def llava_vision_encoders() -> Sequence[type[VisionEncoder]]:
    """Return vision encoders: images in, patch features out."""
    return ()


@hookspec
def llava_connectors() -> Sequence[type[Connector]]:
    """Return connectors: patch features in, language-model embeddings out."""
    return ()


@hookspec
def llava_language_models() -> Sequence[type[LanguageModel]]:
    """Return language models: embeddings in, hidden states and logits out."""
    return ()


@hookspec
def llava_prompt_templates() -> Sequence[type[PromptTemplate]]:
    """Return prompt templates: turns in, text with its learned spans out."""
    return ()


@hookspec
def llava_datasets() -> Sequence[type[Dataset]]:
    """Return datasets: sequences of samples to train or evaluate on."""
    return ()


@hookspec
def llava_chat_models() -> Sequence[type[ChatModel]]:
    """Return chat models: messages in, a reply out."""
    return ()


@hookspec
def llava_generators() -> Sequence[type[Generator]]:
    """Return generators: captions and boxes in, conversations out."""
    return ()


@hookspec
def llava_benchmarks() -> Sequence[type[Benchmark]]:
    """Return benchmarks: questions, and what makes an answer a good one."""
    return ()


@hookspec
def llava_exporters() -> Sequence[type[Exporter]]:
    """Return exporters: a model in, a folder in another layout out."""
    return ()


@hookspec
def llava_trackers() -> Sequence[type[Tracker]]:
    """Return trackers: observers of a run's events."""
    return ()


@hookspec
def llava_steps() -> Sequence[type[Step]]:
    """Return steps: the things a recipe does, one after another."""
    return ()
