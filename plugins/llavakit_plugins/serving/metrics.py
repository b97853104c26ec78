"""What the server counts, as Prometheus reads it (its text format, version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "llavakit_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Histogram:
    """Durations in seconds, counted in buckets."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds


class Metrics:
    """Counters, durations and levels. The event loop and the model's thread both count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, int], int] = defaultdict(int)
        self._counts: dict[str, int] = {
            "prompt_tokens_total": 0,
            "generation_tokens_total": 0,
            "images_total": 0,
            "abandoned_total": 0,
        }
        self._durations = {
            "time_to_first_token_seconds": Histogram(),
            "request_seconds": Histogram(),
            "decode_step_seconds": Histogram(),
        }
        self.levels: dict[str, Callable[[], float]] = {}  #: What a moment's level is read from.

    def request(self, path: str, status: int) -> None:
        """Count a request that was answered."""
        with self._lock:
            self._requests[path, status] += 1

    def count(self, name: str, more: int = 1) -> None:
        with self._lock:
            self._counts[name] += more

    def time(self, name: str, seconds: float) -> None:
        with self._lock:
            self._durations[name].add(seconds)

    def mean(self, name: str) -> float:
        """Return the mean duration so far, in seconds; 0 before the first."""
        with self._lock:
            histogram = self._durations[name]
            return histogram.total / max(1, sum(histogram.buckets))

    def text(self) -> str:
        """Return all of it in Prometheus' text format."""
        with self._lock:
            return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        yield f"# TYPE {_PREFIX}requests_total counter"
        for (path, status), number in sorted(self._requests.items()):
            yield f'{_PREFIX}requests_total{{path="{path}",status="{status}"}} {number}'
        for name, number in self._counts.items():
            yield f"# TYPE {_PREFIX}{name} counter"
            yield f"{_PREFIX}{name} {number}"
        for name, level in self.levels.items():
            yield f"# TYPE {_PREFIX}{name} gauge"
            yield f"{_PREFIX}{name} {level():g}"
        for name, histogram in self._durations.items():
            yield f"# TYPE {_PREFIX}{name} histogram"
            below = 0
            for edge, number in zip((*_SECONDS, "+Inf"), histogram.buckets, strict=True):
                below += number
                yield f'{_PREFIX}{name}_bucket{{le="{edge}"}} {below}'
            yield f"{_PREFIX}{name}_sum {histogram.total:.6f}"
            yield f"{_PREFIX}{name}_count {below}"
