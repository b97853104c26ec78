"""What an ONNX folder cannot hold of videos; test_onnx_tiled has what it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.plugins.onnx_models import make_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from llavakit import Exporter, ModelError, Registry, Use

TILING = {"use": "anyres", "grids": [[1, 2]], "video": {"frames": 3}}


def exporter() -> Exporter:
    use: dict[str, Any] = {"use": "onnx", "precisions": ["fp32"]}
    return Registry.installed().build(Use[Exporter].model_validate(use))


def test_pooling_between_encoder_and_connector_is_refused(tmp_path: Path) -> None:
    video = {"pool": "average", "pool_features": True, "newline": "none"}
    model = make_model(tiling={**TILING, "video": video})
    for call in (exporter().check, lambda model: exporter().export(model, tmp_path / "onnx")):
        with pytest.raises(ModelError, match="pools the features of videos in front of the conn"):
            call(model)
    assert not (tmp_path / "onnx").exists()
