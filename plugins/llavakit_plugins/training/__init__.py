"""Training: how a model learns, with the optimisers, schedules and objectives it may learn by."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_optimisers() -> Mapping[str, str]:
    return {
        "adamw": "llavakit_plugins.training.adamw:AdamW",
        "adamw8bit": "llavakit_plugins.training.adamw8bit:AdamW8bit",
        "muon": "llavakit_plugins.training.muon:Muon",
    }


@hookimpl
def llava_objectives() -> Mapping[str, str]:
    return {
        "dpo": "llavakit_plugins.training.objectives:Dpo",
        "next-token": "llavakit_plugins.training.next_token:NextToken",
    }


@hookimpl
def llava_schedules() -> Mapping[str, str]:
    return {
        "constant": "llavakit_plugins.training.schedules:Constant",
        "cosine": "llavakit_plugins.training.schedules:Cosine",
        "linear": "llavakit_plugins.training.schedules:Linear",
        "wsd": "llavakit_plugins.training.schedules:Wsd",
    }


@hookimpl
def llava_callbacks() -> Mapping[str, str]:
    return {"norms": "llavakit_plugins.training.norms:Norms"}
