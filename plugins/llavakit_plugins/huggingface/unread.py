"""Weights that are known but not read yet, so that each device can read its share of them alone.

A parameter that is not read is a stand-in: it has the shape, the dtype and the device of the real
one, and holds one number, NaN, however large it is. So a model can be made, given adapters and
looked at in the usual way, and costs no memory until its weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

_current: ContextVar[Unread | None] = ContextVar("_current", default=None)


class _Known(NamedTuple):
    stand_in: Tensor
    source: Tensor
    """As it lies in its file, mapped; its dtype may be another."""


class Unread:
    """The weights that were not read; each is found by its stand-in, wherever that went."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def stand_in(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor in the place of `source`; only floating-point weights take `dtype`."""
        if not source.is_floating_point():
            return source
        made = torch.full((), torch.nan, dtype=dtype).expand(source.shape)
        self._known[_address(made)] = _Known(made, source)
        return made

    def source(self, tensor: Tensor) -> Tensor | None:
        """Return what a stand-in stands for; None for a tensor that is there."""
        # only a stand-in on the CPU has an address of its own
        known = self._known.get(_address(tensor)) if tensor.device.type == "cpu" else None
        return None if known is None else known.source

    def stands_for(self, model: nn.Module) -> bool:
        """Read a model's buffers, and return whether all of its parameters are stand-ins."""
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if (source := self.source(buffer)) is not None:
                    setattr(module, name, source.to(buffer.dtype, copy=True))
        return all(self.source(parameter) is not None for parameter in model.parameters())

    @torch.no_grad()
    def read(self, module: nn.Module, device: torch.device | None = None) -> None:
        """Read all weights of a module, one after another, to `device`, or where they belong."""
        for parameter, source in self._within(module):
            parameter.data = source.to(device or parameter.device, parameter.dtype)

    @torch.no_grad()
    def read_mapped(self, module: nn.Module, scratch: Path) -> None:
        """Read all weights of a module so that the memory need not hold them.

        Those whose dtype is not their file's are converted, one after another, into a file
        `scratch`, which is removed: what is mapped stays. Raises OSError where the disk is full.
        """
        found = self._within(module)
        changed = [(p, source) for p, source in found if p.dtype != source.dtype]
        begins = [0, *accumulate(_aligned(parameter) for parameter, _ in changed)]
        with scratch.open("wb") as file:
            for (parameter, source), begin in zip(changed, begins, strict=False):
                file.seek(begin)
                converted = source.to(parameter.dtype).contiguous().flatten()
                file.write(converted.view(torch.uint8).numpy().data)
            file.truncate(begins[-1])
        if changed:
            room = torch.from_file(str(scratch), size=begins[-1], dtype=torch.uint8)
        scratch.unlink()
        for (parameter, source), begin in zip(changed, begins, strict=False):
            own = room[begin : begin + source.numel() * parameter.itemsize]
            parameter.data = own.view(parameter.dtype).view(source.shape)
        self.read(module)  # the others, as they lie

    def _within(self, module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        return [(p, found) for p in module.parameters() if (found := self.source(p)) is not None]

    def to_meta(self, module: nn.Module) -> dict[str, Tensor]:
        """Turn a module's stand-ins into parameters on the meta device; return what they are.

        That is how FSDP2 takes a module whose weights come later: see `read_shares`.
        """
        meta: dict[int, nn.Parameter] = {}  # by identity: tied weights stay one parameter
        sources = {}
        for path, inner in module.named_modules():
            for name, parameter in inner.named_parameters(recurse=False):
                if (source := self.source(parameter)) is None:
                    continue
                if id(parameter) not in meta:
                    empty = torch.empty_like(parameter, device="meta").contiguous()
                    meta[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                setattr(inner, name, meta[id(parameter)])
                sources[f"{path}.{name}" if path else name] = source
        return sources


@contextmanager
def leave_unread() -> Iterator[Unread]:
    """Let networks of transformers that are made within this context have stand-ins as weights."""
    unread = Unread()
    token = _current.set(unread)
    try:
        yield unread
    finally:
        _current.reset(token)


def being_left() -> Unread | None:
    """Return where the weights that are not read now are kept; None where they are to be read."""
    return _current.get()


@torch.no_grad()
def read_shares(module: nn.Module, sources: Mapping[str, Tensor], device: torch.device) -> None:
    """Read weights that were divided on the meta device: of each this process's share alone.

    `sources` are the whole ones by name. They are mapped, so that slices are read straight from
    their files, and in the file's dtype: only the share is converted.
    """
    made: dict[int, nn.Parameter] = {}
    for name, source in sources.items():
        path, _, last = name.rpartition(".")
        inner = module.get_submodule(path)
        parameter: Any = inner.get_parameter(last)
        if not parameter.is_meta:
            continue
        if id(parameter) not in made:
            own: Any = torch.empty_like(parameter, device=device)
            (own.to_local() if isinstance(own, DTensor) else own).copy_(_share(source, parameter))
            made[id(parameter)] = nn.Parameter(own, parameter.requires_grad)
        setattr(inner, last, made[id(parameter)])


def _share(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of `whole` that this process has of a parameter that is divided."""
    if not isinstance(parameter, DTensor):
        return whole
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            index = parameter.device_mesh.get_local_rank(dimension)
            # as FSDP2 divides: the last processes have less, or nothing
            parts = whole.chunk(parameter.device_mesh.size(dimension), placement.dim)
            whole = parts[index] if index < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _aligned(parameter: Tensor) -> int:
    """Return the bytes of a parameter, rounded up so that the next begins where any dtype may."""
    return -(-parameter.numel() * parameter.itemsize // 64) * 64
