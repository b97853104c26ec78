"""`llava-run convert-recipe` on the flags of the original's published scripts."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command
from tests.plugins.scaffolding.published_flags import OPEN, SCRIPTS, SHARED, write_script

from llavakit import Recipe, Registry
from llavakit_plugins.scaffolding.convert import convert
from llavakit_plugins.scaffolding.names import NAMES, hint
from llavakit_plugins.scaffolding.scripts import read_script

# What each run is, by the table of the original's hyperparameters: rates of connector and language
# model, batch, epochs, prompt template, how an image becomes a square, rank of adapters.
PUBLISHED: dict[str, tuple[float, float | None, int, int, str, str, int | None]] = {
    "pretrain": (2e-3, None, 128, 1, "plain", "crop", None),
    "pretrain_xformers": (2e-3, None, 128, 1, "plain", "crop", None),
    "finetune": (2e-5, 2e-5, 128, 1, "vicuna_v1", "crop", None),
    "finetune_full_schedule": (2e-5, 2e-5, 128, 3, "vicuna_v1", "crop", None),
    "finetune_lora": (2e-5, 2e-5, 128, 1, "vicuna_v1", "crop", 64),
    "finetune_qlora": (2e-5, 2e-5, 128, 1, "vicuna_v1", "crop", 64),
    "finetune_sqa": (2e-5, 2e-5, 128, 12, "vicuna_v1", "crop", None),
    "v1_5/pretrain": (1e-3, None, 256, 1, "plain", "crop", None),
    "v1_5/finetune": (2e-5, 2e-5, 128, 1, "vicuna_v1", "pad", None),
    "v1_5/finetune_lora": (2e-5, 2e-4, 128, 1, "vicuna_v1", "pad", 128),
    "v1_5/finetune_task": (2e-5, 2e-5, 128, 1, "vicuna_v1", "pad", None),
    "v1_5/finetune_task_lora": (2e-5, 2e-4, 128, 1, "vicuna_v1", "pad", 128),
}
DEFINED = [word for name, value in OPEN.items() for word in ("--define", f"{name}={value}")]

Convert = Callable[..., dict[str, Any]]


@pytest.fixture
def converted(llava_run: Command, tmp_path: Path) -> Convert:
    """A function that converts scripts and returns the recipe, which llavakit takes."""

    def call(*scripts: Path, flags: tuple[str, ...] = ()) -> dict[str, Any]:
        path = tmp_path / "made.toml"
        path.unlink(missing_ok=True)
        code, _, err = llava_run("convert-recipe", *scripts, "--out", path, *DEFINED, *flags)
        assert code == 0, err
        Recipe.load(path, Registry.installed())
        return {**tomllib.loads(path.read_text()), "said": path.read_text().partition("\nname")[0]}

    return call


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_published_script_becomes_the_run_that_it_was(
    name: str, tmp_path: Path, converted: Convert
) -> None:
    recipe = converted(write_script(tmp_path, name))
    (step,) = recipe["steps"]
    connector, language, batch, epochs, template, aspect, rank = PUBLISHED[name]
    rates = {"connector": connector} | ({} if language is None else {"language": language})
    assert step["train"] == rates
    assert (step["batch_size"], step["epochs"]) == (batch, epochs)
    assert (step["warmup"], step["schedule"], step["weight_decay"]) == (0.03, "cosine", 0)
    assert step["max_length"] == 2048
    assert step["recompute"] is True
    assert step["precision"] == ("fp32" if name == "pretrain_xformers" else "bf16")
    model = recipe.get("model") or step["changes"]
    assert model["vision"]["aspect"] == aspect
    assert model["language"].get("lora", {}).get("rank") == rank
    assert model["language"].get("quantize") == ("nf4" if name == "finetune_qlora" else None)
    given = step.get("template", {}).get("use") or step.get("load", {}).get("template")
    assert given == template
    assert ("init" in step) == ("tune_mm_mlp_adapter" not in SCRIPTS[name])


def test_both_stages_are_the_recipe_that_comes_with_llavakit(
    tmp_path: Path, converted: Convert
) -> None:
    made = converted(*(write_script(tmp_path, f"v1_5/{name}") for name in ("pretrain", "finetune")))
    ours = Recipe.load(
        Path(__file__).parents[3] / "recipes" / "llava-v1.5-13b.toml", Registry.installed()
    )
    assert made["machine"]["devices"] == ours.machine.devices
    for part in ("vision", "language", "template"):
        use = getattr(ours.model, part)
        mine = dict(made["model"][part])
        assert mine.pop("use") == use.use
        assert mine == use.options, part
    assert made["model"]["connector"] == {"use": "mlp", "depth": 2}  # the default
    same = ("train", "batch_size", "epochs", "warmup", "precision", "max_length", "prepare",
            "template")  # fmt: skip
    for step, known in zip(made["steps"], ours.steps, strict=False):
        assert step["use"] == known.use
        for key in same:
            assert step.get(key) == known.options.get(key), (step["use"], key)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_in_the_recipe_or_is_said(name: str, tmp_path: Path) -> None:
    """Nothing is dropped in silence: without the flag the recipe or what is said is another."""

    def made(**changes: str | None) -> tuple[dict[str, Any], list[str]]:
        found = convert(read_script(write_script(tmp_path, name, **changes), OPEN))
        return found.recipe, found.remarks

    recipe, remarks = made()
    usual = {
        "bf16": "False", "num_train_epochs": "3", "weight_decay": "0.", "tf32": "False",
        "gradient_accumulation_steps": "1", "evaluation_strategy": "no", "save_strategy": "steps",
        "save_total_limit": "1", "mm_use_im_start_end": "False", "mm_use_im_patch_token": "False",
    }  # fmt: skip
    for flag, value in {**SHARED, **SCRIPTS[name]}.items():
        if flag in ("data_path", "deepspeed") or usual.get(flag) == value:
            continue  # needed, or what is so without it
        said = any(f"--{flag} " in remark for remark in remarks)
        assert said or made(**{flag: None}) != (recipe, remarks), flag


def test_what_has_no_counterpart_is_said(tmp_path: Path, converted: Convert) -> None:
    path = write_script(
        tmp_path, "v1_5/finetune", tf32="True", some_new_flag="7", lr_scheduler_type="polynomial",
        optim="adafactor", mm_use_im_start_end="True", image_aspect_ratio="anyres",
        warmup_steps="100", bits="8",
    )  # fmt: skip
    said = converted(path)["said"]
    for flag in ("tf32 True", "some_new_flag 7: no counterpart is known", "optim adafactor",
                 "lr_scheduler_type polynomial: there is no schedule", "warmup_steps 100",
                 "mm_use_im_start_end True", "image_aspect_ratio anyres", "bits 8",
                 "group_by_modality_length True", "per_device_eval_batch_size 4"):  # fmt: skip
        assert f"# --{flag}" in said, flag
    assert "on how many devices it runs: taken for 8" in said


@pytest.mark.parametrize(
    ("launcher", "flags", "batch"),
    [
        ("deepspeed", (), 128),
        ("deepspeed", ("--devices", "2"), 32),
        ("deepspeed --num_gpus 4", (), 64),
        ("deepspeed --include localhost:4,5,6,7 --master_port 29501", (), 64),
        ("torchrun --nnodes=2 --nproc_per_node=8 --master_port=25001", (), 256),
        ("accelerate launch --num_processes 3", (), 48),
        ("python", (), 16),
    ],
)
def test_the_batch_is_over_all_devices(
    launcher: str, flags: tuple[str, ...], batch: int, tmp_path: Path, converted: Convert
) -> None:
    path = write_script(tmp_path, "v1_5/finetune")
    path.write_text(path.read_text().replace("deepspeed llava", f"{launcher} llava"))
    assert converted(path, flags=flags)["steps"][0]["batch_size"] == batch


def test_tinyllava_scripts_are_read_too(tmp_path: Path, converted: Convert) -> None:
    flags = {
        "data_path": "$DATA_PATH", "image_folder": "/images", "is_multimodal": "True",
        "conv_version": "phi", "model_name_or_path": "$LLM_VERSION",
        "vision_tower": "google/siglip-so400m-patch14-384", "connector_type": "mlp2x_gelu",
        "mm_vision_select_layer": "-2", "attn_implementation": "flash_attention_2", "fp16": "True",
        "training_recipe": "common", "tune_type_llm": "full", "tune_type_vision_tower": "frozen",
        "tune_vision_tower_from_layer": "0", "tune_type_connector": "full",
        "pretrained_model_path": "/checkpoints/tiny-llava-${LLM_VARIANT}-pretrain",
        "output_dir": "/checkpoints/tiny-llava-${LLM_VARIANT}-finetune", "num_train_epochs": "1",
        "per_device_train_batch_size": "8", "gradient_accumulation_steps": "4",
        "learning_rate": "2e-5", "model_max_length": "3072", "tokenizer_use_fast": "False",
    }  # fmt: skip
    lines = " \\\n  ".join(f"--{key} {value}" for key, value in flags.items())
    path = tmp_path / "finetune.sh"
    path.write_text(
        'DATA_PATH="$1"\nLLM_VERSION="$2"\nLLM_VARIANT="${LLM_VERSION#*/}"\n'
        f"deepspeed --include localhost:4,5,6,7 tinyllava/train/train.py \\\n  {lines}\n"
    )
    given = ("--define", "DATA_PATH=d.json", "--define", "LLM_VERSION=microsoft/phi-2")
    recipe = converted(path, flags=given)
    (step,) = recipe["steps"]
    assert step["init"] == "/checkpoints/tiny-llava-phi-2-pretrain"
    assert step["batch_size"] == 8 * 4 * 4
    assert step["train"] == {"connector": 2e-5, "language": 2e-5}
    assert step["changes"]["language"] == {"max_length": 3072}
    assert recipe["name"] == "tiny-llava-phi-2-finetune"
    for flag in ("fp16 True", "training_recipe", "attn_implementation", "conv_version phi"):
        assert f"--{flag}" in recipe["said"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("echo hello\n", "has no training command"),
        ("python train.py --lr 'x\n", "line 1: no closing quotation; fix the quotes"),
        ("\npython train.py --data_path $DATA\n", "line 2: $DATA has no value"),
        ("python train.py --data_path $(ls)\n", "is a command's output"),
        ("python train.py --learning_rate fast --data_path a\n", "--learning_rate fast is no numb"),
        ("python train.py --bf16 True\n", "no --data_path"),
        ("python train.py stray --bf16 True\n", "`stray` belongs to no flag"),
    ],
)
def test_what_cannot_be_converted_is_said(
    text: str, sentence: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "run.sh").write_text(text)
    assert sentence in refused("convert-recipe", tmp_path / "run.sh")


ADAPTER = "--pretrain_mm_mlp_adapter a/mm_projector.bin"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--warmup_ratio 1.0", "--warmup_ratio 1.0: option `warmup`"),
        ("--seed -5", "--seed -5: option `seed`"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: option `batch_size`"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: option `batch_size`"),
        (
            "--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True",
            "--tune_mm_mlp_adapter True, --freeze_mm_mlp_adapter True: option `train`",
        ),
        (
            "--tune_type_llm frozen --tune_type_connector frozen",
            "--tune_type_connector frozen: opt",
        ),
        ("--learning_rate 0", "--learning_rate 0: option `train`"),
        ("--mm_projector_lr -1", "--mm_projector_lr -1: option `train`"),
        ("--num_train_epochs 0", "--num_train_epochs 0: option `epochs`"),
        ("--num_train_epochs 1e30", "--num_train_epochs 1e30: option `epochs`"),
        ("--adam_beta2 1.5", "--adam_beta2 1.5: option `betas`"),
        ("--max_grad_norm 0", "--max_grad_norm 0: option `clip`"),
        ("--save_steps 0", "--save_steps 0: option `checkpoint_every`"),
        ("--logging_steps 0", "--logging_steps 0: option `log_every`"),
        ("--model_max_length 1", "--model_max_length 1: option `max_length`"),
        ("--mm_projector_type mlp0x_gelu", "--mm_projector_type mlp0x_gelu: option `depth`"),
        ("--lora_enable True --lora_r 0", "--lora_r 0: option `rank`"),
        (f"--lora_enable True --lora_r 0 {ADAPTER}", "--lora_r 0: option `rank`"),
    ],
)
def test_a_recipe_that_could_not_be_read_is_not_written(
    flags: str, said: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    given = "--model_name_or_path vicuna --vision_tower clip --version v1 --data_path d.json"
    (tmp_path / "run.sh").write_text(f"\npython train.py {given} {flags}\n")
    text = refused("convert-recipe", tmp_path / "run.sh", "--out", tmp_path / "made.toml")
    assert text.startswith(f"{tmp_path / 'run.sh'}, line 2: --")
    assert said in text
    assert "change the script" in text
    assert not (tmp_path / "made.toml").exists()


def test_the_script_of_the_step_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    first = write_script(tmp_path, "v1_5/pretrain", warmup_ratio="1.0")
    second = write_script(tmp_path, "v1_5/finetune", weight_decay="-1")
    one, other = refused("convert-recipe", first, second).splitlines()
    assert one.startswith(f"{first}, line ")
    assert "--warmup_ratio 1.0: option `warmup` of `pretrain`" in one
    assert other.startswith(f"{second}, line ")
    assert "--weight_decay -1: option `weight_decay` of `finetune`" in other


@pytest.mark.parametrize(
    ("limit", "strategy", "keep", "said"),
    [
        ("3", "steps", 3, ""),
        ("3", "epoch", 3, ""),
        ("0", "steps", 1, "--save_total_limit 0: the Trainer keeps all checkpoints"),
        ("-1", "epoch", 1, "--save_total_limit -1: the Trainer keeps all checkpoints"),
        (None, "steps", 1, "--save_total_limit is left out: the Trainer keeps all checkpoints"),
        (None, "no", None, ""),  # there are none to keep
    ],
)
def test_how_many_checkpoints_are_kept_is_the_script_s_or_is_said(
    limit: str | None,
    strategy: str,
    keep: int | None,
    said: str,
    tmp_path: Path,
    converted: Convert,
) -> None:
    path = write_script(tmp_path, "v1_5/finetune", save_total_limit=limit, save_strategy=strategy)
    recipe = converted(path)
    assert recipe["steps"][0].get("keep") == keep
    assert said in recipe["said"]
    assert ("the Trainer keeps all" in recipe["said"]) == bool(said)


def test_a_variable_of_odd_characters_stays_in_its_place(
    tmp_path: Path, converted: Convert
) -> None:
    path = write_script(tmp_path, "v1_5/finetune", image_folder="$D", some_flag="$D")
    odd = "a\x7f\x01\nseed = 3"
    recipe = converted(path, flags=("--define", f"D={odd}"))
    assert recipe["seed"] == 42
    assert recipe["steps"][0]["data"]["images"] == odd


def test_other_wrong_uses_are_said(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = write_script(tmp_path, "v1_5/finetune")
    other = write_script(tmp_path, "pretrain")
    assert "cannot read" in refused("convert-recipe", tmp_path / "none.sh")
    assert "write NAME=VALUE" in refused("convert-recipe", path, "--define", "x")
    assert "give at least one" in refused("convert-recipe", path, "--devices", 0)
    assert "is there already" in refused("convert-recipe", path, "--out", path)
    assert "convert them one by one" in refused("convert-recipe", other, path, *DEFINED)


# -- names of other programs in a recipe ----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('report_to = "wandb"', "`trackers`"),
        ("steps.finetune.gradient_checkpointing = true", "`recompute`"),
        ("steps.finetune.num_train_epochs = 3", "`epochs`"),
        ("steps.finetune.max_seq_length = 3", "`max_length`"),
        ("steps.finetune.tf32 = true", "there is none here"),
        ('steps.finetune.mm_projector_type = "linear"', "`model.connector`"),
    ],
)
def test_a_recipe_knows_the_names_of_other_programs(
    line: str, said: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "tiny"\n{line}\n')
    assert said in refused(path, "--plan")


def test_what_the_names_lead_to_is_there() -> None:
    from llavakit_plugins.language.options import LanguageOptions
    from llavakit_plugins.training.options import TrainOptions

    steps = set(TrainOptions.model_fields)
    top = set(Recipe.model_fields)
    for name, found in NAMES.items():
        assert found.ours or found.say, name
        first, *rest = found.ours.split(".")
        assert not first or first in steps | top or first.startswith("--"), name
        if found.ours.startswith("model.language.") and len(rest) > 1:
            assert rest[1] in LanguageOptions.model_fields, name
    assert hint("--learning-rate") == "here it is `train`: a rate for each part that learns"
    assert hint("nothing_of_the_kind") == ""
