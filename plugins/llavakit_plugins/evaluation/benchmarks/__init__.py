"""Benchmarks."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_benchmarks() -> Mapping[str, str]:
    return {
        "exact-match": "llavakit_plugins.evaluation.benchmarks.exact_match:ExactMatch",
        "facts": "llavakit_plugins.evaluation.benchmarks.facts:Facts",
        "llava-bench": "llavakit_plugins.evaluation.benchmarks.llava_bench:LlavaBench",
        "pope": "llavakit_plugins.evaluation.benchmarks.pope:Pope",
        "scienceqa": "llavakit_plugins.evaluation.benchmarks.scienceqa:ScienceQA",
        "vqa": "llavakit_plugins.evaluation.benchmarks.vqa:Vqa",
    }
