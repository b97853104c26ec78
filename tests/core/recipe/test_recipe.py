"""Recipes: reading, building on others, overriding; every problem at once, each at its line."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Command, RecipeWriter

from llavakit import Recipe, RecipeError, Registry
from llavakit.recipe.overrides import find_keys, locate
from llavakit.recipe.recipe import find_recipe, recipe_folder

REGISTRY = Registry.installed()
BUILT_IN = sorted(recipe_folder().rglob("*.toml"))

MODEL = """\
[model]
connector = { use = "mlp" }
vision = { use = "clip", config = { hidden_size = 8 } }
language = { use = "vicuna", config = { hidden_size = 8 } }
"""
STEP = """\
[[steps]]
use = "pretrain"
train = { connector = 1e-3 }
data = { use = "conversations", path = "a.json" }
"""


def write(folder: Path, text: str, name: str = "r.toml") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str, inputs: bool = False) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, REGISTRY, overrides, inputs=inputs)
    return str(caught.value).replace(f"{path.parent}/", "")


# -- problems and their lines ----------------------------------------------------------------------

WRONG = """\
seed = "many"
sede = 3

[model]
connector = "mlp"
vision = { use = "clip", source = "x", layr = 1 } # "layr" = 3
language = { use = "vicunya" }

[[steps]]
use = "pretrain"
train = { conector = 1e-3 }
data = { use = "mix", parts = [
  { use = "conversations", path = "a" },
  { use = "conversations", pth = "b" },
] }

[[steps]]
use = "finetune"
train = { connector = 1e-3 }
epochs = 0
"""


def test_every_problem_is_told_at_once_at_its_line_with_a_suggestion(tmp_path: Path) -> None:
    text = problems(write(tmp_path, WRONG))
    expected = {
        "r.toml:1: option `seed`: input should be a valid integer": "got `'many'` (str)",
        "r.toml:2: unknown option `sede`": "did you mean `seed`?",
        "r.toml:5: option `connector` is a table": 'write { use = "NAME" }',
        "r.toml:6: unknown option `layr` of `clip`": "did you mean `layer`?",
        "r.toml:7: no LanguageModel is called `vicunya`; did you mean `vicuna`?": "",
        "r.toml:11: option `conector` of `pretrain`": "",
        "r.toml:14: unknown option `pth` of `conversations`": "did you mean `path`?",
        "r.toml:14: missing option `path` of `conversations`": "",
        "r.toml:17: missing option `data` of `finetune`": "",
        "r.toml:20: option `epochs` of `finetune`": "got `0` (int)",
    }
    parts = text.split("\n\n")
    for message, hint in expected.items():
        (part,) = [part for part in parts if part.startswith(message)]
        assert hint in part
    assert len(parts) == len(expected), text


def test_a_problem_is_shown_as_compilers_do(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL.replace('use = "mlp"', 'use = "mlp", dept = 3') + STEP)
    assert problems(path) == (
        "r.toml:2: unknown option `dept` of `mlp`\n"
        "   |\n"
        ' 2 | connector = { use = "mlp", dept = 3 }\n'
        "   |                            ^^^^\n"
        "   = help: did you mean `depth`?"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a = [", "is not valid TOML"),
        ("a = 1\na = 2", "is not valid TOML"),
        ("base = 3", "`base` names one recipe"),
        ('base = "nowhere"', "no built-in recipe is called `nowhere`"),
        ("", "missing option `model`"),
        (MODEL + "steps = []", "unknown option `steps`"),  # it belongs to [model]
        ("steps = []\n" + MODEL, "at least 1 item"),
        ("steps = 3\n" + MODEL, "option `steps`"),
        ('name = "a b"\n' + MODEL + STEP, "r.toml:1: option `name`"),
        (MODEL.replace('"mlp"', "3") + STEP, "option `use`"),
        (MODEL.replace('use = "mlp"', "") + STEP, "missing option `use`"),
        (MODEL + STEP + "epochs = nan", "option `epochs`"),
    ],
)
def test_no_text_is_a_traceback(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in problems(write(tmp_path, text))


def test_an_option_of_a_table_that_may_be_left_out(tmp_path: Path) -> None:
    lora = '[model.language]\nuse = "vicuna"\nlora = { rnk = 4 }\n'
    text = MODEL.replace("[model]\n", f"{lora}[model]\n")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("language ="))
    found = problems(write(tmp_path, f"{text}\n{STEP}"))
    assert "unknown option `rnk`" in found
    assert "did you mean `rank`?" in found
    found = problems(write(tmp_path, f"{text}\n{STEP}".replace("rnk", "use_dora")))
    assert "known: rank, alpha, dropout, targets" in found


def test_a_step_that_cannot_be_read_blames_none_behind_it(tmp_path: Path) -> None:
    first = STEP.replace("pretrain", "finetune") + 'init = "m"\nlearning_rat = 1\n'
    found = problems(write(tmp_path, first + STEP), inputs=True)
    assert "unknown option `learning_rat`" in found
    assert "missing option `model`" not in found
    assert "missing option `model`" in problems(write(tmp_path, STEP), inputs=True)


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xff\xfe")
    assert "r.toml is not UTF-8 text" in problems(path)
    assert "cannot read recipe" in problems(tmp_path / "none.toml")
    assert "cannot read recipe" in problems(tmp_path)


def test_a_misspelt_built_in_recipe_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="did you mean `llava13b`"):
        find_recipe("lava13b")


# -- places of keys --------------------------------------------------------------------------------

PLACES = """\
name = "x" # [[no]]
a.b.c = [1,
  { use = "k", v = \"\"\"a
]} = " # not\"\"\", z = 1 },
  "s,]", ]
