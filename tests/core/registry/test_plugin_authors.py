"""What authors of plugins get wrong is said in a sentence that names the plugin."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.conftest import Command, RecipeWriter
from tests.core.registry.test_registry import distribution, plugin_with
from torch import Tensor, nn

from llavakit import (
    Build,
    Connector,
    LlavaModel,
    ModelError,
    Options,
    PluginError,
    PromptTemplate,
    Recipe,
    Registry,
    Segment,
    Turn,
    Use,
    VisionEncoder,
    hookimpl,
)
from llavakit.model.folder import create_model, load_model, save_model, sketch_model
from llavakit.testing import VisionEncoderContract
from llavakit_plugins.connectors.mlp import Linear

REGISTRY = Registry.installed()


# -- components ------------------------------------------------------------------------------------


class Plain(PromptTemplate):
    """A component with neither options nor an `__init__`."""

    name = "plain-text"

    def segments(self, turns: Sequence[Turn], tokenizer: Any) -> Sequence[Segment]:
        return [Segment(turn.text, supervised=turn.role == "gpt") for turn in turns]


def registry_with(hook: str, *components: Any) -> Registry:
    def found(self: object) -> list[Any]:
        return list(components)

    found.__name__ = hook
    registry = Registry.empty()
    registry.register(type("Plugin", (), {hook: hookimpl(found)})(), name="mine")
    return registry


def test_a_component_needs_no_init() -> None:
    registry = registry_with("llava_prompt_templates", Plain)
    template = registry.build(Use[PromptTemplate](use="plain-text"))
    assert vars(template) == {"options": Options()}


class Headless(Connector):
    name = "headless"


class Loose(Linear):
    name = "loose"
    Options = dict  # type: ignore[assignment]


class Renamed(Linear):
    name = "renamed"

    def __init__(self, options: Any, *, vision_dim: int, language_dim: int) -> None:
        super().__init__(options, vision_width=vision_dim, language_width=language_dim)


@pytest.mark.parametrize(
    ("component", "sentence"),
    [
        (Headless, r"Headless of mine lacks `forward`, which every Connector has"),
        (Loose, r"`Options` of .*Loose of mine must derive from llavakit.Options"),
    ],
)
def test_what_is_not_whole_is_refused(component: type[Connector], sentence: str) -> None:
    registry = Registry.empty()
    registry.register(plugin_with(component), name="mine")
    with pytest.raises(PluginError, match=sentence):
        registry.get(Connector, component.name)


def test_another_signature_is_named() -> None:
    registry = registry_with("llava_connectors", Renamed)
    with pytest.raises(PluginError, match=r"Renamed is built as Renamed\(options, vision_width=, "):
        registry.build(Use[Connector](use="renamed"), vision_width=1, language_width=1)


def test_a_function_named_as_a_hook_without_its_mark_is_named() -> None:
    class Plugin:
        def llava_connectors(self) -> list[Any]:
            return [Linear]

    with pytest.raises(PluginError, match="`llava_connectors` that is no hook; write @hookimpl"):
        Registry.empty().register(Plugin(), name="mine")


@pytest.mark.parametrize("returned", [None, Linear])
def test_a_hook_returns_a_list(returned: Any) -> None:
    class Plugin:
        @hookimpl
        def llava_connectors(self) -> Any:
            return returned

    registry = Registry.empty()
    registry.register(Plugin(), name="mine")
    with pytest.raises(PluginError, match=r"its hook returned .*; return a list of classes"):
        registry.all(Connector)


# -- shapes ----------------------------------------------------------------------------------------


@pytest.fixture
def model(write_recipe: RecipeWriter) -> LlavaModel:
    recipe = Recipe.load(write_recipe(), REGISTRY)
    return create_model(recipe.parts(), REGISTRY, seed=0).eval()


def asked(model: LlavaModel) -> str:
    with pytest.raises(ModelError) as caught:
        model.logits("what is it ?", [Image.new("RGB", (9, 9))])
    return str(caught.value)


@pytest.mark.parametrize("more", [(0, 1), (1, 0)])
def test_a_connector_of_other_shapes_is_named(model: LlavaModel, more: tuple[int, int]) -> None:
    class Wrong(Connector):
        name = "wrong"

        def forward(self, features_BPD: Tensor) -> Tensor:
            images, patches, _ = features_BPD.shape
            return torch.zeros(images, patches + more[0], 48 + more[1])

    model.connector = Wrong()
    given = (1, 16 + more[0], 48 + more[1])
    assert f"`wrong` gave {given} where (1, 16, 48) was expected" in asked(model)


def test_an_encoder_of_another_width_is_named(model: LlavaModel) -> None:
    model.vision.width += 1
    assert "`clip` gave features of width 32, but says 33; fix `width`" in asked(model)


def test_an_encoder_that_prepares_another_shape_is_named(
    model: LlavaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def channels_last(self: VisionEncoder, image: Image.Image) -> Tensor:
        return torch.zeros(self.image_size, self.image_size, 3)

    monkeypatch.setattr(type(model.vision), "prepare", channels_last)
    assert "`clip` prepares an image as (32, 32, 3), but its `image_size` says" in asked(model)


# -- contracts -------------------------------------------------------------------------------------


CONTRACTS = """\
from llavakit.testing import ConnectorContract, ExporterContract

