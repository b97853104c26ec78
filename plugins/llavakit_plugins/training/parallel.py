"""Training on several devices: each sample goes to one device, and gradients are summed over all.

Either every device holds the whole model, or weights, gradients and optimiser state are sharded
over the devices (FSDP2: PyTorch's `fully_shard`; arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llavakit import LlavaModel, TrainingError
from llavakit.contracts.run import ProcessGroup
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.options import TrainOptions


class Micro(NamedTuple):
    """One micro-batch of one device."""

    samples: tuple[int, ...]
    counts: bool
    """False for a filler micro-batch of a device that has no samples left in this step. It must
    still run, because collective operations wait for every device, but its loss counts 0."""


def own_micros(
    corpus: Corpus, samples: Sequence[int], capacity: int, process_group: ProcessGroup
) -> list[Micro]:
    """Return this device's micro-batches of a step; the number is the same on every device."""
    lengths = [corpus.lengths[sample] for sample in samples]
    shares = [
        corpus.batch([samples[index] for index in share], capacity).samples
        for share in deal(lengths, process_group.size)
    ]
    own = [Micro(micro, counts=True) for micro in shares[process_group.rank]]
    spare = Micro((samples[0],), counts=False)
    return own + [spare] * (max(map(len, shares)) - len(own))


def deal(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Distribute items over `size` groups of nearly equal total length.

    Greedy: the longest item first, each into the shortest group. Returns the indices of each group
    in ascending order. Deterministic, so every device computes the same groups without a message;
    items of equal length keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = [[] for _ in range(size)]
    totals = [0] * size
    for index in order:
        least = totals.index(min(totals))
        groups[least].append(index)
        totals[least] += lengths[index]
    return [sorted(group) for group in groups]


def divides(model: LlavaModel, options: TrainOptions, devices: int) -> bool:
    """Return whether the weights are sharded over the devices; otherwise each device has all.

    Raises TrainingError if `shard = true` is set for a model that cannot be sharded.
    """
    if devices == 1 or options.shard is False:
        return False
    refusal = None
    if _learns_in_part(model):
        refusal = "a language model with adapters is not divided among devices"
    elif "vision" in options.train:
        refusal = "an encoder that learns cannot be divided among devices"
    if refusal is None:
        return options.shard or "language" in options.train
    if options.shard:
        raise TrainingError(f"{refusal}; set shard = false")
    return False


def _learns_in_part(model: LlavaModel) -> bool:
    """Return whether only some weights of the language model can be trained (its adapters)."""
    return sum(1 for _ in model.language.trainable()) < sum(1 for _ in model.language.parameters())


def shard(model: LlavaModel, process_group: ProcessGroup, *, half: bool) -> None:
    """Shard connector and language model over the devices; the frozen encoder stays whole.

    With `half`, weights are gathered as bfloat16. Gradients are always summed in float32: in
    bfloat16 a sum over many devices loses small terms.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(model.device.type, (process_group.size,))  # all devices in one row
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # rotary angles need float32
    )
    # each block is a unit of its own: one block's weights are gathered while another computes
    for block in model.language.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=False,  # the outermost unit is needed again at once, in the backward
        ignored_params=set(model.vision.parameters()),
    )
    # training calls `loss`, not `forward`: FSDP's hooks have to gather weights there, too
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the supervised rows of all devices, so gradients must
            # be summed; FSDP's default is the average.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sum_gradients(parameters: Iterable[nn.Parameter], process_group: ProcessGroup) -> None:
    """Sum the gradients of unsharded parameters over the devices; FSDP sums those of its own."""
    if process_group.size == 1:
        return
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            if parameter.grad is None:  # unused on this device, but all devices must join the sum
                parameter.grad = torch.zeros_like(parameter)
            process_group.sum(parameter.grad)


def no_images(model: LlavaModel) -> Tensor:
    """Return empty features `[0, P, D]` for a micro-batch without images.

    With them the connector gets gradients, all zero. Devices sum gradients together, so each device
    must have gradients for the same weights, also if its micro-batch has no image.
    """
    vision = model.vision
    dtype = next(model.connector.parameters(), torch.empty(0)).dtype
    return torch.zeros(
        0, vision.tokens(vision.image_size), vision.width, dtype=dtype, device=model.device
    )


def in_one_piece(tensors: Mapping[str, Tensor], process_group: ProcessGroup) -> dict[str, Tensor]:
    """Return whole tensors, on the CPU, in the main process; the other processes get none.

    All processes must call it. Tensors are gathered one by one, so that only one whole tensor at a
    time takes memory on the device.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if process_group.is_main:
            gathered[name] = full.cpu()
    return gathered


def divided_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return `value` on the parameter's device, sharded as the parameter is.

    Every process has read the same value, so nothing is sent: each keeps its own shard.
    """
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
