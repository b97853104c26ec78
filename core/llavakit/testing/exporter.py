"""The contract of an exporter."""

from __future__ import annotations

from pathlib import Path

import torch

from llavakit.contracts.interfaces import Exporter
from llavakit.model.folder import save_model
from llavakit.model.llava import LlavaModel
from llavakit.testing.contract import Contract
from llavakit.testing.samples import make_picture


class ExporterContract(Contract[Exporter]):
    """Checks an `Exporter` on a small model."""

    kind = Exporter
    reads_back: bool = True  #: Whether it recognises and loads what it wrote.
    close: float = 1e-4  #: How far logits may differ.

    def model(self) -> LlavaModel:
        """Return a small model, the same each time."""
        raise AssertionError(f"{type(self).__name__} has no `model`; return a small one")

    def test_what_it_writes_is_the_same_model(self, tmp_path: Path) -> None:
        model, exporter = self.model().eval(), self.build()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        folder = tmp_path / "out"
        exporter.export(model, folder)
        assert any(folder.iterdir()), "nothing was written"
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, before[name]), f"`export` changes {name}"
        if not self.reads_back:
            return
        assert exporter.recognises(folder), (
            "`recognises` does not know what `export` wrote; where nothing reads it back, set "
            "`reads_back = False`"
        )
        loaded = exporter.load(folder, device=torch.device("cpu"), dtype=None)
        for images in ([], [make_picture()]):
            expected = model.logits("a b", images)
            torch.testing.assert_close(
                loaded.logits("a b", images), expected, atol=self.close, rtol=self.close
            )
            ids = model.generate_ids("a b", images, max_new_tokens=4)
            assert loaded.generate_ids("a b", images, max_new_tokens=4) == ids

    def test_it_recognises_by_content_and_no_other_layout(self, tmp_path: Path) -> None:
        exporter = self.build()
        named = tmp_path / f"llava-{exporter.name}-7b"
        named.mkdir()
        assert not exporter.recognises(named), "an empty folder is no model, whatever its name"
        (named / "config.json").write_text("{")
        assert not exporter.recognises(named), "a broken config.json is no model"
        save_model(self.model(), tmp_path / "native")
        assert not exporter.recognises(tmp_path / "native"), "that is a model folder of llavakit"
