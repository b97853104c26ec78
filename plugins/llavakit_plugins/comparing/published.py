"""What the paper has beside a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Published(BaseModel):
    """A figure of the paper that a recipe is the miniature of; `llava-run compare` shows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    """Where the paper has it; only figures of one table are compared."""
    metric: str
    """Which metric of ours stands beside it, as `step.metric`."""
    value: float
