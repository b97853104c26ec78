"""Lays samples end to end in micro-batches.

T rows of the stream, S samples, N visual rows (of K embeddings each), M supervised rows,
I views, Q rows that the connector reads where features are pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llavakit.contracts.packing import Packing, Rows, upload
from llavakit.stream.tiling import Arrangement, joined

if TYPE_CHECKING:
    from llavakit.stream.encode import Encoded


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch, ready for the device."""

    token_ids_T: Tensor
    packing: Packing
    visual_rows_N: Tensor
    visual_kept_N: Tensor | None
    supervised_rows: Rows  #: The rows whose next token is supervised.
    targets_M: Tensor  #: int64: those next tokens.
    samples: tuple[int, ...]  #: Index of each sample in its data set.
    images: tuple[tuple[int, int], ...]  #: (sample, its image) of each, in order of rows.
    separator_rows_L: Tensor  #: int64: rows of the learned separator.
    weights_KN: Tensor | None  #: Where visual rows are interpolated or pooled (see `Stream`).
    pooled_KQ: Tensor | None  #: int64: features that the connector's Q rows are made of, if pooled.
    shares_KQ: Tensor | None  #: Their weights; None: the largest counts.

    def pool(self, features_IPD: Tensor) -> Tensor:
        """Return the features that the connector reads: of videos, `[1, Q, D]` pooled ones."""
        if (index_KQ := self.pooled_KQ) is None:
            return features_IPD
        taken_KQD = features_IPD.flatten(0, 1)[index_KQ]
        if self.shares_KQ is None:
            return taken_KQD.amax(0)[None]
        return (taken_KQD * self.shares_KQ[..., None]).sum(0)[None].to(features_IPD.dtype)

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on `device`."""
        move, rows = partial(upload, device=device), self.supervised_rows
        given = vars(self).items()
        moved: Any = {name: move(value) for name, value in given if isinstance(value, Tensor)}
        rows = replace(rows, index_M=move(rows.index_M))
        return replace(self, **moved, packing=self.packing.to(device), supervised_rows=rows)


def pack(encoded: Sequence[Encoded], samples: Sequence[int], visual_tokens: int) -> PackedBatch:
    """Lay encoded samples end to end.

    `visual_tokens` is P', the embeddings of a view; `samples` are the samples' indices.
    """
    token_ids, supervised, visual, starts, images, kept = [], [], [], [0], [], []
    arranged: list[Arrangement] = []
    for index, item in zip(samples, encoded, strict=True):
        rows = item.expand(visual_tokens)
        token_ids.append(rows.token_ids)
        supervised.append(rows.supervised)
        visual.append(rows.visual)
        own = item.images(visual_tokens)
        images += [(index, number) for number in range(len(own))]
        arranged += own
        kept.append(np.arange(sum(len(image.index_RK) for image in own)) < rows.visual.sum())
        starts.append(starts[-1] + len(rows.token_ids))
    ids_T = np.concatenate(token_ids)
    supervised_T = np.concatenate(supervised)
    # row t predicts token t + 1, within the sample; no first token is ever learned
    supervised_T[np.asarray(starts[:-1])] = False
    supervised_rows = np.flatnonzero(supervised_T) - 1
    counts = np.diff(np.searchsorted(supervised_rows, starts))
    visual_rows = np.flatnonzero(np.concatenate(visual))
    left = np.concatenate(kept)
    (index_RK, weights_RK), embeddings, pooled = joined(arranged, visual_tokens)
    index_RK = index_RK[left]
    shows = index_RK[:, 0] >= 0  # the other rows are separators
    index_KN = torch.from_numpy(index_RK[shows].T.copy())
    weights_KN = None if weights_RK is None else torch.from_numpy(weights_RK[left][shows].T.copy())
    shares = None if pooled is None else pooled.weights_RK
    visual_kept_N: Tensor | None = index_KN
    if weights_KN is None:
        in_order = np.array_equal(index_RK[:, 0], np.arange(embeddings))
        visual_kept_N = None if in_order else index_KN[0]
    return PackedBatch(
        token_ids_T=torch.from_numpy(ids_T),
        packing=Packing.of(np.diff(starts).tolist()),
        visual_rows_N=torch.from_numpy(visual_rows[shows]),
        visual_kept_N=visual_kept_N,
        supervised_rows=Rows(torch.from_numpy(supervised_rows), tuple(counts.tolist())),
        targets_M=torch.from_numpy(ids_T[supervised_rows + 1]),
        samples=tuple(samples),
        images=tuple(images),
        separator_rows_L=torch.from_numpy(visual_rows[~shows]),
        weights_KN=weights_KN,
        pooled_KQ=None if pooled is None else torch.from_numpy(pooled.index_RK.T.copy()),
        shares_KQ=None if shares is None else torch.from_numpy(shares.T.copy()),
    )
