"""Datasets."""

from __future__ import annotations

from llavakit import Dataset, hookimpl


@hookimpl
def llava_datasets() -> list[type[Dataset]]:
    from llavakit_plugins.datasets.conversations import Conversations
    from llavakit_plugins.datasets.mix import Mix
    from llavakit_plugins.datasets.scienceqa import ScienceQA

    return [Conversations, Mix, ScienceQA]
