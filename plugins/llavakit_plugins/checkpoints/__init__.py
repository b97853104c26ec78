"""Reads and writes checkpoints in the layouts of Hugging Face and of the original LLaVA."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_exporters() -> Mapping[str, str]:
    return {
        "hf": "llavakit_plugins.checkpoints.hf:Hf",
        "original": "llavakit_plugins.checkpoints.original:Original",
    }
