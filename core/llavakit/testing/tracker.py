"""The contract of a tracker."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from threading import Thread
from typing import Any

from llavakit.contracts.interfaces import Tracker
from llavakit.testing.contract import Contract, hold

EVENTS: tuple[dict[str, Any], ...] = (
    {"time": 1.0, "step": "", "event": "run", "recipe": "small", "seed": 0},
    {"time": 2.0, "step": "01-pretrain", "event": "train", "at": 1, "loss": 2.5, "lr": 1e-3},
    {"time": 3.0, "step": "01-pretrain", "event": "train", "at": 2, "loss": float("nan")},
    {"time": 4.0, "step": "01-pretrain", "event": "done", "text": "ü ☃", "more": {"a": [1, None]}},
)
_FIRST, _SECOND, _FORGED = 4211.5, 7333.25, 9977.75  # figures that nothing else has


class TrackerContract(Contract[Tracker]):
    """Checks a `Tracker`. Build one that works without a network."""

    kind = Tracker
    patience: float = 20.0
    """Seconds that `events` of `record` may take before it counts as one that blocks."""
    events: int = 200

    def recorded(self, tracker: Tracker, folder: Path) -> str | None:
        """Return all that arrived where the tracker sends it, as text, once it was closed.

        `folder` is the run's, as `begin` got it. A stand-in for a service says what it was sent.
        None for one whose events nobody can read back.
        """
        raise self.unstated(
            "recorded", "return what arrived where the tracker sends it, as text, or None"
        )

    def in_time(self, what: str, do: Callable[[], object], change: str) -> None:
        """Call something on a thread; fail where it does not return within `patience`."""
        raised: list[BaseException] = []

        def call() -> None:
            try:
                do()
            except BaseException as error:
                raised.append(error)

        thread = Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.patience)
        hold(not thread.is_alive(), what, f"it had not after {self.patience:g} s", change)
        if raised:
            raise raised[0]

    def test_it_takes_every_event_and_changes_none(self, tmp_path: Path) -> None:
        tracker = self.build()
        tracker.begin(tmp_path)
        events = deepcopy(EVENTS)
        for event in events:
            tracker.record(event)
        tracker.close()
        for event, before in zip(events, EVENTS, strict=True):
            hold(
                repr(event) == repr(before),
                "neither `record` nor `close` changes an event, which others see, too",
                f"{event} where it was {before}", "copy it first: `{**event, ...}`",
            )  # fmt: skip

    def test_it_can_be_closed_at_once(self) -> None:
        self.build().close()

    def test_it_holds_the_run_up_at_no_event(self, tmp_path: Path) -> None:
        tracker = self.build()
        tracker.begin(tmp_path)

        def record() -> None:
            for number in range(self.events):
                tracker.record({**EVENTS[1], "at": number})

        self.in_time(
            f"`record` returns at once: {self.events} events", record,
            "hand events to a thread or keep them, and send them in `close`",
        )  # fmt: skip
        self.in_time("`close` returns", tracker.close, "give up what cannot be sent")

    def test_it_keeps_what_the_event_said_when_it_came(self, tmp_path: Path) -> None:
        tracker = self.build()
        tracker.begin(tmp_path)
        event = {**EVENTS[1], "loss": _FIRST}
        tracker.record(event)
        event["loss"] = _FORGED  # the run goes on with its own object
        tracker.close()
        text = self.recorded(tracker, tmp_path)
        if text is None:
            return
        hold(
            str(_FIRST) in text,
            f"an event's figures arrive: loss {_FIRST}", f"{text[:500]!r}",
            "write the event as it is when `record` is called; do not keep the object (copy it), "
            "and flush in `close`",
        )  # fmt: skip
        hold(
            str(_FORGED) not in text,
            "what happens to an event afterwards changes nothing", f"{text[:500]!r}",
            "copy the event where it is kept",
        )  # fmt: skip

    def test_a_resumed_run_keeps_what_was_recorded(self, tmp_path: Path) -> None:
        for figure in (_FIRST, _SECOND):
            tracker = self.build()
            tracker.begin(tmp_path)
            tracker.record({**EVENTS[1], "loss": figure})
            tracker.close()
        text = self.recorded(tracker, tmp_path)
        if text is None:
            return
        for figure in (_FIRST, _SECOND):
            hold(
                str(figure) in text,
                "a run that is resumed in its folder adds to what was recorded",
                f"loss {figure} is not in {text[:500]!r}",
                "append (open with 'a', or go on with the same run of the service)",
            )
