"""Benchmarks."""

from __future__ import annotations

from llavakit import Benchmark, hookimpl


@hookimpl
def llava_benchmarks() -> list[type[Benchmark]]:
    from llavakit_plugins.benchmarks.exact_match import ExactMatch

    return [ExactMatch]
