"""Own data on an existing model: a step starts from a folder of any layout, and others go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Command
from tests.core import processes
from tests.plugins.training.test_sharded import same

import llavakit
from llavakit import Recipe, Registry
from llavakit.cli import main
from llavakit.engine.plan import Plan, make_plan
from llavakit.model.folder import create_model, save_model
from llavakit.recipe.model_choice import ModelRecipe

LAYOUTS = ("native", "hf", "original")
SHORT = "max_steps = 2\nbatch_size = 4\nmax_length = 64\nlog_every = 1\n"
FINETUNE = f'[[steps]]\nuse = "finetune"\ntrain = {{ connector = 1e-2, language = 1e-2 }}\n{SHORT}'


@pytest.fixture(scope="module")
def folders(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One model in every layout that is read, and as ONNX."""
    root = tmp_path_factory.mktemp("layouts")
    parts: dict[str, Any] = {
        "vision": {"use": "clip", "source": str(backbones / "vision")},
        "connector": {"use": "mlp"},
        "language": {"use": "vicuna", "source": str(backbones / "language")},
        "template": {"use": "vicuna_v1", "system": ""},
    }
    model = create_model(ModelRecipe.model_validate(parts), Registry.installed(), seed=0)
    save_model(model, root / "native")
    for layout in (*LAYOUTS[1:], "onnx"):
        assert main(["export", str(root / "native"), str(root / layout), "--format", layout]) == 0
    return {layout: root / layout for layout in (*LAYOUTS, "onnx")}


@pytest.fixture
def write(tmp_path: Path, data: Path) -> Callable[..., Path]:
    """A function that writes a recipe of these steps, `DATA` being a data set, without [model]."""
    own = f'{{ use = "conversations", path = "{data}/train.json", images = "{data}/images" }}'

    def call(*steps: str, head: str = "") -> Path:
        path = tmp_path / "own.toml"
        text = "\n".join(steps).replace("DATA", own)
        path.write_text(f'name = "own"\ndevice = "cpu"\n{head}\n{text}')
        return path

    return call


