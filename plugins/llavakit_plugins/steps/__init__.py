"""The built-in steps, by name."""

from __future__ import annotations

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_steps() -> Mapping[str, str]:
    # by name: those that train import torch, and those that make data do without
    return {
        "backbones": "llavakit_plugins.steps.backbones:Backbones",
        "evaluate": "llavakit_plugins.steps.evaluate:Evaluate",
        "export": "llavakit_plugins.steps.export:Export",
        "filter": "llavakit_plugins.steps.filter:Filter",
        "finetune": "llavakit_plugins.steps.train:Finetune",
        "generate": "llavakit_plugins.steps.generate:Generate",
        "prefer": "llavakit_plugins.steps.prefer:Prefer",
        "pretrain": "llavakit_plugins.steps.train:Pretrain",
        "push": "llavakit_plugins.steps.push:Push",
        "scenes": "llavakit_plugins.steps.scenes:Scenes",
    }
