"""Choosing the next token: one maths for torch and numpy. It depends on the answer's own logits,
options, seed and length alone: who shares the batch, or an interruption, changes nothing.

S answers, V vocabulary.
"""

from __future__ import annotations

import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llavakit.contracts.model import Sampling


class Token(NamedTuple):
    """A token of an answer. Logarithms are of what the model says, before any option acts."""

    id: int
    logprob: float | None = None  #: None where it was not asked for.
    top: tuple[tuple[int, float], ...] = ()  #: The likeliest tokens there, with theirs.


@dataclass
class Written:
    """One answer while it is written: all that its next token depends on."""

    sampling: Sampling
    prompt: Sequence[int] = ()  #: The prompt's tokens, for `repetition_penalty`.
    number: int = 0  #: Of the `n` answers to the prompt.
    ids: list[int] = field(default_factory=list)  #: The tokens so far.
    seed: int = -1

    def __post_init__(self) -> None:
        chosen = self.sampling.seed
        self.seed = secrets.randbits(64) if chosen is None else int(chosen) % (1 << 64)

    def draw(self) -> float:
        """Return the next token's random number, in [0, 1)."""
        generator = np.random.default_rng((self.seed, self.number, len(self.ids)))
        return float(generator.random(dtype=np.float32))


def choose_tokens(logits_SV: Any, written: Sequence[Written]) -> list[Token]:
    """Return the next token of each answer, from logits `[S, V]`, or `[V]` for one.

    Nothing that is given is changed: the caller adds each token to its `Written.ids`.
    """
    logits_SV = logits_SV.reshape(len(written), -1)
    scores_SV = _penalised(logits_SV, written)
    ids = scores_SV.argmax(-1).tolist()
    warm = [s for s, one in enumerate(written) if one.sampling.temperature]
    if warm:
        weights_SV = distribution(scores_SV[warm], [written[s].sampling for s in warm])
        cumulated_SV = weights_SV.cumsum(-1)
        drawn_S1 = _column(weights_SV, [written[s].draw() for s in warm]) * cumulated_SV[:, -1:]
        beyond_SV = (cumulated_SV > drawn_S1) & (weights_SV > 0)
        for s, token in zip(warm, (beyond_SV * 1).argmax(-1).tolist(), strict=True):
            ids[s] = token
    asked = (one.sampling.logprobs for one in written)
    return [
        Token(token) if top is None else _with_logarithms(logits_V, token, top)
        for logits_V, token, top in zip(logits_SV, ids, asked, strict=True)
    ]


def distribution(scores_SV: Any, options: Sequence[Sampling]) -> Any:
    """Return what the next token of each answer is drawn with, `[S, V]`, not scaled to 1.

    Of the likeliest tokens in their order, `top_k` stay; of these, those before which less than
    `top_p` of their probability lies (arXiv 1904.09751); and those of at least `min_p` times the
    likeliest's (arXiv 2407.01082). Of equal ones at a border all stay.
    """
    array, scores_SV = _library(scores_SV), _wide(scores_SV)
    scores_SV = scores_SV - array.amax(scores_SV, -1)[:, None]  # the likeliest has 0
    warmth = [max(one.temperature, 1e-30) for one in options]  # of less, no number has the inverse
    weights_SV = array.exp(scores_SV / _column(scores_SV, warmth))
    cut = [s for s, one in enumerate(options) if one.top_k or one.top_p < 1]
    if cut:  # sorting a vocabulary takes longer than all else
        ranked_SV = array.sort(-weights_SV[cut], -1)
        ranked_SV = -getattr(ranked_SV, "values", ranked_SV)  # torch gives the indices, too
        top_k = [options[s].top_k or ranked_SV.shape[1] for s in cut]
        rank_SV = array.ones_like(ranked_SV).cumsum(-1)
        ranked_SV = ranked_SV * (rank_SV <= _column(ranked_SV, top_k))
        cumulated_SV = ranked_SV.cumsum(-1)
        top_p_S1 = _column(ranked_SV, [options[s].top_p for s in cut]) * cumulated_SV[:, -1:]
        kept_SV = (cumulated_SV - ranked_SV < top_p_S1) & (ranked_SV > 0)
        least_S = array.amin(array.where(kept_SV, ranked_SV, array.ones_like(ranked_SV)), -1)
        weights_SV[cut] = weights_SV[cut] * (weights_SV[cut] >= least_S[:, None])
    return weights_SV * (weights_SV >= _column(weights_SV, [one.min_p for one in options]))


def _penalised(logits_SV: Any, written: Sequence[Written]) -> Any:
    """Return the logits less what the penalties take from tokens that are there already."""
    scores_SV = logits_SV
    for s, one in enumerate(written):
        how = one.sampling
        if (how.repetition_penalty, how.frequency_penalty, how.presence_penalty) == (1, 0, 0):
            continue
        if scores_SV is logits_SV:
            scores_SV = _wide(logits_SV)
        seen = sorted({token for token in (*one.prompt, *one.ids) if token >= 0})  # no images
        found, penalty = scores_SV[s, seen], how.repetition_penalty
        scores_SV[s, seen] = _library(found).where(found < 0, found * penalty, found / penalty)
        for token, count in Counter(one.ids).items():
            scores_SV[s, token] -= count * how.frequency_penalty + how.presence_penalty
    return scores_SV


def _with_logarithms(logits_V: Any, token: int, top: int) -> Token:
    logits_V = logits_V if isinstance(logits_V, np.ndarray) else logits_V.float().cpu().numpy()
    logs_V = logits_V.astype(np.float64) - logits_V.max()
    logs_V -= np.log(np.exp(logs_V).sum())
    best = np.argsort(-logs_V, kind="stable")[:top].tolist()
    return Token(token, float(logs_V[token]), tuple((b, float(logs_V[b])) for b in best))


def _library(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def _wide(array: Any) -> Any:
    """Return a copy in float64, so that sums over a whole vocabulary keep what is small."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float64)
    return (array.float() if array.device.type == "mps" else array.double()) + 0.0


def _column(like: Any, values: Sequence[float]) -> Any:
    """Return values as `[S, 1]`, of the kind of `like`."""
    column = np.asarray(values, np.float64)[:, None]
    return column if isinstance(like, np.ndarray) else like.new_tensor(column.tolist())
