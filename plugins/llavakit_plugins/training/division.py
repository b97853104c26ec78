"""Into how many parts a step divides a model's weights. Without torch, as plans need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavakit import TrainingError
from llavakit_plugins.training.options import TrainOptions

if TYPE_CHECKING:
    from llavakit import LlavaModel


def parts_of_weights(model: LlavaModel, options: TrainOptions, devices: int) -> int:
    """Return into how many parts the weights are divided; 1 where each device holds all of them.

    Raises TrainingError if the recipe asks for what this model or number of devices does not allow.
    """
    parallel = options.parallel
    if devices == 1:
        return 1
    if parallel is not None:
        parts = devices // parallel.replicate if parallel.shard == "all" else parallel.shard
        if parts * parallel.replicate != devices:
            shown = "all" if parallel.shard == "all" else parts
            raise TrainingError(
                f"`parallel = {{ replicate = {parallel.replicate}, shard = {shown} }}` does not "
                f"make up {devices} devices; replicate times shard is their number"
            )
    else:
        asked = options.shard or (options.shard is None and options.train.keys() - {"connector"})
        parts = devices if asked else 1
    if parts == 1 or not _in_four_bits(model):
        return parts
    if parallel is not None or options.shard:
        # bitsandbytes keeps the scales beside the tensor, and FSDP2 would divide the tensor alone
        raise TrainingError(
            "weights of 4 bits cannot be divided among devices; set shard = false, or take "
            "`quantize` out"
        )
    return 1


def _in_four_bits(model: LlavaModel) -> bool:
    planned = model.choices["language"].get("quantize") is not None
    return planned or not all(p.is_floating_point() for p in model.language.parameters())