def planned(path: Path) -> Plan:
    return make_plan(Recipe.load(path, Registry.installed()), Registry.installed())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_any_layout_is_trained_and_exported_without_a_model_in_the_recipe(
    layout: str,
    folders: Mapping[str, Path],
    write: Callable[..., Path],
    llava_run: Command,
    tmp_path: Path,
) -> None:
    before = bytes_of(folders[layout])
    path = write(f'{FINETUNE}init = "{folders[layout]}"\ndata = DATA', '[[steps]]\nuse = "export"')
    done = llava_run(path, "--plan")
    assert done.code == 0, done.err
    assert "finetune: vision frozen" in done.out
    (_, step), (_, export) = planned(path).steps.items()
    assert step.samples
    assert step.tflop
    assert step.memory_gb
    assert export.tflop is None
    done = llava_run(path, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert bytes_of(folders[layout]) == before
    assert (tmp_path / "run" / "model").resolve().parent.name == "02-export"
    tuned = llavakit.load(tmp_path / "run" / "model", device="cpu")
    own = llavakit.load(tmp_path / "run" / "01-finetune" / "model", device="cpu")
    first = llavakit.load(folders[layout], device="cpu")
    question = "what colour is it ?"
    assert tuned.logits(question).equal(own.logits(question))
    assert not torch.allclose(tuned.logits(question), first.logits(question), atol=1e-3)


def test_the_layouts_are_planned_and_trained_alike(
    folders: Mapping[str, Path],
    write: Callable[..., Path],
    llava_run: Command,
    tmp_path: Path,
) -> None:
    """And as the same model by a recipe's [model] is planned."""
    plans, losses = [], []
    for layout in LAYOUTS:
        path = write(f'{FINETUNE}init = "{folders[layout]}"\ndata = DATA')
        plans.append(planned(path))
        # what a layout does not keep is the system text: its template is stated
        more = "" if layout == "native" else 'template = { use = "vicuna_v1", system = "" }\n'
        path = write(f'{FINETUNE}{more}init = "{folders[layout]}"\ndata = DATA')
        assert llava_run(path, "--out", tmp_path / layout).code == 0
        lines = (tmp_path / layout / "events.jsonl").read_text().splitlines()
        losses.append([e["loss"] for e in map(json.loads, lines) if e["event"] == "train"])
    head = f"""
[model]
vision = {{ use = "clip", source = "{folders["native"]}/vision" }}
connector = {{ use = "mlp" }}
language = {{ use = "vicuna", source = "{folders["native"]}/language" }}
"""
    by_recipe = planned(write(f"{FINETUNE}data = DATA", head=head))
    native, hf, original = plans
    assert native.steps == original.steps == by_recipe.steps
    assert native.parts == original.parts == by_recipe.parts
    assert hf.visual_tokens == native.visual_tokens == 16
    # transformers' layout has rows for <image> and padding besides
    assert hf.parts["vision"] == native.parts["vision"]
    assert hf.parts["language"].parameters >= native.parts["language"].parameters
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_a_later_step_goes_on_from_what_an_earlier_one_left(
    folders: Mapping[str, Path], write: Callable[..., Path], llava_run: Command, tmp_path: Path
) -> None:
    steps = (
        f'{FINETUNE}init = "{folders["hf"]}"\ndata = DATA',
        f'[[steps]]\nuse = "pretrain"\ntrain = {{ connector = 1e-9 }}\n{SHORT}data = DATA',
        '[[steps]]\nuse = "evaluate"\nmax_new_tokens = 2\nmax_length = 64\nlosses = [DATA]',
        '[[steps]]\nuse = "export"\nformat = { use = "original" }',
    )
    path = write(*steps)
    plan = planned(path)
    assert plan.steps["02-pretrain"].memory_gb
    assert plan.parts["language"].parameters > 0
    done = llava_run(path, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    places = ("01-finetune/model", "02-pretrain/model", "04-export/original")
    first, *others = (
        llavakit.load(tmp_path / "run" / place, device="cpu").logits("what is it ?")
        for place in places
    )
    for other in others:
        assert torch.allclose(first, other, atol=1e-4)


ADAPTED = "changes = { language = { lora = { rank = 4, alpha = 8 } } }\n"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_are_given_to_a_model_of_any_layout(
    layout: str,
    folders: Mapping[str, Path],
    write: Callable[..., Path],
    llava_run: Command,
    tmp_path: Path,
) -> None:
    path = write(
        f'{FINETUNE}init = "{folders[layout]}"\n{ADAPTED}data = DATA',
        '[[steps]]\nuse = "export"\nformat = { use = "hf" }',
    )
    (step, _) = planned(path).steps.values()
    assert "of `language`," in step.note
    done = llava_run(path, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    left = tmp_path / "run" / "01-finetune" / "model"
    adapter = load_file(left / "language" / "adapter" / "adapter_model.safetensors")
    counted = sum(tensor.numel() for tensor in adapter.values())
    assert f"of `language`, {counted:,} parameters learn" in step.note
    assert max(tensor.abs().max() for name, tensor in adapter.items() if "lora_B" in name) > 0
    whole = load_file(folders["native"] / "language" / "model.safetensors")
    base = load_file(left / "language" / "model.safetensors")
    for name, tensor in whole.items():
        assert tensor.equal(base[name][: len(tensor)]), "the weights themselves do not learn"
    first, exported, own = (
        llavakit.load(folder, device="cpu").logits("what is it ?")[:, :64]
        for folder in (folders[layout], tmp_path / "run" / "02-export" / "hf", left)
    )
    assert torch.allclose(exported, own, atol=1e-4)
    assert not torch.allclose(first, own, atol=1e-3)


def test_new_adapters_depend_on_the_seed_alone(
    folders: Mapping[str, Path], write: Callable[..., Path], llava_run: Command, tmp_path: Path
) -> None:
    path = write(f'{FINETUNE}init = "{folders["hf"]}"\n{ADAPTED}data = DATA')
    found = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        out = tmp_path / str(number)
        assert llava_run(path, "--out", out, "--set", f"seed={seed}").code == 0
        file = out / "model" / "language" / "adapter" / "adapter_model.safetensors"
        found.append(file.read_bytes())
    assert found[0] == found[1] != found[2]


def test_other_options_of_a_model_can_be_changed(
    folders: Mapping[str, Path], write: Callable[..., Path], llava_run: Command, tmp_path: Path
) -> None:
    changes = 'changes = { vision = { aspect = "pad" }, language = { max_length = 96 } }\n'
    for layout in LAYOUTS:
        path = write(f'{FINETUNE}init = "{folders[layout]}"\n{changes}data = DATA')
        assert planned(path).steps["01-finetune"].samples == 8
        done = llava_run(path, "--out", tmp_path / layout)
        assert done.code == 0, done.err
        model: Any = llavakit.load(tmp_path / layout / "model", device="cpu")
        assert model.choices["vision"]["aspect"] == "pad"
        assert model.language.max_length == 96


def test_another_tiling_is_learned_and_kept(
    folders: Mapping[str, Path], write: Callable[..., Path], llava_run: Command, tmp_path: Path
) -> None:
    tiling = '{ use = "anyres", grids = [[1, 2]], video = { frames = 3 } }'
    start = f'{FINETUNE}init = "INIT"\nchanges = {{ tiling = {tiling} }}\ndata = DATA'
    for layout in LAYOUTS:
        path = write(start.replace("INIT", str(folders[layout])))
        assert planned(path).steps["01-finetune"].samples == 8
        done = llava_run(path, "--out", tmp_path / layout)
        assert done.code == 0, done.err
        model: Any = llavakit.load(tmp_path / layout / "model", device="cpu")
        assert model.tiling.name == "anyres"
        assert model.tiling.options.video.frames == 3
        assert model.image_newline is not None
    ended = processes.run_ranks(tmp_path, 2, path, "--out", tmp_path / "two", "--set", "seed=0",
                                "--set", "steps.1.shard=true")  # fmt: skip
    assert ended.code == 0, ended.said
    same(tmp_path / LAYOUTS[-1] / "model", tmp_path / "two" / "model")
    # and back: one view, without the learned row
    back = start.replace(tiling, '{ use = "single" }').replace("INIT", f"{tmp_path}/two/model")
    assert llava_run(write(back), "--out", tmp_path / "back").code == 0
    model = llavakit.load(tmp_path / "back" / "model", device="cpu")
    assert model.tiling is None
    assert model.image_newline is None
    assert "tiling" not in model.choices


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_weights_are_read_can_be_changed_of_any_layout(
    layout: str,
    folders: Mapping[str, Path],
    write: Callable[..., Path],
    llava_run: Command,
    tmp_path: Path,
) -> None:
    changes = 'changes = { language = { dtype = "bfloat16", max_length = 96 } }\n'
    path = write(f'{FINETUNE}init = "{folders[layout]}"\n{changes}data = DATA')
    done = llava_run(path, "--plan")
    assert done.code == 0, done.err
    before = bytes_of(folders[layout])
    done = llava_run(path, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert bytes_of(folders[layout]) == before
    assert {item.name for item in (tmp_path / "run" / "01-finetune").iterdir()} >= {"model"}
    assert not (tmp_path / "run" / "01-finetune" / "init").exists()
    left = tmp_path / "run" / "01-finetune" / "model"
    kinds = {tensor.dtype for tensor in load_file(left / "language/model.safetensors").values()}
    assert kinds == {torch.bfloat16}
    assert load_file(left / "vision/model.safetensors").popitem()[1].dtype == torch.float32
    assert llavakit.load(left, device="cpu").language.max_length == 96


def test_how_weights_are_read_can_be_changed_of_divided_weights(
    folders: Mapping[str, Path], write: Callable[..., Path], llava_run: Command, tmp_path: Path
) -> None:
    """The main process alone makes the whole model at the end: it must not wait for the others."""
    changes = 'changes = { language = { dtype = "float32", max_length = 96 } }\n'
    path = write(f'{FINETUNE}init = "{folders["hf"]}"\nshard = true\n{changes}data = DATA')
    ended = processes.run_ranks(tmp_path, 2, path, "--out", tmp_path / "two")
    assert ended.code == 0, ended.said
    alone = write(f'{FINETUNE}init = "{folders["hf"]}"\n{changes}data = DATA')
    assert llava_run(alone, "--out", tmp_path / "one").code == 0
    same(tmp_path / "one" / "model", tmp_path / "two" / "model")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("changes = { langauge = {} }", "a model has no part `langauge`, but vision, connector"),
        ("changes = { language = { lorra = {} } }", "unknown option `lorra` of `vicuna`"),
        ("changes = { connector = { depth = 3 } }", "cannot be changed once it is there"),
        ('changes = { tiling = { use = "anyres", gridz = 2 } }', "unknown option `gridz` of `anyr"),
        ('changes = { tiling = { use = "anyrez" } }', "did you mean `anyres`"),
        ("changes = { tiling = { frames = 2 } }", "unknown option `frames` of `single`"),
        ("changes = { tiling = { use = 3 } }", "`use` of `tiling` is a name, got 3"),
        ("changes = { language = { max_length = 16 } }", "leave it a longer context"),
        ('load = { base = "FOLDER" }', "needs no `base`; leave it out"),
        ('load = { template = "vicunna" }', "did you mean `vicuna_v1`"),
        ('load = { tempalte = "plain" }', "unknown option `tempalte`"),
    ],
)
def test_what_cannot_be_changed_is_said_by_plan_and_run_alike(
    folders: Mapping[str, Path],
    write: Callable[..., Path],
    refused: Callable[..., str],
    tmp_path: Path,
    more: str,
    sentence: str,
) -> None:
    more = more.replace("FOLDER", str(folders["hf"]))
    path = write(f'{FINETUNE}init = "{folders["hf"]}"\n{more}\ndata = DATA')
    assert sentence in refused(path, "--plan")
    assert sentence in refused(path, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (FINETUNE + "data = DATA", "`finetune` needs one: add [model], or state `init`"),
        ('[[steps]]\nuse = "export"', "`export` needs one: add [model], or state `init`"),
        ('[[steps]]\nuse = "evaluate"\nlosses = [DATA]', "`evaluate` needs one"),
        (FINETUNE + ADAPTED + "data = DATA", "`changes` is about the model that `init` names"),
        (FINETUNE + 'load = { base = "x" }\ndata = DATA', "`load` is about the model that `init`"),
        (FINETUNE + 'init = "ONNX"\ndata = DATA', "its layout keeps no weights"),
        ('[[steps]]\nuse = "export"\ninit = "ONNX"', "its layout keeps no weights"),
        (FINETUNE + 'init = "EMPTY"\ndata = DATA', "holds no model that is recognised"),
        (
            FINETUNE + 'init = "HF"\ndata = DATA\nskip = true\n[[steps]]\nuse = "export"',
            "`export` needs one",
        ),
        (
            '[[steps]]\nuse = "export"\ninit = "HF"\nformat = { use = "hf" }\n'
            + '[[steps]]\nuse = "evaluate"\nlosses = [DATA]',
            "`evaluate` needs one",
        ),
        (
            FINETUNE + 'init = "HF"\ndata = DATA\n[[steps]]\nuse = "export"\n'
            'init = "@finetune/modle"',
            "step `finetune` leaves no model `modle`: it leaves model",
        ),
    ],
)
def test_what_the_run_refuses_of_a_recipe_its_plan_refuses(
    folders: Mapping[str, Path],
    write: Callable[..., Path],
    refused: Callable[..., str],
    tmp_path: Path,
    step: str,
    sentence: str,
) -> None:
    (tmp_path / "empty").mkdir()
    for word, folder in (("ONNX", folders["onnx"]), ("HF", folders["hf"])):
        step = step.replace(word, str(folder))
    path = write(step.replace("EMPTY", str(tmp_path / "empty")))
    assert sentence in refused(path, "--plan")
    assert sentence in refused(path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_there_is_named_at_its_line(
    folders: Mapping[str, Path], write: Callable[..., Path], llava_run: Command,
    refused: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    wrong = folders["hf"].with_name("hff")
    path = write(f'{FINETUNE}init = "{wrong}"\ndata = DATA')
    done = llava_run(path, "--plan")  # it may be on the machine that will run it
    assert done.code == 0, done.err
    assert f"its model, {wrong}, is not on this machine" in done.out
    text = refused(path, "--out", tmp_path / "run")
    assert "`init`: " in text
    assert f"did you mean `{folders['hf']}`?" in text


def test_a_name_on_the_hub_is_looked_for_in_its_cache(
    folders: Mapping[str, Path],
    write: Callable[..., Path],
    llava_run: Command,
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    path = write(f'{FINETUNE}init = "lab/own"\ndata = DATA', '[[steps]]\nuse = "export"')
    text = refused(path, "--out", tmp_path / "run")
    assert "fetch them with `hf download lab/own`" in text
    done = llava_run(path, "--plan")
    assert done.code == 0, done.err
    assert "its model, lab/own, is not on this machine" in done.out
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--lab--own"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots").mkdir()
    (place / "snapshots" / commit).symlink_to(folders["hf"])
    assert planned(path).steps["01-finetune"].memory_gb
    done = llava_run(path, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "02-export" / "model" / "model.toml").is_file()
