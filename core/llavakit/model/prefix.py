"""What was read of the last dialogues: a next turn reads only what is new. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from llavakit.stream.encode import IMAGE_ID, Encoded
from llavakit.stream.tiling import IntArray


class Kept(NamedTuple):
    """A dialogue that was read. Nobody changes it any more."""

    keys: IntArray  #: Its tokens, and a number for what each image shows.
    stamp: object  #: What else decides on what is held, such as the weights.
    held: Any  #: A runtime's own.
    size: int  #: In bytes.


class Recalled(NamedTuple):
    """A prompt, in what was read before and what was not."""

    front: Encoded  #: What `held` begins with; it may go on with other rows.
    rest: Encoded
    pixels_IHW: Any  #: Of the images of the rest.
    held: Any
    keep: Callable[[Any, int, Sequence[int]], None]
    """Called with what is held in the end, its size, and the tokens behind the prompt in it."""


@dataclass
class Prefixes:
    """The dialogues that a model keeps, the oldest first. Threads may share it."""

    most_bytes: int = 2 << 30  #: Of all together; 0 keeps none.
    kept: list[Kept] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of a model, or one on disk, has read nothing
        return Prefixes, (self.most_bytes,)

    def recall(self, encoded: Encoded, pixels_IHW: Any, stamp: object = None) -> Recalled:
        """Return what is known of a prompt, and what is left to read: a token at least."""
        keys, begin, shown = encoded.ids.copy(), 0, encoded.images(1)  # of their views only
        for number, index in enumerate(np.flatnonzero(keys == IMAGE_ID)):
            pixels = pixels_IHW[begin : (begin := begin + shown[number].views)]
            pixels = pixels if isinstance(pixels, np.ndarray) else pixels.float().cpu().numpy()
            digest = blake2b(pixels.tobytes(), digest_size=7)
            if encoded.arranged is not None:  # equal views may be of images of other sizes
                digest.update(encoded.arranged[number].index_RK.tobytes())
            keys[index] = -1 - int.from_bytes(digest.digest())
        found = [(_common(one.keys, keys), one.held) for one in self.kept if one.stamp == stamp]
        count, held = max(found, key=lambda pair: pair[0], default=(0, None))
        front, rest = encoded.split(min(count, len(keys) - 1))
        left = pixels_IHW[sum(one.views for one in front.images(1)) :] if rest.image_count else None
        return Recalled(front, rest, left, held, partial(self._keep, keys, stamp))

    def _keep(
        self, prompt: IntArray, stamp: object, held: Any, size: int, written: Sequence[int]
    ) -> None:
        """Keep a dialogue in place of what it goes on from, and drop what was not asked for."""
        keys = np.concatenate((prompt, np.asarray(written, np.int64)))
        with self._lock:
            # tokens of an answer may be others once it is read as text: half alike is enough
            others = [one for one in self.kept if 2 * _common(one.keys, keys) < len(one.keys)]
            kept = [one for one in others if one.stamp == stamp] + [Kept(keys, stamp, held, size)]
            while sum(one.size for one in kept) > self.most_bytes:
                del kept[0]
            self.kept = kept


def _common(one: IntArray, other: IntArray) -> int:
    """Return how many keys two dialogues begin with alike."""
    size = min(len(one), len(other))
    return int(np.argmin(np.append(one[:size] == other[:size], False)))