class TestNothing(ConnectorContract):
    pass

class TestModelless(ExporterContract):
    def build(self):
        return None
"""


def test_a_contract_that_is_not_filled_in_fails_rather_than_being_passed_over(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_mine.py").write_text(CONTRACTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "TestNothing has no `build`" in done.stdout
    assert "TestModelless has no `model`" in done.stdout
    assert "passed" not in done.stdout


# -- in a run --------------------------------------------------------------------------------------

PACKAGE = """\
from llavakit import Exporter, Options, Outcome, Step, Tracker, hookimpl
from llavakit.recipe.files import new_folder

class Figures(Options):
    what: str

class Work(Step):
    name = "work"
    Options = Figures

    def run(self, run):
        import numpy as np
        values = {
            "number": Outcome({"value": np.float32(0.5), "count": np.int64(3)}),
            "text": Outcome({"value": "many"}),
            "nothing": None,
        }
        (run.directory / "file").write_text("made")
        return values[self.options.what]

class Lost(Tracker):
    name = "lost"

    def record(self, event):
        if event["event"] == "done":
            raise ConnectionError("no network")

    def close(self):
        raise AssertionError("it is told nothing more")

class Written(Exporter):
    name = "written"

    def export(self, model, folder):
        with new_folder(folder) as partial:
            (partial / "weights").write_bytes(b"1234")
        return {"difference": 0.0}

@hookimpl
def llava_steps():
    return [Work]

@hookimpl
def llava_trackers():
    return [Lost]

@hookimpl
def llava_exporters():
    return [Written]
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    distribution(site, "llava-authors", "llava_authors", PACKAGE)
    yield
    sys.modules.pop("llava_authors", None)


def metrics(run: Path, step: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((run / step / "artifact.json").read_text())["metrics"]
    return found


@pytest.mark.usefixtures("package")
def test_numbers_of_numpy_are_numbers_and_a_tracker_that_fails_ends_no_run(
    tmp_path: Path, llava_run: Command, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'trackers = [{ use = "lost" }]\nsteps = [{ use = "work", what = "number" }, '
        '{ use = "work", what = "number" }]'
    )
    code, _, err = llava_run(path, "--out", tmp_path / "run")
    assert code == 0, err
    assert metrics(tmp_path / "run", "02-work") == {"value": 0.5, "count": 3}
    told = [record for record in caplog.records if "tracker `lost` failed" in record.message]
    assert len(told) == 1
    assert told[0].exc_info
    assert "no network" in str(told[0].exc_info[1])


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("text", "step `work` reports 'many' as its metric `value`; report a number"),
        ("nothing", "step `work` returned NoneType from `run`; return an Outcome"),
    ],
)
def test_a_step_that_reports_no_numbers_is_named_and_not_done(
    tmp_path: Path, llava_run: Command, what: str, sentence: str
) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'steps = [{{ use = "work", what = "{what}" }}]')
    for _ in range(2):  # the second time as the first
        code, _, err = llava_run(path, "--out", tmp_path / "run")
        assert code == 2
        assert sentence in err
    assert not (tmp_path / "run" / "01-work" / "artifact.json").exists()


@pytest.mark.usefixtures("package")
def test_a_layout_that_is_only_written_can_be_exported_and_the_model_tried(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, data: Path
) -> None:
    path = write_recipe()
    own = f'{{ use = "conversations", path = "{data}/train.json", images = "{data}/images" }}'
    path.write_text(
        path.read_text()
        + f'\n[[steps]]\nuse = "export"\nformat = {{ use = "written" }}\ncount = 2\ntries = {own}'
    )
    run = tmp_path / "run"
    code, _, err = llava_run(path, "--out", run, "--set", "steps.1.skip=true")
    assert code == 0, err
    assert metrics(run, "03-export")["bytes"] == 4
    assert "The model&#39;s answers" in (run / "report.html").read_text()
    assert (run / "model").resolve() == run / "02-finetune" / "model"


# -- networks made of others -----------------------------------------------------------------------


class FusedOptions(Options):
    parts: tuple[Use[VisionEncoder], ...]


class Fused(VisionEncoder):
    """Features of several encoders side by side; each prepares the image in its own way."""

    name = "fused"
    Options = FusedOptions

    def __init__(self, options: FusedOptions, *, build: Build) -> None:
        super().__init__()
        self.parts = nn.ModuleList(build(use) for use in options.parts)
        self.encoders: list[Any] = list(self.parts)
        self.width = sum(part.width for part in self.encoders)
        self.image_size = max(part.image_size for part in self.encoders)
        self.channels = 3 * len(self.encoders)

    def tokens(self, image_size: int) -> int:
        count: int = self.encoders[0].tokens(image_size)
        return count

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.cat([part.prepare(image) for part in self.encoders])

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        own = zip(self.encoders, pixels_BCHW.split(3, dim=1), strict=True)
        return torch.cat([part(pixels)[:, part.prefix_tokens :] for part, pixels in own], dim=-1)


