"""The options of the step `generate`."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

from pydantic import Field, ValidationInfo, field_validator

from llavakit import Generator, InputPath, LlavaError, Options, Registry, Use
from llavakit.contracts.data import RESPONSE_KINDS, ResponseKind

_INSTALLED = cache(Registry.installed)  # looked through once


def known_kinds(use: Use[Generator] | None) -> tuple[ResponseKind, ...]:
    """Return the sorts of response that a generator writes; the paper's where it is not known."""
    if use is not None:
        with suppress(LlavaError):  # one that is not there is told of at its own line
            return tuple(_INSTALLED().get(Generator, use.use).kinds)
    return RESPONSE_KINDS


class GenerateOptions(Options):
    """Options of a step that generates instruction data from contexts."""

    contexts: InputPath
    """Captions and boxes: one JSON object per line, or COCO's `captions_*.json`."""
    instances: InputPath | None = None
    """COCO's `instances_*.json`, if `contexts` are COCO's captions."""
    held_out: InputPath | None = None
    """Contexts whose data go to `held-out/`, for validation."""
    images: InputPath | None = None
    """The images' folder: for the report, and for a generator that shows them to its chat model."""
    generator: Use[Generator]
    kinds: tuple[ResponseKind, ...] = Field(default=None, min_length=1, validate_default=True)
    """The sorts of response to write; by default all that the generator knows."""
    counts: dict[ResponseKind, int] = Field(default_factory=dict)
    """Number of contexts for each kind, drawn at random; by default all contexts."""
    concurrency: int = Field(default=16, ge=1)
    """Requests to a chat model that are in flight at once."""
    attempts: int = Field(default=3, ge=1)
    """Most requests for one item, until a reply can be used."""
    budget_usd: float | None = Field(default=None, gt=0)
    """Most that the chat model may cost, in USD."""
    shard: str | None = Field(default=None, pattern=r"^[1-9][0-9]{0,5}/[1-9][0-9]{0,5}$")
    """"2/8" takes the second of eight shares of the contexts, for several runs of one job."""
    join: tuple[InputPath, ...] = ()
    """Folders that this step left in the runs of its shares: their replies are taken over."""

    @field_validator("shard")
    @classmethod
    def _within(cls, shard: str | None) -> str | None:
        if shard is not None:
            number, count = map(int, shard.split("/"))
            if number > count:
                raise ValueError(f"there is no share {number} of {count}; they are 1/{count} to "
                                 f"{count}/{count}")  # fmt: skip
        return shard

    def share(self, total: int) -> range:
        """Return the indices of the contexts that this run takes: neighbours, in their order."""
        number, count = map(int, (self.shard or "1/1").split("/"))
        return range(total * (number - 1) // count, total * number // count)

    @field_validator("kinds", mode="before")
    @classmethod
    def _all_of_the_generators(cls, kinds: object, info: ValidationInfo) -> object:
        return known_kinds(info.data.get("generator")) if kinds is None else kinds

    @field_validator("kinds")
    @classmethod
    def _known_to_the_generator(
        cls, kinds: tuple[ResponseKind, ...], info: ValidationInfo
    ) -> tuple[ResponseKind, ...]:
        known = known_kinds(info.data.get("generator"))
        for kind in kinds:
            if kind not in known:
                raise ValueError(
                    f"the generator writes no `{kind:.50}`; it writes {', '.join(known)}"
                )
        return kinds

    @field_validator("counts")
    @classmethod
    def _of_kinds(
        cls, counts: dict[ResponseKind, int], info: ValidationInfo
    ) -> dict[ResponseKind, int]:
        for kind in counts:
            if kind not in info.data.get("kinds", RESPONSE_KINDS):
                raise ValueError(f"`{kind}` is not among `kinds`; add it there or take it out here")
        return counts
