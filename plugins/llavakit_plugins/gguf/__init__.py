"""GGUF: two files for llama.cpp's multimodal tools."""

from collections.abc import Mapping

from llavakit import hookimpl


@hookimpl
def llava_exporters() -> Mapping[str, str]:
    return {"gguf": "llavakit_plugins.gguf.exporter:Gguf"}
