"""Values of any shape, at any key of any built-in recipe: a recipe, or a RecipeError."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from llavakit import Recipe, RecipeError, Registry
from llavakit.engine.step_folders import record_of
from llavakit.recipe.recipe import find_recipe, read_tables, recipe_folder

REGISTRY = Registry.installed()
TINY = find_recipe("tiny")
DIGITS = "9" * 310


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(TINY, REGISTRY, overrides, inputs=True)
    return str(caught.value)


# -- values that were not foreseen -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("seed=[1,2]", "option `seed`: input should be a valid integer"),
        ("name=['x']", "option `name`: input should be a valid string"),
        ("use=['scenes']", "unknown option `use`"),
        ("use={use='scenes'}", "unknown option `use`"),
        ("device=['cpu']", "option `device`: input should be a valid string"),
        ("machine.tflops=[1]", "option `tflops`: input should be a valid number"),
        ("steps.finetune.epochs=[1]", "option `epochs` of `finetune`: input should be a valid int"),
        ("steps.finetune.clip=[1.0]", "option `clip` of `finetune`: input should be a valid num"),
        ("steps.finetune.use=['x']", "option `use`: input should be a valid string"),
        ("steps=[{use=['scenes']}]", "option `use`: input should be a valid string"),
        ("steps.finetune.data={use=[1]}", "option `use` of `finetune`: input should be a valid st"),
        ("model.vision.use=['clip']", "option `use`: input should be a valid string"),
        ("model.language.dtype=['float32']", "option `dtype` of `vicuna`: input should be"),
        ("model.language.lora=[1]", "option `lora` of `vicuna` is a table"),
        (f"name={'x' * 300}", "option `name`: it names the run's folder"),
        (f"seed={DIGITS}", "option `seed`: an integer of TOML has 64 bits at most"),
        (f"steps.finetune.micro_batch_tokens={DIGITS}", "`micro_batch_tokens`: an integer of TOML"),
        (f"model.vision.config.layers=[{{a={DIGITS}}}]", "`a`: an integer of TOML has 64 bits"),
        (f"steps.finetune.epochs={'9' * 5000}", "option `epochs` of `finetune`: unable to parse"),
        ("steps.finetune.epochs=1e300", "option `epochs` of `finetune`: unable to parse"),
        (f"seed={'[' * 5000}{']' * 5000}", "option `seed`: input should be a valid integer"),
        (f"model.vision.config{'.a' * 3000}=1", "nested too deeply"),
        (f"steps.finetune.init='{'x' * 300}'", "`init` of `finetune`: no file can have this name"),
        (f"steps.finetune.init='{'é' * 200}'", "`init` of `finetune`: no file can have this name"),
        (f"steps.finetune.init='{'x/' * 9000}'", "no file can have this name"),
        (
            'steps.finetune.data.path="a\\u0000b"',
            "`path` of `conversations`: no file can have",
        ),
    ],
)
def test_a_value_of_another_shape_is_one_problem_at_its_key(change: str, sentence: str) -> None:
    assert sentence in refusal(change)


@pytest.mark.parametrize(
    "change",
    [
        f"name='{'/' * 100_000}'",
        f"seed='{'x' * 100_000}'",
        f"steps.finetune.{'a' * 100_000}=1",
        f"steps.{'a' * 100_000}.epochs=1",
        f"device='{'x' * 100_000}'",
        f"model.vision.use='{'x' * 100_000}'",
        "x" * 100_000,
    ],
)
def test_a_value_of_any_length_is_cut_in_the_message(
    change: str, refused: Any, tmp_path: Path
) -> None:
    text = refused(TINY, "--plan", "--set", change)
    assert max(map(len, text.splitlines())) < 1200
    assert len(text) < 6000


def test_a_long_line_of_a_file_is_shown_around_the_key(tmp_path: Path) -> None:
    filler = ", ".join(f"k{number} = 1" for number in range(2000))
    path = tmp_path / "r.toml"
    path.write_text(f'base = "tiny"\nmachine = {{ {filler}, devices = "many" }}\n')
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, REGISTRY)
    (part,) = [p for p in str(caught.value).split("\n\n") if "option `devices`" in p]
    line, caret = part.splitlines()[2:4]
    place = caret.index("^")
    assert line[place : place + len("devices")] == "devices"
    assert len(part) < 1000


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000 + ".toml", "a\0b"])
def test_names_of_recipes_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps({"base": name}))
    with pytest.raises(RecipeError):
        Recipe.load(path, REGISTRY)


@pytest.mark.parametrize("text", ["seed = " + "9" * 5000, "seed = " + "[" * 5000 + "]" * 5000])
def test_files_that_python_cannot_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="is not valid TOML"):
        Recipe.load(path, REGISTRY)


def test_a_long_text_among_the_options_is_no_file_and_no_error(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    text = "Describe it. " * 40  # as a prompt of one's own is: more than a name may have
    step = {"use": "generate", "contexts": str(TINY), "generator": {"use": "offline"}}
    path.write_text(tomli_w.dumps({"steps": [step]}))
    recipe = Recipe.load(path, REGISTRY)
    told = recipe.steps[0].model_validate({**step, "note": text})  # as a plugin's option may be
    record = record_of(recipe.model_copy(update={"steps": (told,)}), "01-generate")
    assert record["files"].keys() == {str(TINY)}


def test_steps_beside_a_base_are_refused_at_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('base = "tiny"\n\n[[steps]]\nuse = "export"\n')
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, REGISTRY)
    assert f"{path}:3: [[steps]] would replace all steps of `base`" in str(caught.value)
    assert "[steps.NAME]" in str(caught.value)
    path.write_text('base = "tiny"\nsteps = []\n')
    with pytest.raises(RecipeError, match="would replace all steps"):
        Recipe.load(path, REGISTRY)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("model.vision.config.num_hidden_layers=1000003", "no model has more than 1000"),
        ("model.language.config.num_hidden_layers=1000003", "no model has more than 1000"),
        ("machine.tflops=1e-308", "option `tflops`: input should be greater than 0.000001"),
    ],
)
def test_a_plan_that_would_never_end_is_refused(change: str, sentence: str, refused: Any) -> None:
    sets = ("--set", "machine.tflops=1", "--set", change)
    assert sentence in refused(TINY, "--plan", *sets)


# -- any value at any key --------------------------------------------------------------------------

Key = tuple[str | int, ...]


def keys_in(node: Any, key: Key = ()) -> Iterator[Key]:
    if key:
        yield key
    if isinstance(node, dict | list):
        for name, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from keys_in(item, (*key, name))


PLACES = [
    (file, key)
    for file in sorted(recipe_folder().rglob("*.toml"))
    for key in keys_in(read_tables(file)[1])
]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
PLAIN = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXTS,
    st.sampled_from(["", "@", "@@/..", "@finetune", "/", "x" * 300, "a\0b", "mlp", "cpu", 2**63]),
    st.dates(),
    st.datetimes(),
    st.times(),
)
NAMES = st.sampled_from(["use", "skip", "path", "model", "1"]) | TEXTS
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def a_recipe_or_a_sentence(path: Path, *overrides: str) -> None:
    try:
        recipe = Recipe.load(path, REGISTRY, overrides)
    except RecipeError:
        return
    for name, _ in recipe.active_steps():
        record_of(recipe, name)


@FUZZ
@given(st.sampled_from(PLACES), VALUES, st.sampled_from(["", ".x", ".use", ".skip", ".1"]))
def test_any_value_set_at_any_key(place: tuple[Path, Key], value: Any, more: str) -> None:
    path, key = place
    spelt = ".".join(str(part + 1 if isinstance(part, int) else part) for part in key)
    literal = tomli_w.dumps({"v": [value]}).partition("=")[2].strip()[1:-1].strip().rstrip(",")
    a_recipe_or_a_sentence(path, f"{spelt}{more}={literal}")


@FUZZ
@given(st.sampled_from(PLACES), VALUES)
def test_any_value_written_at_any_key(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Path, Key], value: Any
) -> None:
    _, table = read_tables(place[0])
    node: Any = table
    for part in place[1][:-1]:
        node = node[part]
    assume(isinstance(node, dict | list))
    node[place[1][-1]] = value
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    a_recipe_or_a_sentence(path)
