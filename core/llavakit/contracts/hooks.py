"""The hooks a plugin implements: one for each kind of component.

Each hook returns what the plugin adds: a list of classes, or a mapping of names to the places to
import them from, `{"mine": "package.module:Mine"}`. Import heavy libraries inside the hook, or name
the places: then a recipe pays only for what it uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import pluggy

from llavakit.contracts.component import Component

Components: TypeAlias = Sequence[type[Component]] | Mapping[str, str] | None

PROJECT = "llavakit"  #: pluggy project name, and the entry-point group of plugins

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def llava_vision_encoders() -> Components:
    """Return vision encoders: images in, patch features out."""


@hookspec
def llava_connectors() -> Components:
    """Return connectors: patch features in, language-model embeddings out."""


@hookspec
def llava_language_models() -> Components:
    """Return language models: embeddings in, hidden states and logits out."""


@hookspec
def llava_prompt_templates() -> Components:
    """Return prompt templates: turns in, text with its learned spans out."""


@hookspec
def llava_datasets() -> Components:
    """Return datasets: sequences of samples to train or evaluate on."""


@hookspec
def llava_chat_models() -> Components:
    """Return chat models: messages in, a reply out."""


@hookspec
def llava_generators() -> Components:
    """Return generators: captions and boxes in, conversations out."""


@hookspec
def llava_benchmarks() -> Components:
    """Return benchmarks: questions, and what makes an answer a good one."""


@hookspec
def llava_exporters() -> Components:
    """Return exporters: a model in, a folder in another layout out."""


@hookspec
def llava_trackers() -> Components:
    """Return trackers: observers of a run's events."""


@hookspec
def llava_steps() -> Components:
    """Return steps: the things a recipe does, one after another."""
