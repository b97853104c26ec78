"""What training takes of a device's memory, and of the network, for plans.

It is reckoned from shapes, for any number of devices: nothing is loaded, and no device is needed.
"""

from __future__ import annotations

from math import ceil

from llavakit import PARTS
from llavakit.contracts.run import Planner
from llavakit_plugins.training.division import parts_of_weights
from llavakit_plugins.training.options import TrainOptions

_SINGLE = 4  # bytes of float32, in which weights learn and gradients are summed
_GATHERED = 2
"""Blocks of the language model whose weights are whole at once: one computes, one is sent for."""


def device_memory(options: TrainOptions, planner: Planner) -> dict[str, float]:
    """Return the GB of a device by what takes them; together they are the step's memory."""
    half = _half(options)
    divided = parts_of_weights(planner.model, options, planner.devices)
    state_bytes = planner.build(options.optimiser).state_bytes
    found = dict.fromkeys(("weights", "gradients", "moments", "gathered", "activations"), 0.0)
    for part in PARTS:
        learns = _learns(options, planner, part)
        own = 1 if part == "vision" and not learns else divided  # a frozen encoder stays whole
        frozen = getattr(planner.model, part).frozen_bytes(half) - half * learns
        found["weights"] += (frozen + _SINGLE * learns) / own
        found["gradients"] += _SINGLE * learns / own
        found["moments"] += state_bytes * learns / own
    if divided > 1:
        blocks = _blocks(planner)
        # embedding, head and connector are gathered once a micro-batch, a block when it computes
        outside = sum(map(planner.parameters, ("language", "connector"))) - sum(blocks)
        found["gathered"] = half * outside + (half * _GATHERED + _SINGLE) * max(blocks, default=0)
    language = planner.model.language
    layers, _, _ = language.cache_shape()
    values = (2 if options.recompute else 17) * layers + 17  # a row's stored values, in widths
    found["activations"] = options.micro_batch_tokens * values * language.width * half
    if planner.devices == 1:  # each fork hands its gradients over in memory of their own
        found["gradients"] *= 2 * options.processes - 1
        found["activations"] *= options.processes
    return {name: size / 1e9 for name, size in found.items()}


def network_gb(options: TrainOptions, planner: Planner, rows: float) -> dict[str, float]:
    """Return the GB that a device receives in an optimisation step of `rows` of the stream.

    They come from the devices that share its weights, and from those that hold the same share.
    """
    devices = planner.devices
    divided = parts_of_weights(planner.model, options, devices)
    copies = devices // divided
    learning = {part: _learns(options, planner, part) for part in PARTS}
    learned = sum(learning.values())
    found = {}
    if divided > 1:
        micros = max(1, ceil(rows / devices / options.micro_batch_tokens))
        parts = [p for p in PARTS if p != "vision" or learning[p]]
        gathered = sum(planner.parameters(part) for part in parts)
        # weights before the forward pass and before the backward pass, then gradients, each time
        sent = micros * (2 * _half(options) * gathered + _SINGLE * learned)
        found["within"] = sent * (divided - 1) / divided
    if copies > 1:
        # a ring sends a sum's parts round twice; FSDP2 sums between groups in each micro-batch
        times = micros if divided > 1 else 1
        found["between"] = times * 2 * _SINGLE * learned / divided * (copies - 1) / copies
    return {name: size / 1e9 for name, size in found.items()}


def network_note(options: TrainOptions, planner: Planner, rows: float) -> str | None:
    """Return a sentence about `network_gb`; None for one device."""
    found = network_gb(options, planner, rows)
    said = []
    if "within" in found:
        said.append(f"{found['within']:,.3g} GB from those that share its weights")
    if "between" in found:
        said.append(f"{found['between']:,.3g} GB of gradients from the other copies")
    return f"a device receives in each step {' and '.join(said)}" if said else None


def _half(options: TrainOptions) -> int:
    """Return the bytes of a number that the step computes with."""
    return 2 if options.precision == "bf16" else 4


def _learns(options: TrainOptions, planner: Planner, part: str) -> int:
    return planner.trainable(part) if part in options.train else 0


def _blocks(planner: Planner) -> list[int]:
    """Return the number of weights of each block of the language model."""
    blocks = planner.model.language.blocks
    return [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
