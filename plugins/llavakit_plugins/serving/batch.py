"""What the scheduler needs of a model: prompts are read in chunks, and answers written together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llavakit import Encoded


@dataclass(eq=False)
class Prompt:
    """A prompt that is read in chunks."""

    encoded: Encoded
    pixels: Any  #: Of its images, as `prepare` returns them; None without images.
    length: int  #: Rows of the stream.
    room: int  #: The tokens its answers may have.
    features: list[Any] = field(default_factory=list)  #: Of each image that is encoded.
    embeds: Any = None
    cache: Any = None
    read: int = 0  #: Rows that are in the cache.
    logits: Any = None  #: `[1, V]` behind the last row, once all is read.

    @property
    def chunks(self) -> int:
        """Return how many turns reading takes at least, roughly: one for each image, and so on."""
        return self.unseen + (self.logits is None)

    @property
    def unseen(self) -> int:
        """Return how many views are not encoded yet."""
        return 0 if self.pixels is None else len(self.pixels) - len(self.features)

    def encode_next(self, encode: Callable[[Any], Any]) -> bool:
        """Encode the next view, `[1, 3, H, W]`; return whether there was one."""
        if not self.unseen:
            return False
        number = len(self.features)
        self.features.append(encode(self.pixels[number : number + 1]))
        return True


class Batch(Protocol):
    """The answers that are written together, each at its place 0..S-1."""

    def __len__(self) -> int:
        """Return S, how many answers there are."""

    def fits(self, reserved: Sequence[int]) -> bool:
        """Say whether sequences that may become so long fit into the cache together."""

    def read(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Do one chunk of work for the first of these, and for others where that costs little.

        Return the prompts for which it was done. One is read when it has `logits`.
        """

    def join(self, prompt: Prompt) -> None:
        """Give an answer to a prompt that is read the next place, S."""

    def step(self, tokens: Sequence[int]) -> Any:
        """Read one more token of each answer; return the logits `[S, V]` behind them."""

    def leave(self, places: Sequence[int]) -> list[int]:
        """Free places; return which answer, by its place before, is at each place now."""


def places_left(count: int, places: Sequence[int]) -> list[int]:
    """Return which of `count` sequences is at each place, once those at `places` have left.

    Who is last takes a place that is free, so that few are moved.
    """
    order = list(range(count))
    # from the last place on, so that no sequence that leaves is moved into a gap
    for place in sorted(places, reverse=True):
        last = order.pop()
        if place < len(order):
            order[place] = last
    return order


def free_memory() -> int:
    """Return the memory that the system can give, in bytes; 4 GiB where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return 4 * 2**30
