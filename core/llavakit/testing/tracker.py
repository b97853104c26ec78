"""The contract of a tracker."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from llavakit.contracts.interfaces import Tracker
from llavakit.testing.contract import Contract

EVENTS: tuple[dict[str, Any], ...] = (
    {"time": 1.0, "step": "", "event": "run", "recipe": "small", "seed": 0},
    {"time": 2.0, "step": "01-pretrain", "event": "train", "at": 1, "loss": 2.5, "lr": 1e-3},
    {"time": 3.0, "step": "01-pretrain", "event": "train", "at": 2, "loss": float("nan")},
    {"time": 4.0, "step": "01-pretrain", "event": "done", "text": "ü ☃", "more": {"a": [1, None]}},
)


class TrackerContract(Contract[Tracker]):
    """Checks a `Tracker`. Build one that works without a network."""

    kind = Tracker

    def test_it_takes_every_event_and_changes_none(self) -> None:
        tracker = self.build()
        for event in deepcopy(EVENTS):
            before = repr(event)
            tracker.record(event)
            assert repr(event) == before, "`record` changes the event, which others see, too"
        tracker.close()

    def test_it_can_be_closed_at_once(self) -> None:
        self.build().close()
