"""What was read of the last dialogues: a next turn reads only what is new. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from llavakit.stream.encode import IMAGE_ID, Encoded, IntArray


class _Kept(NamedTuple):
    keys: IntArray  # of every token and image that was read
    stamp: object
    held: Any  # what the runtime holds of them; nobody changes it any more
    size: int


@dataclass
class Prefixes:
    """The dialogues that a model keeps, the oldest first. Threads may share it."""

    most_bytes: int = 2 << 30  #: Of all together; 0 keeps none.
    _kept: list[_Kept] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of a model, or one on disk, has read nothing
        return Prefixes, (self.most_bytes,)

    def recall(self, encoded: Encoded, pixels_IHW: Any, stamp: object = None) -> Recalled:
        """Return what is known of a prompt and what is left to read, a token at least.

        `stamp` says what else decides on what is held, such as the weights: all must be equal.
        """
        keys = _keys(encoded, pixels_IHW)
        with self._lock:
            shared = [(_common(one.keys, keys), one) for one in self._kept if one.stamp == stamp]
        count, best = max(shared, key=lambda pair: pair[0], default=(0, None))
        front, rest = encoded.split(min(count, len(keys) - 1))
        if pixels_IHW is not None:
            pixels_IHW = pixels_IHW[front.image_count :] if rest.image_count else None
        return Recalled(front, rest, pixels_IHW, best.held if best else None, keys, stamp, self)

    def keep(self, kept: _Kept) -> None:
        """Keep a dialogue in the place of what it goes on from, and drop what was not asked for."""
        with self._lock:
            others = [one for one in self._kept if one.stamp == kept.stamp]
            # tokens of an answer may be others once it is read as text: half alike is enough
            others = [one for one in others if 2 * _common(one.keys, kept.keys) < len(one.keys)]
            self._kept = [*others, kept]
            while sum(one.size for one in self._kept) > self.most_bytes:
                del self._kept[0]


@dataclass(frozen=True)
class Recalled:
    """A prompt, in what was read before and what was not."""

    front: Encoded  #: What `held` begins with; it may go on with other rows.
    rest: Encoded
    pixels_IHW: Any  #: Of the images of the rest.
    held: Any
    _keys: IntArray
    _stamp: object
    _prefixes: Prefixes

    def keep(self, held: Any, size: int, written: Sequence[int]) -> None:
        """Keep what a runtime holds of the prompt and of these tokens of its answer."""
        keys = np.concatenate((self._keys, np.asarray(written, np.int64)))
        self._prefixes.keep(_Kept(keys, self._stamp, held, size))


def _keys(encoded: Encoded, pixels_IHW: Any) -> IntArray:
    """Return the tokens, and for each image a number that its pixels alone decide on."""
    keys = encoded.ids.copy()
    if pixels_IHW is None:
        return keys
    for place, pixels in zip(np.flatnonzero(keys == IMAGE_ID), pixels_IHW, strict=True):
        pixels = pixels if isinstance(pixels, np.ndarray) else pixels.float().cpu().numpy()
        digest = blake2b(pixels.tobytes(), digest_size=7).digest()
        keys[place] = -1 - int.from_bytes(digest)
    return keys


def _common(one: IntArray, other: IntArray) -> int:
    """Return how many keys two dialogues begin with alike."""
    size = min(len(one), len(other))
    differing = np.flatnonzero(one[:size] != other[:size])
    return int(differing[0]) if len(differing) else size
