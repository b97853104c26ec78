"""Components that need more than their kind's plain methods."""

from __future__ import annotations

from llavakit import hookimpl


@hookimpl
def llava_connectors() -> dict[str, str]:
    return {"placed": "llava_points.placed:Placed"}


@hookimpl
def llava_callbacks() -> dict[str, str]:
    return {"average": "llava_points.average:Average"}


@hookimpl
def llava_benchmarks() -> dict[str, str]:
    return {"likely": "llava_points.likely:Likely"}


@hookimpl
def llava_generators() -> dict[str, str]:
    return {"tagger": "llava_points.tagger:Tagger"}


@hookimpl
def llava_language_models() -> dict[str, str]:
    return {"pointing": "llava_points.pointing:Pointing"}
