"""ONNX: a folder that other people's programs load, with a proof that it is the same model."""
