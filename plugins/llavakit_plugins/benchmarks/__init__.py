"""Benchmarks."""

from __future__ import annotations

from llavakit import Benchmark, hookimpl


@hookimpl
def llava_benchmarks() -> list[type[Benchmark]]:
    from llavakit_plugins.benchmarks.exact_match import ExactMatch
    from llavakit_plugins.benchmarks.facts import Facts
    from llavakit_plugins.benchmarks.llava_bench import LlavaBench
    from llavakit_plugins.benchmarks.pope import Pope
    from llavakit_plugins.benchmarks.scienceqa import ScienceQA
    from llavakit_plugins.benchmarks.vqa import Vqa

    return [ExactMatch, Facts, LlavaBench, Pope, ScienceQA, Vqa]
