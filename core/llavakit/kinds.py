"""Every kind of component, in the order they are listed."""

from __future__ import annotations

from llavakit.contracts.component import Component
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

KINDS: tuple[type[Component], ...] = (
    VisionEncoder,
    Connector,
    LanguageModel,
    PromptTemplate,
    Dataset,
    ChatModel,
    Generator,
    Benchmark,
    Exporter,
    Tracker,
    Step,
)
