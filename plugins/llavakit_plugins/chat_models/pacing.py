"""Decides when a request may be sent: the service's rates, the pauses it asks for, back-off.

All times are of a monotonic clock, since the wall clock may jump.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

Clock = Callable[[], float]

_BURST = 1.0  # seconds' worth of a rate that may go at once
_LONGEST_PAUSE = 60.0


class Halted(Exception):
    """No further request may be sent."""


class Pace:
    """Lets requests go in the order in which they come, at the rates allowed."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._clock = clock
        self._rates = [rate and rate / 60 for rate in (requests_per_minute, tokens_per_minute)]
        self._due = [0.0, 0.0]
        self._held_until = 0.0
        self._queue = asyncio.Lock()
        self._halted = asyncio.Event()

    async def turn(self, tokens: int) -> None:
        """Wait until a request of so many tokens may go. Raises Halted."""
        async with self._queue:
            while (wait := self._wait()) > 0:
                await self.rest(wait)
            if self._halted.is_set():
                raise Halted
            now = self._clock()
            for index, cost in enumerate((1, tokens)):
                if rate := self._rates[index]:
                    # a virtual clock of what was sent: idle time counts for one second at most, so
                    # that a pause is not followed by a burst that the service refuses
                    self._due[index] = max(self._due[index], now - _BURST) + cost / rate

    def hold(self, seconds: float) -> None:
        """Hold all requests for so many seconds."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    async def rest(self, seconds: float) -> None:
        """Wait for so long. Raises Halted, at once."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._halted.wait(), seconds)
            raise Halted

    def halt(self) -> None:
        """Send no further request; all that wait raise Halted."""
        self._halted.set()

    def _wait(self) -> float:
        limited = [due for due, rate in zip(self._due, self._rates, strict=True) if rate]
        return max([self._held_until, *limited]) - self._clock()


def backoff(failures: int, first: float) -> float:
    """Return the pause after so many failures: twice as long each time, and shortened at random, so
    that requests that failed together are not sent again together."""
    longest = min(_LONGEST_PAUSE, first * 2.0 ** (failures - 1))
    return longest * random.uniform(0.5, 1)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds a service asks to wait, or None where it does not say.

    A date is read against the service's own clock, not this machine's.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        until, now = (parsedate_to_datetime(headers[name]) for name in ("retry-after", "date"))
        return max(0.0, (until - now).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None
