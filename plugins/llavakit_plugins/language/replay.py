"""Decoding on CUDA by replaying a recorded step.

One row a sequence is little work for a GPU, and its hundreds of kernels take the host longer to
launch than the device to run. A CUDA graph launches all of them at once. A step is recorded for one
key-value cache and one length that attention looks at (`KVCache.columns_on_cuda`), after a few
steps that ran as usual: short answers are not worth it. It is believed once it has given what the
usual step gave.

S sequences, E width.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llavakit.contracts.packing import KVCache, Packing

Hidden: TypeAlias = Callable[[Tensor, Packing], Tensor]

_BEFORE = 2  # steps that run as usual: libraries choose and plan their kernels in them
_SAME = 0.02  # how far a recorded step may lie from the usual one: in bfloat16, norm-wise
# cuDNN plans anew for each length, which takes longer than the whole step
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class _Recorded:
    graph: Any
    embeds_SE: Tensor
    positions_S: Tensor
    hidden_SE: Tensor


class _Steps:
    """The steps of one cache: how many ran as usual, and what was recorded of them."""

    def __init__(self) -> None:
        self.kind: Any = None
        self.usual = 0
        self.recorded: _Recorded | None = None


def is_step(embeds_TE: Tensor, packing: Packing) -> bool:
    """Say whether these rows are a step of decoding that may be recorded."""
    cache = packing.cache
    return (
        cache is not None
        and embeds_TE.is_cuda
        and packing.watch is None
        and packing.starts[-1] == len(cache.lengths)
        and any(cache.lengths)
        and not any(cache.states)
        and not torch.is_grad_enabled()
        # it keeps rounded weights until its context ends, and a recorded step would read them later
        and not torch.is_autocast_enabled("cuda")
    )


class Replay:
    """Runs steps of decoding of one language model, recorded ones where that pays."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[KVCache, _Steps] = weakref.WeakKeyDictionary()
        self._stream: Any = None
        self._last: _Recorded | None = None
        """Kept for its memory, which the next recording shares."""
        self._works = True

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Replay, ()  # a copy of a model records its own steps

    def __call__(self, hidden: Hidden, embeds_SE: Tensor, packing: Packing) -> Tensor:
        """Return what `hidden` returns of a step, `[S, E]`."""
        cache = packing.cache
        assert cache is not None
        steps = self._of.setdefault(cache, _Steps())
        columns = cache.columns_on_cuda(max(cache.lengths) + 1)
        # a cache of which sequences were left out has other tensors
        kind = (columns, id(cache.keys[0]), embeds_SE.shape, embeds_SE.dtype)
        if steps.kind != kind:
            steps.kind, steps.usual, steps.recorded = kind, 0, None
        with sdpa_kernel(_BACKENDS):
            if steps.recorded is not None:
                return _replayed(steps.recorded, embeds_SE, packing)
            if self._works and steps.usual >= _BEFORE:
                steps.recorded = self._record(hidden, embeds_SE, packing)
            steps.usual += 1
            hidden_SE = hidden(embeds_SE, packing)
        if steps.recorded is not None:
            again_SE = _replayed(steps.recorded, embeds_SE, packing)
            if not bool((again_SE - hidden_SE).norm() <= _SAME * hidden_SE.norm()):
                steps.recorded = None
                self._give_up("a recorded one gave something else")
        return hidden_SE

    def _record(self, hidden: Hidden, embeds_SE: Tensor, packing: Packing) -> _Recorded | None:
        """Return a recorded step, or None if this model has one that cannot be recorded."""
        device = embeds_SE.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        embeds_SE, positions_S = embeds_SE.clone(), packing.position_ids_T.clone()
        again = Packing(packing.starts, positions_S, packing.cache)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on meanwhile
        given: dict[str, Any] = {"capture_error_mode": "thread_local"}
        if self._last is not None:
            given["pool"] = self._last.graph.pool()
        torch.cuda.synchronize(device)
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(**given)
                try:
                    hidden_SE = hidden(embeds_SE, again)
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # a step that asks the device something
            torch.cuda.synchronize(device)
            self._give_up(str(error).splitlines()[0] if str(error) else type(error).__name__)
            return None
        self._last = _Recorded(graph, embeds_SE, positions_S, hidden_SE)
        return self._last

    def _give_up(self, why: str) -> None:
        self._works = False
        warnings.warn(
            f"decoding is slower than it could be: its steps cannot be recorded ({why})",
            stacklevel=3,
        )


def _replayed(recorded: _Recorded, embeds_SE: Tensor, packing: Packing) -> Tensor:
    recorded.embeds_SE.copy_(embeds_SE)
    recorded.positions_S.copy_(packing.position_ids_T)
    recorded.graph.replay()
    return recorded.hidden_SE.clone()  # the next step writes over it