FUSED = """\
from llavakit import VisionEncoder, hookimpl
from tests.core.registry.test_plugin_authors import Fused

@hookimpl
def llava_vision_encoders():
    return [Fused]
"""


@pytest.fixture
def fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbones: Path
) -> Iterator[dict[str, Any]]:
    """A choice of two pretrained encoders, one of them padding the image."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    distribution(site, "llava-fused", "llava_fused", FUSED)
    source = str(backbones / "vision")
    yield {
        "use": "fused",
        "parts": [
            {"use": "clip", "source": source},
            {"use": "clip", "source": source, "aspect": "pad", "layer": -1},
        ],
    }
    sys.modules.pop("llava_fused", None)


def test_a_network_made_of_others_has_their_pretrained_weights(
    fused: dict[str, Any], backbones: Path
) -> None:
    registry = Registry.installed()
    alone: Any = registry.build(Use[VisionEncoder].model_validate(fused["parts"][0]))
    theirs = load_file(backbones / "vision" / "model.safetensors")
    name = next(name for name in theirs if name.endswith("fc1.weight"))
    assert any(
        weight.shape == theirs[name].shape and torch.equal(weight, theirs[name])
        for weight in alone.state_dict().values()
    )
    whole: Any = registry.build(Use[VisionEncoder].model_validate(fused)).eval()
    for part in whole.encoders:
        assert all(
            torch.equal(weight, alone.state_dict()[key])
            for key, weight in part.state_dict().items()
            if key in alone.state_dict()
        )
    picture = Image.new("RGB", (40, 20), "red")
    pixels = whole.prepare(picture)
    assert pixels.shape == (6, 32, 32)
    assert torch.equal(pixels[:3], alone.prepare(picture))
    assert not torch.equal(pixels[:3], pixels[3:]), "the second pads"


def test_a_model_with_it_is_planned_made_saved_and_loaded(
    fused: dict[str, Any], write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    path = write_recipe()
    registry = Registry.installed()
    recipe = Recipe.load(path, registry).parts()
    recipe = recipe.model_copy(update={"vision": Use[VisionEncoder].model_validate(fused)})
    sketch = sketch_model(recipe, registry)
    assert {p.device.type for p in sketch.vision.parameters()} == {"meta"}
    model = create_model(recipe, registry, seed=0).eval()
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", registry).eval()
    image = Image.new("RGB", (40, 20), "blue")
    asked = model.logits("what is it ?", [image])
    assert torch.equal(loaded.logits("what is it ?", [image]), asked)


def test_a_recipe_with_it_is_planned_trained_resumed_and_used(
    fused: dict[str, Any],
    write_recipe: RecipeWriter,
    llava_run: Command,
    tmp_path: Path,
    data: Path,
    backbones: Path,
) -> None:
    """Through the command line, and then away from the folders that its parts were read from."""
    path, run = write_recipe(("epochs = 2", "max_steps = 4")), tmp_path / "run"
    table = tomllib.loads(path.read_text())
    table["model"]["vision"] = fused
    losses = {"use": "conversations", "path": f"{data}/train.json", "images": f"{data}/images"}
    table["steps"].append({"use": "evaluate", "max_new_tokens": 2, "losses": [losses]})
    path.write_text(tomli_w.dumps(table))
    code, out, err = llava_run(path, "--plan")
    assert code == 0, err
    assert "fused" in out
    code, _, err = llava_run(path, "--out", run)
    assert code == 0, err
    tuned = run / "02-finetune"
    before = {f.name: f.read_bytes() for f in (tuned / "model").rglob("*.safetensors")}
    (tuned / "artifact.json").unlink()
    shutil.rmtree(tuned / "model")
    for left in (tuned / "checkpoints").glob("*"):
        assert left.name.startswith("step-")
    code, _, err = llava_run(path, "--out", run, "--resume")
    assert code == 0, err
    assert {f.name: f.read_bytes() for f in (tuned / "model").rglob("*.safetensors")} == before
    picture = tmp_path / "blue.png"
    Image.new("RGB", (40, 20), "blue").save(picture)
    code, answer, err = llava_run(
        "chat", run / "model", "--image", picture, "--prompt", "what is it ?"
    )
    assert code == 0, err
    loaded = load_model(run / "model", Registry.installed()).eval()
    asked = loaded.logits("what is it ?", [picture])
    backbones.rename(backbones.with_name("elsewhere"))
    try:
        again = load_model(run / "model", Registry.installed()).eval()
        assert torch.equal(again.logits("what is it ?", [picture]), asked)
        command = ("chat", run / "model", "--image", picture, "--prompt", "what is it ?")
        assert llava_run(*command).out == answer
    finally:
        backbones.with_name("elsewhere").rename(backbones)


class TestFused(VisionEncoderContract):
    @pytest.fixture(autouse=True)
    def _installed(self, fused: dict[str, Any]) -> None:
        self.options = {"parts": fused["parts"]}

    def build(self) -> VisionEncoder:
        use = Use[VisionEncoder].model_validate({"use": "fused", **self.options})
        return Registry.installed().build(use)
