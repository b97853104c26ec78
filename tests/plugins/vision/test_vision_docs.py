"""The encoder in docs/plugins.md works as it stands there, and an encoder takes 25 lines."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llavakit import Registry, VisionEncoder
from llavakit.testing import VisionEncoderContract, make_picture
from llavakit_plugins.vision import siglip

DOCS = Path(__file__).parents[3] / "docs" / "plugins.md"
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7, "num_register_tokens": 4,
}  # fmt: skip


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    (found,) = [block for block in blocks if "class DinoV2" in block]
    return str(found)


def plugin() -> ModuleType:
    module = ModuleType("llava_dinov2")
    exec(compile(example(), "llava_dinov2.py", "exec"), module.__dict__)
    sys.modules["llava_dinov2"] = module  # as an installed one is: pickle looks there
    return module


class TestDinoV2(VisionEncoderContract):
    options: Mapping[str, Any] = {"config": SHAPE}

    def build(self) -> VisionEncoder:
        torch.manual_seed(0)
        kind: Any = plugin().DinoV2
        encoder: VisionEncoder = kind(kind.Options(config=SHAPE))
        return encoder

    # no package is installed here; tests/core/registry/test_third_party.py installs one
    test_registered_by_an_installed_plugin = None  # type: ignore[assignment]


@pytest.mark.parametrize(("layer", "norm"), [(-2, False), (-1, True)])
def test_it_equals_transformers(tmp_path: Path, layer: int, norm: bool) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path)
    kind: Any = plugin().DinoV2
    encoder = kind.create(kind.Options(source=str(tmp_path), layer=layer, norm=norm)).eval()
    pixels = encoder.prepare(make_picture())[None]
    with torch.no_grad():
        out = model(pixels, output_hidden_states=True)
        expected = out.last_hidden_state if norm else out.hidden_states[layer]
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)


def test_it_registers() -> None:
    registry = Registry.empty()
    registry.register(plugin())
    assert list(registry.all(VisionEncoder)) == ["dinov2"]


@pytest.mark.parametrize("source", [example(), Path(siglip.__file__).read_text(encoding="utf-8")])
def test_an_encoder_takes_25_lines(source: str) -> None:
    """Lines that hold code: no blank lines, comments or docstrings."""
    lines = {node.lineno for node in ast.walk(ast.parse(source)) if hasattr(node, "lineno")}
    texts = [
        set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    assert len(lines.difference(*texts)) <= 25
