"""Each connector in a recipe: it trains and answers, or is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import LANGUAGE, VISION, Command, RecipeWriter

import llavakit
from llavakit.testing import make_picture

MLP = '{ use = "mlp" }'


@pytest.mark.parametrize(
    ("connector", "tokens"),
    [
        ('{ use = "pool", grid = 3, depth = 3 }', 9),
        ('{ use = "pool", grid = 2, depth = 1 }', 4),
        ('{ use = "mlp", depth = 3 }', 16),
        ('{ use = "linear" }', 16),
    ],
)
def test_it_trains_and_answers(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, connector: str, tokens: int
) -> None:
    code, _, err = llava_run(write_recipe((MLP, connector)), "--out", tmp_path / "run")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["visual_tokens"] == tokens
    learns_and_answers(tmp_path / "run")


def learns_and_answers(run: Path) -> None:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert losses[-1] < losses[0]
    model = llavakit.load(run / "model")
    ids = [
        model.generate_ids("what colour is it ?", [make_picture(seed)], max_new_tokens=4)
        for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1]
    assert 1 <= len(ids[2]) <= 4


def test_identity_trains_the_language_model_and_answers(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    equal = same_width()
    path = write_recipe(
        (MLP, '{ use = "identity" }'),
        ('use = "clip"\n', f'use = "clip"\nlayer = -2\nconfig = {equal}\n'),
        ("train = { connector = 1e-2 }", "train = { language = 1e-2 }"),
        ("train = { connector = 1e-2, language = 1e-2 }", "train = { language = 1e-2 }"),
    )
    text = "\n".join(line for line in path.read_text().splitlines() if "/vision" not in line)
    path.write_text(text)
    code, _, err = llava_run(path, "--out", tmp_path / "run")
    assert code == 0, err
    learns_and_answers(tmp_path / "run")


def same_width() -> str:
    shape = VISION | {"hidden_size": LANGUAGE["hidden_size"]}
    return "{ " + ", ".join(f"{key} = {value}" for key, value in shape.items()) + " }"


@pytest.mark.parametrize(
    ("connector", "vision", "sentence"),
    [
        ('{ use = "identity" }', "layer = -2", "`identity` needs equal widths"),
        ('{ use = "pool", grid = 12 }', "layer = -2", "choose `grid` up to 4"),
        ('{ use = "pool", grid = 2 }', 'select = "cls_patch"', "an image has 17 visual tokens"),
        ('{ use = "linear" }', "layer = 9", "`clip` has 3 layers"),
    ],
)
@pytest.mark.parametrize("plan", [True, False])
def test_parts_that_do_not_fit_are_refused_before_anything_runs(
    write_recipe: RecipeWriter,
    llava_run: Command,
    tmp_path: Path,
    connector: str,
    vision: str,
    sentence: str,
    plan: bool,
) -> None:
    path = write_recipe((MLP, connector), ('use = "clip"\n', f'use = "clip"\n{vision}\n'))
    arguments: list[object] = [path, "--out", tmp_path / "run", *(["--plan"] if plan else [])]
    code, _, err = llava_run(*arguments)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert not list((tmp_path / "run").glob("01-*"))


def test_an_image_longer_than_the_context_is_refused(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    shape = "image_size = 32, patch_size = 2, hidden_size = 32, intermediate_size = 64"
    change = f"config = {{ {shape}, num_hidden_layers = 1, num_attention_heads = 2 }}"
    path = write_recipe(('use = "clip"\n', f'use = "clip"\n{change}\n'))
    path.write_text("\n".join(row for row in path.read_text().splitlines() if "/vision" not in row))
    code, _, err = llava_run(path, "--out", tmp_path / "run")
    assert code == 2
    assert "one image takes 256 tokens, but `vicuna` reads at most 256" in err
    again = path.read_text().replace(MLP, '{ use = "pool", grid = 4 }')
    path.write_text(again)
    code, out, err = llava_run(path, "--plan")
    assert code == 0, err
    assert "16 tokens an image" in out


def test_a_step_cannot_train_what_has_no_weights(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path
) -> None:
    equal = same_width()
    path = write_recipe(
        (MLP, '{ use = "identity" }'), ('use = "clip"\n', f'use = "clip"\nconfig = {equal}\n')
    )
    path.write_text("\n".join(row for row in path.read_text().splitlines() if "/vision" not in row))
    code, _, err = llava_run(path, "--plan")
    assert code == 2
    assert "`connector` has no parameters that learn; take it out of `train`" in err
