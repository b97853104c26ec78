"""Training on several devices: each sample goes to one of them, gradients are summed over all.

Either every device holds the whole model, or their weights, gradients and optimiser state are
divided among them (FSDP2: PyTorch's fully_shard, arXiv 2304.11277).
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
    """False where a device has run out: it goes along, since the others wait, and adds nothing."""


def own_micros(
    corpus: Corpus, samples: Sequence[int], capacity: int, process_group: ProcessGroup
) -> list[Micro]:
    """Return this device's micro-batches of a step; every device has as many."""
    lengths = [corpus.lengths[sample] for sample in samples]
    shares = [
        corpus.batch([samples[index] for index in share], capacity).samples
        for share in deal(lengths, process_group.size)
    ]
    own = [Micro(micro, counts=True) for micro in shares[process_group.rank]]
    spare = Micro((samples[0],), counts=False)
    return own + [spare] * (max(map(len, shares)) - len(own))


def deal(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Distribute items over `size` hands of like total length, the longest first.

    Returns the indices in each hand. Deterministic: ties keep the order of `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    hands: list[list[int]] = [[] for _ in range(size)]
    totals = [0] * size
    for index in order:
        least = totals.index(min(totals))
        hands[least].append(index)
        totals[least] += lengths[index]
    return [sorted(hand) for hand in hands]


def divides(model: LlavaModel, options: TrainOptions, devices: int) -> bool:
    """Say whether `devices` devices divide the weights among them; each has all of them otherwise.

    Raises TrainingError where the options ask for what cannot be divided.
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
    """Say whether some weights of the language model never learn, beside its adapters."""
    return sum(1 for _ in model.language.trainable()) < sum(1 for _ in model.language.parameters())


def shard(model: LlavaModel, process_group: ProcessGroup, *, half: bool) -> None:
    """Divide connector and language model among the devices; the frozen encoder stays whole.

    With `half` weights travel as bfloat16; gradients are summed in float32 all the same.
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
    for block in model.language.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=False,
        ignored_params=set(model.vision.parameters()),
    )
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # the loss is divided by the targets of all devices already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sum_gradients(parameters: Iterable[nn.Parameter], process_group: ProcessGroup) -> None:
    """Sum the gradients of whole parameters over the devices; FSDP has done so with its own."""
    if process_group.size == 1:
        return
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            if parameter.grad is None:  # nothing here used it, something elsewhere may have
                parameter.grad = torch.zeros_like(parameter)
            process_group.sum(parameter.grad)


def no_images(model: LlavaModel) -> Tensor:
    """Return the features `[0, P, D]` of no image.

    With them even a step without images has gradients, all zero, for the connector: devices that
    sum gradients together must all have some for the same weights.
    """
    vision = model.vision
    dtype = next(model.connector.parameters(), torch.empty(0)).dtype
    return torch.zeros(
        0, vision.tokens(vision.image_size), vision.width, dtype=dtype, device=model.device
    )


def in_one_piece(tensors: Mapping[str, Tensor], process_group: ProcessGroup) -> dict[str, Tensor]:
    """Return tensors in one piece, on the CPU, to the leader; the others get none.

    All devices must call it. One tensor at a time is put together, so that memory suffices.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if process_group.is_main:
            gathered[name] = full.cpu()
    return gathered


def divided_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return `value` on the parameter's device, divided as it is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
