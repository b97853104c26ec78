"""The packed stream: several samples laid end to end in one row of tokens, without padding.

T rows of the stream, S samples in it, N visual rows, M supervised rows, I images, E width,
H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`, without waiting for what a GPU has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from any other memory the host does wait
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Packing:
    """Where the samples of a stream begin and end. Attention never crosses a boundary."""

    starts: tuple[int, ...]  #: First row of each sample, then T; on the host: no kernel waits.
    position_ids_T: Tensor  #: int64, from 0 in each sample; decoding: from the cache's length.
    cache: KVCache | None = None
    watch: Watch | None = None  #: Sees what attends to what, for those who draw it.

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        """Return the packing of samples of these lengths."""
        starts = (0, *np.cumsum(np.asarray(lengths, dtype=np.int64)).tolist())
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
        return cls(starts, positions.to(device))

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.starts))

    @property
    def last_rows_S(self) -> Tensor:
        """The last row of each sample."""
        return upload(torch.tensor(self.starts[1:]) - 1, self.position_ids_T.device)

    @cached_property
    def bounds_S(self) -> Tensor:
        """`starts` on the device, int32, as attention kernels want it."""
        starts = torch.tensor(self.starts, dtype=torch.int32)  # FlashAttention reads no int64
        return upload(starts, self.position_ids_T.device)

    @cached_property
    def samples_T(self) -> Tensor:
        """The number of the sample that each row belongs to, int32."""
        # on the CPU: a GPU would have to say how long it got
        samples_T = np.arange(len(self.lengths), dtype=np.int32).repeat(self.lengths)
        return upload(torch.from_numpy(samples_T), self.position_ids_T.device)

    @cached_property
    def masks(self) -> dict[Any, Any]:
        """Attention's masks of this stream by their kind, kept for the layers to come."""
        return {}

    def to(self, device: torch.device) -> Packing:
        # what was cached stays on the old device
        return replace(self, position_ids_T=upload(self.position_ids_T, device))


@dataclass(frozen=True)
class Rows:
    """Some rows of a stream, ascending."""

    index_M: Tensor  #: int64.
    counts: tuple[int, ...]  #: How many of them lie in each sample, on the host.


@dataclass(frozen=True)
class Stream:
    """What a connector needs to fill the stream with text and visual embeddings."""

    token_ids_T: Tensor  #: int64; 0 at visual rows, whose text embedding nobody sees.
    visual_rows_N: Tensor  #: int64: the row of each visual token, images in order.
    visual_kept_N: Tensor | None  #: int64 into `[I * P']` embeddings; None: all, in order.
    embed: Callable[[Tensor], Tensor]
    embedding_VE: Tensor | None  #: The table behind `embed` where that is a plain look-up.
    weights_KN: Tensor | None = None  #: Then `visual_kept_N` is `[K, N]`: rows are sums of K.


@dataclass(frozen=True)
class Scoring:
    """How a layer turns products of queries and keys into weights."""

    scale: float | None = None  #: Factor of the products; 1/sqrt(K) where absent.
    window: int | None = None  #: How far back a row sees, itself included.
    softcap: float | None = None  #: Scores become `softcap * tanh(score / softcap)` (Gemma 2).
    sinks_H: Tensor | None = None  #: A score a head that takes weight, gives nothing (gpt-oss).

    @property
    def plain(self) -> bool:
        """Whether torch's own scaled_dot_product_attention does all of it but the window."""
        return self.softcap is None and self.sinks_H is None  # a window is a mask, which it takes


class KVCache:
    """Keys and values of S sequences, right-padded to the longest, one pair for each layer.

    `llavakit.packed_attention` stores and reads keys and values, `[S, G, capacity, K]`.
    A recurrent layer keeps its state in `states[layer]`, by names of its own: tensors `[S, ...]`,
    which it reads and replaces at each call, and of which `select` keeps the rows.
    """

    def __init__(self, layers: int, capacities: Sequence[int]) -> None:
        self.lengths = [0] * len(capacities)  #: Tokens of each sequence, in every layer.
        self.capacity = -(-max(capacities) // 16) * 16  # kernels read so many at a time
        self.keys: list[Tensor | None] = [None] * layers  # until the first rows tell their kind
        self.values: list[Tensor | None] = [None] * layers
        self.states: list[dict[str, Tensor]] = [{} for _ in range(layers)]

    def columns_on_cuda(self, longest: int) -> int:
        """Return how many columns decoded rows look at: what is planned for 256 serves them all."""
        return min(self.capacity, -(-longest // 256) * 256)

    def advance(self, packing: Packing) -> None:
        """Count the rows of a stream as held, once every layer has stored them."""
        self.lengths = [n + m for n, m in zip(self.lengths, packing.lengths, strict=True)]

    def select(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        kept = list(sequences)
        for store in (self.keys, self.values):
            store[:] = [None if tensor is None else tensor[kept] for tensor in store]
        self.states = [{name: state[kept] for name, state in of.items()} for of in self.states]
        self.lengths = [self.lengths[s] for s in sequences]


class Watch(Protocol):
    """Sees the queries and keys of every layer, for those who draw attention maps."""

    def see(
        self, layer: int, q_THK: Tensor, k_TGK: Tensor, packing: Packing, scoring: Scoring
    ) -> None:
        """Take one layer's queries and keys, before they are weighed."""
