"""The hooks a plugin implements: one for each kind of component.

    @hookimpl
    def llava_connectors():
        return {"mine": "my_package.connector:Mine"}

Each returns what the plugin adds: a list of classes, or a mapping of names to where they are
imported from. Import heavy libraries inside the hook, or return the mapping: then a recipe pays
only for what it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

import pluggy

PROJECT = "llavakit"  #: pluggy project name, and the entry-point group of plugins

hookimpl = pluggy.HookimplMarker(PROJECT)

KINDS = {
    "VisionEncoder": ("llava_vision_encoders", "images in, patch features out"),
    "Connector": ("llava_connectors", "patch features in, language-model embeddings out"),
    "Tiling": ("llava_tilings", "an image's size in, its views and rows out"),
    "LanguageModel": ("llava_language_models", "embeddings in, hidden states and logits out"),
    "PromptTemplate": ("llava_prompt_templates", "turns in, text with its supervised spans out"),
    "Dataset": ("llava_datasets", "sequences of samples to train or evaluate on"),
    "ChatModel": ("llava_chat_models", "messages in, a reply out"),
    "Generator": ("llava_generators", "captions and boxes in, conversations out"),
    "Benchmark": ("llava_benchmarks", "questions, and what makes an answer a good one"),
    "Exporter": ("llava_exporters", "a model in, a folder in another layout out"),
    "Tracker": ("llava_trackers", "observers of a run's events"),
    "Step": ("llava_steps", "the things a recipe does, one after another"),
}
"""Every kind with its hook, listed in this order; the core's are public names of llavakit."""

OWN = {point.value.rpartition(":")[2]: point for point in entry_points(group=f"{PROJECT}.kinds")}
"""Kinds that plugin packages declare: the entry point has the hook's name, and says the class."""
KINDS |= {kind: (point.name, "of a plugin's") for kind, point in OWN.items() if kind not in KINDS}


def _specify(kind: str, what: str) -> Callable[[], None]:
    def hook() -> None: ...

    hook.__doc__ = f"Return components of the kind {kind}: {what}."
    return pluggy.HookspecMarker(PROJECT)(hook)


# functions of this module, as pluggy reads them
globals().update({name: _specify(kind, what) for kind, (name, what) in KINDS.items()})
