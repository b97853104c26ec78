"""Training on several devices: each sample goes to one device, and gradients are summed over all.

Either every device holds the whole model, or weights, gradients and optimiser state are sharded
over the devices (FSDP2: PyTorch's `fully_shard`; arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llavakit import LlavaModel
from llavakit.contracts.run import ProcessGroup
from llavakit_plugins.huggingface.unread import Unread, read_shares
from llavakit_plugins.training.corpus import Corpus


class Micro(NamedTuple):
    """One micro-batch of one device."""

    samples: tuple[int, ...]
    counts: bool
    """False for a filler micro-batch of a device that has no samples left in this step. It must
    still run, because collective operations wait for every device, but its loss counts 0."""


def own_micros(
    corpus: Corpus, samples: Sequence[int], capacity: int, rank: int, size: int
) -> list[Micro]:
    """Return one device's micro-batches of a step; the number is the same on every device."""
    groups = corpus.groups(samples)
    lengths = [sum(corpus.lengths_of(group)) for group in groups]
    shares = [
        corpus.batch([sample for index in share for sample in groups[index]], capacity).samples
        for share in deal(lengths, size)
    ]
    own = [Micro(micro, counts=True) for micro in shares[rank]]
    spare = Micro(groups[0], counts=False)
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


def shard(
    model: LlavaModel,
    process_group: ProcessGroup,
    device: torch.device,
    parts: int,
    *,
    half: bool,
    encoder: bool,
    unread: Unread | None = None,
) -> None:
    """Divide weights into `parts`, each held by as many devices as there are groups of `parts`.

    Weights that are `unread` are divided on the meta device, and each process then reads its share
    of them from their files. Others may lie in mapped files: each unit goes to the `device`, and
    its share stays there.

    With `half`, weights are gathered as bfloat16. Gradients are always summed in float32: in
    bfloat16 a sum over many devices loses small terms. A frozen encoder stays whole; `encoder`
    says that it learns.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    copies = process_group.size // parts
    names = ("dp_replicate", "dp_shard")
    both = init_device_mesh(device.type, (copies, parts), mesh_dim_names=names)
    mesh = both if copies > 1 else both["dp_shard"]
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # rotary angles need float32
    )
    sources: dict[str, Tensor] = {}
    if unread is not None:
        if not encoder:
            unread.read(model.vision, device)
        sources = unread.to_meta(model)
    if not encoder:
        model.vision.to(device)
    else:  # computes in float32 on one device, too: it runs outside of autocast
        fully_shard(model.vision, mesh=mesh, mp_policy=whole)
    # each block is a unit of its own: one block's weights are gathered while another computes
    for block in model.language.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=False,  # the outermost unit is needed again at once, in the backward
        ignored_params=None if encoder else set(model.vision.parameters()),
    )
    read_shares(model, sources, device)
    # training calls `loss`, not `forward`: FSDP's hooks have to gather weights there, too
    register_fsdp_forward_method(model, "loss")
    setattr(model, _BEGIN, lambda: None)
    register_fsdp_forward_method(model, _BEGIN)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the supervised rows of all devices, so gradients must
            # be summed; FSDP's default is the average.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


_BEGIN = "begin_sharded"


def begin_sharded(model: LlavaModel) -> None:
    """Make the model FSDP's outermost unit, once it is known which parameters learn.

    FSDP takes for that the unit that runs first, and an encoder that learns runs before `loss`.
    """
    from torch.distributed.fsdp import FSDPModule

    getattr(model, _BEGIN)()
    assert isinstance(model, FSDPModule)
    model.reshard()


@contextmanager
def answering(model: LlavaModel, process_group: ProcessGroup) -> Iterator[None]:
    """Let divided weights answer: every process must ask the same questions.

    All continue with the main process's logits. So they choose the same tokens and end at the same
    one, although another device may round otherwise, and none waits for weights that nobody sends.
    """
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(model, FSDPModule)
    language = model.language
    own = language.logits

    def agreed(hidden_ME: Tensor) -> Tensor:
        logits_MV = own(hidden_ME)
        return process_group.sum(logits_MV if process_group.is_main else logits_MV.zero_())

    model.unshard()  # the outermost unit's: nothing calls `loss`
    language.logits = agreed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del language.logits
        model.reshard()


def sum_gradients(parameters: Iterable[nn.Parameter], process_group: ProcessGroup) -> None:
    """Sum the gradients of unsharded parameters over the devices; FSDP sums those of its own."""
    if process_group.size == 1:
        return
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            if parameter.grad is None:  # unused on this device, but all devices must join the sum
                parameter.grad = torch.zeros_like(parameter)
            process_group.sum(parameter.grad)


def drop_zeros(model: LlavaModel, images: bool) -> None:
    """Drop the gradients of connector and encoder after a step without `images`, on any device.

    They are zero. One device has none in such a step, and leaves these weights' moments alone.
    """
    if not images:
        for part in (model.vision, model.connector):
            part.zero_grad(set_to_none=True)
        if model.image_newline is not None:
            model.image_newline.grad = None


def no_images(model: LlavaModel, *, encoder: bool) -> Tensor:
    """Return empty features `[0, P, D]` for a micro-batch without images.

    With them the connector gets gradients, all zero, and so does an `encoder` that learns, from an
    empty image. Devices sum gradients together, so each device must have gradients for the same
    weights, also if its micro-batch has no image.
    """
    vision = model.vision
    if encoder:
        dtype = next(vision.parameters()).dtype
        size = (1, vision.channels, vision.image_size, vision.image_size)
        return model.features(torch.zeros(size, dtype=dtype, device=model.device))[:0]
    dtype = next(model.connector.parameters(), torch.empty(0)).dtype
    return torch.zeros(
        0, vision.tokens(vision.image_size), vision.width, dtype=dtype, device=model.device
    )


def divided_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return `value` on the parameter's device, sharded as the parameter is.

    Every process has read the same value, so nothing is sent: each keeps its own shard.
    """
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
