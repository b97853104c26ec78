"""The built-in data sets, by name."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_datasets() -> Mapping[str, str]:
    return {
        "answer-pairs": "llavakit_plugins.datasets.answer_pairs:AnswerPairs",
        "conversations": "llavakit_plugins.datasets.conversations:Conversations",
        "huggingface": "llavakit_plugins.datasets.huggingface:HuggingFace",
        "mix": "llavakit_plugins.datasets.mix:Mix",
        "scienceqa": "llavakit_plugins.datasets.scienceqa:ScienceQA",
        "webdataset": "llavakit_plugins.datasets.webdataset:WebDataset",
    }
