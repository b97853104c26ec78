"""Steps."""

from __future__ import annotations

from llavakit import Step, hookimpl


@hookimpl
def llava_steps() -> list[type[Step]]:
    from llavakit_plugins.steps.evaluate import Evaluate
    from llavakit_plugins.steps.export import Export
    from llavakit_plugins.steps.train import Finetune, Pretrain

    return [Evaluate, Export, Finetune, Pretrain]
