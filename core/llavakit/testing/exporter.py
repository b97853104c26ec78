"""The contract of an exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llavakit.contracts.interfaces import Exporter
from llavakit.model.folder import save_model
from llavakit.model.llava import LlavaModel
from llavakit.testing.contract import Contract, hold, holding
from llavakit.testing.network import hold_close
from llavakit.testing.samples import make_picture


class ExporterContract(Contract[Exporter]):
    """Checks an `Exporter` on a small model."""

    kind = Exporter
    reads_back: bool = True  #: Whether it recognises and loads what it wrote.
    close: float = 1e-4  #: How far logits may differ.

    def model(self) -> LlavaModel:
        """Return a small model, the same each time."""
        raise AssertionError(f"{type(self).__name__} has no `model`; return a small one")

    def _written(self, model: LlavaModel, folder: Path) -> Exporter:
        exporter = self.build()
        with holding("`export` writes the model", "fix `export`, or `check` for its sentence"):
            exporter.export(model, folder)
        return exporter

    def _read(self, exporter: Exporter, folder: Path, dtype: torch.dtype | None = None) -> Any:
        with holding("`load` reads what `export` wrote", "fix `load`, or `reads_back = False`"):
            return exporter.load(folder, device=torch.device("cpu"), dtype=dtype)

    def _compare(self, loaded: Any, model: LlavaModel, promise: str, change: str) -> None:
        for images in ([], [make_picture()]):
            expected = model.logits("a b", images)
            hold_close(
                loaded.logits("a b", images), expected, f"{promise}: its logits", change,
                atol=self.close, rtol=self.close,
            )  # fmt: skip

    def test_what_it_writes_is_the_same_model(self, tmp_path: Path) -> None:
        model = self.model().eval()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        folder = tmp_path / "out"
        exporter = self._written(model, folder)
        hold(
            folder.is_dir() and any(folder.iterdir()),
            "files in the folder that is handed over", "nothing was written", "write to `folder`",
        )  # fmt: skip
        for name, weight in model.state_dict().items():
            hold(
                torch.equal(weight, before[name]),
                "`export` leaves the model as it is", f"it changes {name}", "work on a copy",
            )  # fmt: skip
        if not self.reads_back:
            return
        hold(
            exporter.recognises(folder),
            "`recognises` knows what `export` wrote", "it does not",
            "fix it; where nothing reads the layout back, set `reads_back = False`",
        )  # fmt: skip
        loaded = self._read(exporter, folder)
        change = "write every weight and option, and read them"
        self._compare(loaded, model, "what comes back is the same model", change)
        for images in ([], [make_picture()]):
            ids = model.generate_ids("a b", images, max_new_tokens=4)
            found = loaded.generate_ids("a b", images, max_new_tokens=4)
            hold(found == ids, f"the same answer, {ids}", found, change)

    def test_it_loads_in_the_precision_that_is_asked_for(self, tmp_path: Path) -> None:
        if not self.reads_back:
            return
        folder = tmp_path / "out"
        exporter = self._written(self.model().eval(), folder)
        for dtype in (torch.float32, torch.bfloat16):
            loaded = self._read(exporter, folder, dtype)
            if not isinstance(loaded, nn.Module):
                return  # it runs elsewhere, in the precision that it was written in
            other = sorted(
                {str(p.dtype) for p in loaded.parameters() if p.is_floating_point()} - {str(dtype)}
            )
            hold(
                not other,
                f"`load(dtype={dtype})` gives weights of this precision", ", ".join(other),
                "hand `dtype` on to what reads the weights, or cast them",
            )  # fmt: skip

    def test_it_recognises_by_content_and_no_other_layout(self, tmp_path: Path) -> None:
        exporter = self.build()
        named, native = tmp_path / f"llava-{exporter.name}-7b", tmp_path / "native"
        named.mkdir()
        save_model(self.model(), native)
        change = "look for a file that this layout alone has, and read what is in it"
        for folder, what in (
            (named, "an empty folder, whatever its name"),
            (named, "a broken config.json"),
            (native, "a model folder of llavakit's own"),
        ):
            with holding("`recognises` says yes or no of any folder", change):
                found = exporter.recognises(folder)
            hold(not found, f"{what} is in no other layout", "`recognises` says it is", change)
            (named / "config.json").write_text("{")
