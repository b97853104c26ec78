"""Steps."""

from __future__ import annotations

from llavakit import Step, hookimpl


@hookimpl
def llava_steps() -> list[type[Step]]:
    from llavakit_plugins.steps.backbones import Backbones
    from llavakit_plugins.steps.evaluate import Evaluate
    from llavakit_plugins.steps.export import Export
    from llavakit_plugins.steps.filter import Filter
    from llavakit_plugins.steps.generate import Generate
    from llavakit_plugins.steps.scenes import Scenes
    from llavakit_plugins.steps.train import Finetune, Pretrain

    return [Backbones, Evaluate, Export, Filter, Finetune, Generate, Pretrain, Scenes]
