"""What may come of one attempt to ask a service, besides a reply."""

from __future__ import annotations


class Fault(Exception):
    """One attempt that failed and may be made again."""

    def __init__(self, message: str, pause: float | None = None, busy: bool = False) -> None:
        super().__init__(message)
        self.pause = pause
        """Seconds that the service asks to wait."""
        self.busy = busy
