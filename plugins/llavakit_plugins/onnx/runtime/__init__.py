"""Runs an exported ONNX folder with numpy, onnxruntime, tokenizers and Pillow; without torch.

    from llavakit_plugins.onnx.runtime import load

    model = load("exported")
    model.generate("What is in the image?", images=["photo.jpg"])

`llavakit.load` gives the same model where torch is installed.
"""

from __future__ import annotations

from llavakit_plugins.onnx.runtime.folder import recognises
from llavakit_plugins.onnx.runtime.model import OnnxModel, load

__all__ = ["OnnxModel", "load", "recognises"]