"q.x" = 'lit # = '
[[steps]]
use = 'p'
parts = [{ k = 0 }, { k = 1 }]
[[steps]]
d = 1979-05-27T07:32:00Z
[[steps.parts]]
k = 3
[steps.data]
path = "x"
"""


@pytest.mark.parametrize(
    ("key", "line", "start", "depth"),
    [
        (("name",), 1, 0, 1),
        (("a", "b", "c"), 2, 4, 3),
        (("a", "b", "c", 1, "v"), 3, 15, 5),
        (("a", "b", "c", 1, "z"), 4, 17, 5),
        (("a", "b", "c", 2), 5, 2, 4),
        (("q.x",), 6, 1, 1),
        (("steps", 0, "use"), 8, 0, 3),
        (("steps", 0, "parts", 1, "k"), 9, 22, 5),
        (("steps", 1, "parts", 0, "k"), 13, 0, 5),
        (("steps", 1, "data", "path"), 15, 0, 4),
        (("steps", 1, "nothing"), 10, 2, 2),
        (("nothing",), 1, 0, 0),
    ],
)
def test_places_of_keys(key: tuple[str | int, ...], line: int, start: int, depth: int) -> None:
    tomllib.loads(PLACES)
    place = locate(PLACES, key)
    assert (place.span.line, place.span.start, place.depth) == (line, start, depth)


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.stem)
def test_every_key_of_a_built_in_recipe_is_found_on_a_line_that_has_it(path: Path) -> None:
    text = path.read_text()

    def keys(value: object, key: tuple[str | int, ...]) -> list[tuple[str | int, ...]]:
        items: list[tuple[str | int, object]] = []
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, list):
            items = list(enumerate(value))
        return [(*key, name) for name, _ in items] + [
            inner for name, item in items for inner in keys(item, (*key, name))
        ]

    found = find_keys(text)
    for key in keys(tomllib.loads(text), ()):
        span = found[key]
        if isinstance(key[-1], str):
            assert text.splitlines()[span.line - 1][span.start : span.end] == key[-1]


@pytest.mark.parametrize(
    "text", ["[[[", "=", "a = [", "a = {", "]", ",,", "a", 'a = "', "{}", "a = [1 2"]
)
def test_places_of_broken_text_come_to_an_end(text: str) -> None:
    find_keys(text)


# -- recipes that build on others ------------------------------------------------------------------

BASE = (
    MODEL.replace('use = "mlp"', 'use = "mlp", depth = 3')
    + STEP
    + STEP.replace("pretrain", "finetune")
)


def test_a_recipe_changes_single_keys_of_its_base(tmp_path: Path) -> None:
    write(tmp_path, BASE, "base.toml")
    write(tmp_path, 'base = "base"\nseed = 4\n[steps.finetune]\nepochs = 7', "middle.toml")
    path = write(
        tmp_path, 'base = "middle.toml"\n[steps.1]\nbatch_size = 3\n[model.connector]\ndepth = 1'
    )
    recipe = Recipe.load(path, REGISTRY)
    assert recipe.name == "r"
    assert recipe.seed == 4
    assert recipe.model.connector.options == {"depth": 1}
    assert [step.use for step in recipe.steps] == ["pretrain", "finetune"]
    assert recipe.steps[0].options["batch_size"] == 3
    assert recipe.steps[1].options["epochs"] == 7
    assert recipe.steps[1].options["train"] == {"connector": 1e-3}


def test_another_component_drops_the_options_of_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, BASE, "base.toml")
    path = write(tmp_path, 'base = "base"\nmodel.connector.use = "linear"')
    assert Recipe.load(path, REGISTRY).model.connector.options == {}
    path = write(tmp_path, BASE)
    recipe = Recipe.load(path, REGISTRY, ["model.connector.use=linear"])
    assert recipe.model.connector.options == {}
    same = Recipe.load(path, REGISTRY, ["model.connector.use=mlp"])
    assert same.model.connector.options == {"depth": 3}


def test_lines_are_those_of_the_file_that_says_so(tmp_path: Path) -> None:
    write(tmp_path, BASE + "epoks = 1\n", "base.toml")
    text = problems(
        write(tmp_path, 'base = "base"\n[steps.finetune]\nbatch_size = 0\n[steps.1]\nepochs = 0')
    )
    assert "r.toml:3: option `batch_size` of `finetune`" in text
    assert "r.toml:5: option `epochs` of `pretrain`" in text
    assert "base.toml:13: unknown option `epoks` of `finetune`" in text


def test_a_recipe_without_a_name_has_its_files_not_its_bases(tmp_path: Path) -> None:
    write(tmp_path, 'name = "theirs"\n' + BASE, "base.toml")
    write(tmp_path, 'base = "base"', "m y.toml")
    write(tmp_path, 'base = "m y"\nname = "own"', "own.toml")
    assert Recipe.load(tmp_path / "base.toml", REGISTRY).name == "theirs"
    assert Recipe.load(tmp_path / "m y.toml", REGISTRY).name == "m-y"
    assert Recipe.load(tmp_path / "own.toml", REGISTRY).name == "own"
    write(tmp_path, 'base = "base"', "日本.toml")
    assert "missing option `name`" in problems(tmp_path / "日本.toml")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ('name="ü"', "it begins with a letter or digit of ASCII"),
        ("seed=9223372036854775808", "option `seed`: an integer of TOML has 64 bits"),
        ("steps.finetune.train={connector=nan}", "each with a finite learning rate above 0"),
        ("steps.finetune.train={connector=inf}", "each with a finite learning rate above 0"),
        ("steps.finetune.betas=[0.9,1.5]", "option `betas`, entry 2, of `finetune`: input should"),
        ("steps.finetune.betas=[0.9]", "option `betas` of `finetune` is too short a list"),
        ("steps.finetune.weight_decay=inf", "`weight_decay` of `finetune`: input should be a fin"),
        ("steps={use='x'}", "option `steps` is a list\n = help: write [[steps]]"),
    ],
)
def test_values_that_would_only_fail_in_a_run(tmp_path: Path, change: str, sentence: str) -> None:
    assert sentence in problems(write(tmp_path, BASE), change)


def test_a_recipe_that_builds_on_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 'base = "r"', "other.toml")
    assert "builds on itself" in problems(write(tmp_path, 'base = "other"'))
    assert "builds on itself" in problems(write(tmp_path, 'base = "r.toml"'))


def test_a_change_of_a_step_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    write(tmp_path, BASE, "base.toml")
    path = write(tmp_path, 'base = "base"\n[steps.evaluate]\nblind = true')
    assert "no entry is called `evaluate`; there are: 1 (pretrain), 2 (finetune)" in problems(path)
    write(tmp_path, MODEL + STEP + STEP, "base.toml")
    path = write(tmp_path, 'base = "base"\n[steps.pretrain]\nepochs = 2')
    assert "more than one entry is called `pretrain`" in problems(path)


# -- overrides -------------------------------------------------------------------------------------


def test_set_takes_toml_literals_and_strings_and_steps_by_name_or_number(tmp_path: Path) -> None:
    recipe = Recipe.load(
        write(tmp_path, BASE),
        REGISTRY,
        [
            "seed=7",
            "name=plain-text",
            'steps.2.data.path="quoted = too"',
            "steps.pretrain.betas=[0.8, 0.9]",
            "steps.finetune.train={ connector = 1.0, language = 2.0 }",
            "steps.finetune.recompute=true",
            "machine.tflops=2.5",
            "steps.finetune.data.images=no such = thing",
        ],
    )
    assert recipe.seed == 7
    assert recipe.name == "plain-text"
    assert recipe.steps[1].options["data"] == {
        "use": "conversations",
        "path": "quoted = too",
        "images": "no such = thing",
    }
    assert recipe.steps[0].options["betas"] == [0.8, 0.9]
    assert recipe.steps[1].options["train"] == {"connector": 1.0, "language": 2.0}
    assert recipe.steps[1].options["recompute"] is True
    assert recipe.machine.tflops == 2.5


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", "write it as a.b.c=value"),
        ("=3", "write it as a.b.c=value"),
        ("a..b=3", "write it as a.b.c=value"),
        ("seed=-1", "--set seed=-1: option `seed`"),
        ("seeed=1", "--set seeed=1: unknown option `seeed`"),
        ("steps.finetune.epochs=0", "--set steps.finetune.epochs=0: option `epochs`"),
        ("steps.2.epochs=0", "--set steps.2.epochs=0: option `epochs` of `finetune`"),
        ("steps.3.epochs=0", "no entry is called `3`"),
        ("steps.fine.epochs=0", "no entry is called `fine`"),
        ("model.connector.use.x=1", "has no parts"),
        ("model.connector.use=lineer", "--set model.connector.use=lineer: no Connector"),
        ("model.connector=linear", "--set model.connector=linear: option `connector` is a table"),
    ],
)
def test_a_bad_set_is_named(tmp_path: Path, override: str, sentence: str) -> None:
    assert sentence in problems(write(tmp_path, BASE), override)


def test_a_table_that_set_gives_is_named_for_all_in_it(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL.replace('"mlp"', '"mlp", depth = 3') + STEP)
    override = 'model.connector={use = "mlp", depth = 0}'
    assert problems(path, override).startswith(f"--set {override}: option `depth`")
    later = problems(path, override, "model.connector.depth=-1")
    assert later.startswith("--set model.connector.depth=-1: option `depth`")


def test_the_environment_wins_over_the_file_and_set_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_SEED", "7")
    monkeypatch.setenv("LLAVA_MODEL__CONNECTOR__DEPTH", "4")
    monkeypatch.setenv("LLAVA_SOMETHING_ELSE", "1")
    monkeypatch.setenv("SEED", "8")
    monkeypatch.setenv("NAME", "nobody")
    recipe = Recipe.load(write(tmp_path, BASE), REGISTRY)
    assert recipe.seed == 7
    assert Recipe.load(write(tmp_path, BASE), REGISTRY, ["seed=6"]).seed == 6
    assert recipe.name == "r"
    assert recipe.model.connector.model_dump() == {"use": "mlp", "depth": "4"}
    monkeypatch.delenv("LLAVA_MODEL__CONNECTOR__DEPTH")
    monkeypatch.setenv("LLAVA_MODEL__CONNECTOR__USE", "linear")  # which has no `depth`
    monkeypatch.setenv("LLAVA_STEPS__FINETUNE__EPOCHS", "9")
    recipe = Recipe.load(write(tmp_path, BASE), REGISTRY)
    assert recipe.model.connector.model_dump() == {"use": "linear"}
    assert [step.options.get("epochs") for step in recipe.steps] == [None, "9"]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("LLAVA_SEED", "-4", "environment variable LLAVA_SEED=-4: option `seed`"),
        ("LLAVA_MODEL", "{", "the environment sets a table by LLAVA_"),
        ("LLAVA_MODLE__CONNECTOR__USE", "x", "LLAVA_MODLE__CONNECTOR__USE: no `modle` in a"),
        ("LLAVA_MODEL__CONECTOR__USE", "x", "LLAVA_MODEL__CONECTOR__USE=x: unknown option"),
        ("LLAVA_MODEL__CONNECTOR__DEPTH", "0", "LLAVA_MODEL__CONNECTOR__DEPTH=0: option `depth`"),
    ],
)
def test_a_bad_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    assert sentence in problems(write(tmp_path, BASE))


# -- references and inputs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("@pretrain/model", ""),
        ("@01-pretrain/model", ""),
        ("@pretrian/model", "did you mean `@pretrain`?"),
        ("@finetune/model", "no earlier step is called `finetune`"),
        ("@evaluate/model", "no earlier step is called `evaluate`"),
        ("@pretrain/../../x", "leaves the folder of its step"),
    ],
)
def test_references_to_earlier_steps(tmp_path: Path, reference: str, sentence: str) -> None:
    path = write(tmp_path, BASE + f'init = "{reference}"\n')
    if not sentence:
        Recipe.load(path, REGISTRY)
    else:
        text = problems(path)
        assert text.startswith("r.toml:13: option `init` of `finetune`: ")
        assert sentence in text


def test_a_skipped_step_can_not_be_referred_to(tmp_path: Path) -> None:
    text = BASE.replace('use = "pretrain"', 'use = "pretrain"\nskip = true')
    path = write(tmp_path, text + 'init = "@pretrain/model"\n')
    sentence = "no earlier step is called `pretrain`; no step comes before this one"
    assert sentence in problems(path)


def test_missing_input_files_are_found_before_anything_runs(
    write_recipe: RecipeWriter, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = write_recipe(("train.json", "tain.json"))
    text = refused(path, "--out", tmp_path / "out")
    lines = path.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if "tain.json" in text)
    assert f"small.toml:{line}: `path`:" in text
    assert "does not exist" in text
    assert "train.json`?" in text
    assert not (tmp_path / "out").exists()


# -- built-in recipes ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.stem)
def test_every_built_in_recipe_is_valid_and_says_what_it_is(path: Path) -> None:
    recipe = Recipe.load(path, REGISTRY)
    assert recipe.name == path.stem
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.stem)
def test_every_built_in_recipe_can_be_planned_offline(path: Path, llava_run: Command) -> None:
    name = path.relative_to(recipe_folder()).with_suffix("").as_posix()
    own = ["--set", "steps.evaluate.init=MODEL"] if name == "evaluate" else []
    code, out, err = llava_run(name, "--plan", *own)
    assert code == 0, err
    with_model = ["vision", "connector", "language", "parameters"]
    model = Recipe.load(path, Registry.installed()).model
    parts = with_model if model else ["no model of its own"]
    for word in (*parts, "total:", "cost:", "memory"):
        assert word in out


def test_the_plan_of_llava13b_has_the_papers_figures(llava_run: Command) -> None:
    _, out, _ = llava_run("llava13b", "--plan")
    rows: dict[str, list[str]] = {}
    for words in filter(None, map(str.split, out.splitlines())):
        rows.setdefault(words[0], words)  # further down it says more of each step
    assert rows["language"][2] == "13B"
    assert rows["vision"][2] == "303M"
    assert rows["connector"][2] == f"{(1024 + 1) * 5120 / 1e6:.3g}M"
    assert "4652" in rows["01-pretrain"]  # 595,375 samples, 128 a step
    assert "14.8k" in rows["02-finetune"]  # 157,712 samples, 32 a step, three times


def test_a_recipe_without_its_weights_says_what_is_missing_and_how_to_get_it(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    text = refused("llava13b", "--out", tmp_path / "out")
    assert "the weights of vision encoder `openai/clip-vit-large-patch14`" in text
    assert "the weights of language model `lmsys/vicuna-13b-v1.3`" in text
    assert "hf download lmsys/vicuna-13b-v1.3" in text
    assert "data/LLaVA-Instruct-150K/llava_instruct_150k.json does not exist" in text
    assert not (tmp_path / "out").exists()
