"""What a user can get wrong: exit code 2 and one sentence that says where and what to do."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.conftest import Command, RecipeWriter
from tests.core.processes import small_disk

Refused = Callable[..., str]
Rows = list[dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data of one's own: three samples with images."""
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.effect_noise((60, 40), 50).convert("RGB").save(tmp_path / "images" / f"{name}.png")
        Image.effect_noise((60, 40), 50).convert("RGB").save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


def rows() -> Rows:
    return [
        {
            "id": f"sample-{name}",
            "image": f"{name}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat colour is it ?"},
                {"from": "gpt", "value": "it is red ."},
            ],
        }
        for name in "abc"
    ]


@pytest.fixture
def train(folder: Path, write_recipe: RecipeWriter, data: Path, refused: Refused) -> Refused:
    """A function that runs the second step on these rows, or this text, and returns the refusal."""

    def call(content: Rows | str | bytes, *arguments: object) -> str:
        file = folder / "own.json"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        recipe = write_recipe(
            (
                f'path = "{data}/train.json", images = "{data}/images"',
                f'path = "{file}", images = "{folder}/images"',
            )
        )
        return refused(recipe, "--out", folder / "run", *arguments)

    return call


def nothing_was_done(folder: Path) -> bool:
    """Whether not even the first step, whose own data are good, began."""
    return not (folder / "run").exists()


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"id": 1},\n  {"id": }]', "own.json:2:10: not valid JSON: Expecting value"),
        ("", "own.json:1:1: not valid JSON"),
        ("[]", "own.json holds no samples"),
        ("{}", "own.json is not a list of objects"),
        ("[1, 2]", "own.json is not a list of objects"),
        ("null", "own.json is not a list of objects"),
        ('[{"id": 1},\n null]', "own.json is not a list of objects: row 2 on line 2 is none"),
        (b"\x93\xff\xfe[]", "own.json is not UTF-8 text"),
        ("[" * 100_000, "own.json is nested too deeply"),
        (f'[{{"id": {"9" * 5000}}}]', "own.json:1:2: not valid JSON: a number is too long"),
        ('{"id": 1}\n{"id": 2}\n', "own.json:2:1: not valid JSON: Extra data"),
        ('[{"id": "b", "id": "c"}]', "sample `c` of"),
    ],
)
def test_files_that_are_no_list_of_samples(
    train: Refused, folder: Path, content: str | bytes, sentence: str
) -> None:
    assert sentence in train(content)
    assert nothing_was_done(folder)


def test_a_data_file_that_is_no_file(train: Refused, folder: Path) -> None:
    os.mkfifo(folder / "pipe.json")
    text = train(rows(), "--set", f"steps.finetune.data.path={folder}/pipe.json")
    assert "pipe.json: it is no regular file" in text
    assert nothing_was_done(folder)


def test_a_byte_order_mark_in_front_of_recipe_and_rows_does_no_harm(
    folder: Path, write_recipe: RecipeWriter, data: Path, llava_run: Command
) -> None:
    (folder / "own.json").write_text(json.dumps(rows()), encoding="utf-8-sig")
    recipe = write_recipe(
        (
            f'path = "{data}/train.json", images = "{data}/images"',
            f'path = "{folder}/own.json", images = "{folder}/images"',
        )
    )
    recipe.write_text(recipe.read_text(), encoding="utf-8-sig")
    outcome = llava_run(recipe, "--out", folder / "run", "--plan")
    assert outcome.code == 0, outcome.err


# -- samples ---------------------------------------------------------------------------------------


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in pairs]


HUMAN, GPT = ("human", "<image>\nwhat ?"), ("gpt", "red .")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"conversations": turns(HUMAN, HUMAN, GPT)}, "turn 2 is from `human`, expected `gpt`"),
        ({"conversations": turns(HUMAN, GPT, GPT)}, "turn 3 is from `gpt`, expected `human`"),
        ({"conversations": turns(HUMAN, ("tool", "x"))}, "a turn needs `from` (human or gpt)"),
        ({"conversations": turns(HUMAN, ("system", "x"))}, "a turn from system stands first"),
        ({"conversations": turns(HUMAN, ("gpt", None))}, "a turn needs `from`"),
        ({"conversations": [{"from": [], "value": ""}]}, "a turn needs `from`"),
        ({"conversations": ["hello"]}, "a turn needs `from`"),
        ({"conversations": []}, "has no turns"),
        ({"conversations": turns(GPT)}, "has no turns"),
        ({"conversations": None}, "has no list `conversations`"),
        ({"image": ["b.png", "c.png"]}, "has 2 images for 1 `<image>` placeholder"),
        ({"image": []}, "has 0 images for 1 `<image>` placeholder"),
        (
            {"conversations": turns(("human", "<image> <image>"), GPT)},
            "has 1 image for 2 `<image>` placeholders",
        ),
        ({"conversations": turns(HUMAN, ("gpt", "an <image> ."))}, "an answer has `<image>`"),
        ({"image": 3}, "`image` is a path, or a list of paths"),
        ({"image": "../../secret.png"}, "image `../../secret.png` of sample `sample-b`"),
        ({"image": "/etc/passwd"}, "lies outside"),
        ({"image": "none.png"}, "1 of 3 images are missing"),
        ({"image": "x" * 5000}, "1 of 3 images are missing"),
        ({"image": "a\0b.png"}, "1 of 3 images are missing"),
        ({"image": ""}, "`image` is an empty text; name a file"),
        ({"audio": "b.mp3"}, "`audio` is not read"),
        ({"conversations": turns(HUMAN, ("gpt", "half \ud83d"))}, "turn 2 has half a character"),
    ],
)
def test_samples_that_do_not_fit(
    train: Refused, folder: Path, change: dict[str, Any], sentence: str
) -> None:
    content = rows()
    content[1] |= change
    text = train(content)
    assert sentence in text
    assert "sample-b" in text
    assert "own.json" in text
    assert nothing_was_done(folder)


def test_the_last_question_without_an_answer_is_no_error_but_teaches_nothing(
    train: Refused, folder: Path
) -> None:
    content = rows()
    content[1]["conversations"] = turns(HUMAN)
    text = train(content)
    assert "nothing is learned from 1 of 3 samples (`sample-b`)" in text
    assert not (folder / "run" / "02-finetune").exists()


def test_answers_behind_the_longest_sequence(train: Refused) -> None:
    text = train(rows(), "--set", "steps.finetune.max_length=20")
    assert "nothing is learned from 3 of 3 samples (`sample-a`, `sample-b`, `sample-c`)" in text
    assert "behind 20 tokens" in text
    assert "raise max_length" in text


def test_longer_than_the_language_model_reads_is_cut(train: Refused) -> None:
    content = rows()
    content[1]["conversations"][0]["value"] += " red" * 300  # the model reads 256 tokens
    assert "(`sample-b`)" in train(content)


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", ["true", "false"])
@pytest.mark.parametrize("name", ["b.png", "b.jpg"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_images_are_found_before_training(
    train: Refused, folder: Path, name: str, damage: str, cached: str
) -> None:
    image = folder / "images" / name
    whole = image.read_bytes()
    made = {"truncated": whole[: len(whole) // 2], "text": b"<html>404</html>", "empty": b""}
    image.write_bytes(made[damage])
    content = rows()
    content[1]["image"] = name
    text = train(content, "--set", f"steps.finetune.cache_features={cached}")
    assert f"image {image} of sample `sample-b`" in text
    assert nothing_was_done(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_training_names_its_sample(
    train: Refused, folder: Path, workers: int
) -> None:
    image = folder / "images" / "b.png"
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 0xFF  # both ends are whole
    image.write_bytes(data)
    text = train(
        rows(), "--set", "steps.finetune.cache_features=false",
        "--set", f"steps.finetune.workers={workers}",
    )  # fmt: skip
    assert f"image {image} of sample `sample-b` cannot be decoded" in text
    assert "worker process" not in text


def test_an_image_of_a_question_that_is_no_file_says_what_it_is(
    write_recipe: RecipeWriter, refused: Refused, tmp_path: Path, llava_run: Command
) -> None:
    done = llava_run(write_recipe(), "--out", tmp_path / "run", "--set", "steps.2.skip=true")
    assert done.code == 0
    os.mkfifo(tmp_path / "pipe")
    for image, sentence in (
        ("https://a.org/cat.png", "images of the host `a.org` are not allowed here; allow it"),
        (tmp_path, "of the prompt is a folder; name an image file"),
        (tmp_path / "pipe", "of the prompt is a device or a pipe; name an image file"),
        (tmp_path / "none.png", "of the prompt does not exist; check"),
    ):
        asked = refused("chat", tmp_path / "run" / "model", "--image", image, "--prompt", "what ?")
        assert sentence in asked


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_no_number_names_the_samples(
    write_recipe: RecipeWriter, refused: Refused, tmp_path: Path, precision: str
) -> None:
    path = write_recipe(("epochs = 2", f'epochs = 8\nprecision = "{precision}"\nclip = 1e30'))
    text = refused(
        path, "--out", tmp_path / "run",
        "--set", "steps.finetune.train={ connector = 1e20, language = 1e20 }",
    )  # fmt: skip
    assert "of step" in text
    assert "samples: `s" in text
    assert "ower the learning rate" in text
    for checkpoint in (tmp_path / "run").rglob("state.json"):
        assert "NaN" not in checkpoint.read_text()


@pytest.mark.parametrize(
    "fault",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
        "something else",
    ],
)
def test_a_device_that_is_full_says_what_needs_less(
    write_recipe: RecipeWriter,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    import torch

    from llavakit_plugins.language.vicuna import Vicuna

    def fill(*_: object) -> None:
        raise (torch.OutOfMemoryError if "CUDA" in fault else RuntimeError)(fault)

    monkeypatch.setattr(Vicuna, "loss", fill)
    path, run = write_recipe(), tmp_path / "run"
    if "memory" not in fault:
        with pytest.raises(RuntimeError, match="something else"):
            refused(path, "--out", run)
        return
    text = refused(path, "--out", run)
    assert (
        f"out of memory ({fault.partition('. GPU')[0].rstrip('.')}); less is needed with " in text
    )
    assert "fewer `micro_batch_tokens` (now " in text


def test_one_poisoned_image_is_told_from_its_neighbours(
    write_recipe: RecipeWriter, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavakit_plugins.vision.clip import Clip

    prepare = Clip.prepare

    def poison(self: Clip, image: Image.Image) -> Any:
        pixels = prepare(self, image)
        return pixels * float("nan") if image.width == 32 + 4 else pixels  # the fifth

    monkeypatch.setattr(Clip, "prepare", poison)
    text = refused(write_recipe(), "--out", tmp_path / "run")
    assert "the loss of step" in text
    assert "samples: `s4`." in text
    # seen at the end only, it is told of the same step and the same weights
    seldom = write_recipe(
        ("log_every = 1", "log_every = 100"), ("checkpoint_every = 2", "checkpoint_every = 100")
    )
    assert refused(seldom, "--out", tmp_path / "seldom") == text


# -- places to write -------------------------------------------------------------------------------


def test_out_is_a_file(write_recipe: RecipeWriter, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in refused(write_recipe(), "--out", tmp_path / "file")
    assert "cannot write" in refused(write_recipe(), "--out", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kilobytes", [4, 40, 300, 500, 800])
def test_a_full_disk(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, kilobytes: int
) -> None:
    path = write_recipe()
    with small_disk(tmp_path / "disk", kilobytes):
        code, _, err = llava_run(path, "--out", tmp_path / "disk" / "run")
        assert code == 2, err
        assert "No space left on device" in err
        assert "free some space" in err
        assert "Traceback" not in err
        hidden = [p for p in (tmp_path / "disk").rglob(".*") if p.name != ".lock"]
        assert hidden == []
        for model in (tmp_path / "disk").rglob("model.toml"):
            assert llava_run("chat", model.parent, "--prompt", "what ?").code == 0


def test_a_read_only_disk(write_recipe: RecipeWriter, refused: Refused, tmp_path: Path) -> None:
    import subprocess

    path = write_recipe()
    with small_disk(tmp_path / "disk", 2000):
        (tmp_path / "disk" / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        assert "Read-only file system" in refused(path, "--out", tmp_path / "disk" / "run")
        assert "Read-only file system" in refused(path, "--out", tmp_path / "disk" / "other")


# -- parts that do not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "model.language.max_length=16",
            "one image takes 16 tokens, but `vicuna` reads at most 16",
        ),
        ("model.vision.layer=-9", "has 3 layers, so `layer = -9` names none"),
        ("device=banana", "device `banana`"),
        ("device=cuda:99", "device `cuda:99` is not available"),
        ("device=meta", "device `meta` is not available"),
        ("steps.1.train={ vision = 1e-3, conector = 1 }", "option `conector` of `pretrain`"),
        ("steps.1.train={}", "name at least one part"),
        ("model.vision.std=[1,0,1]", "option `std`, entry 2, of `clip`: input should be greater"),
        ("model.vision.config.hidden_size=33", "cannot make a CLIPVisionModel of this config"),
        ("model.language.config.num_attention_heads=5", "cannot make a LlamaConfig of this"),
        ("steps.1.train={ connector = -1 }", "name at least one part"),
    ],
)
def test_parts_that_do_not_fit(
    write_recipe: RecipeWriter, refused: Refused, tmp_path: Path, override: str, sentence: str
) -> None:
    assert sentence in refused(write_recipe(), "--out", tmp_path / "run", "--set", override)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_width_are_refused(
    write_recipe: RecipeWriter, refused: Refused, tmp_path: Path, llava_run: Command
) -> None:
    assert (
        llava_run(write_recipe(), "--out", tmp_path / "run", "--set", "steps.2.skip=true").code == 0
    )
    file = tmp_path / "run" / "model" / "model.toml"
    file.write_text(file.read_text().replace('use = "mlp"', 'use = "mlp"\ndepth = 3'))
    assert "does not describe the weights beside it" in refused(
        "chat", file.parent, "--prompt", "x"
    )


def test_a_folder_within_a_run_that_cannot_be_made(
    tmp_path: Path, write_recipe: RecipeWriter, llava_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every step, each folder in turn: the run stops with a sentence, and a resume goes on."""
    recipe = write_recipe()
    text = recipe.read_text()
    model, _, steps = text.partition("[[steps]]")
    pretrain = f"[[steps]]{steps.partition('[[steps]]')[0]}"
    data = pretrain.partition("data = ")[2].strip()
    recipe.write_text(
        f"{model}"
        '[[steps]]\nuse = "scenes"\ntrain = 8\nsingle = 8\ntest = 8\n'
        '[[steps]]\nuse = "generate"\ncontexts = "@scenes/train.jsonl"\n'
        'images = "@scenes/images"\nheld_out = "@scenes/test.jsonl"\n'
        'generator = { use = "offline" }\n'
        f"{pretrain.replace(data, 'DATA')}max_steps = 2\nvalidate_every = 1\nkeep_best = true\n"
        "held_out = DATA\n".replace("DATA", data)
        + '[[steps]]\nuse = "evaluate"\nmax_new_tokens = 2\nlosses = [DATA]\n'
        '[[steps]]\nuse = "export"\nformat = { use = "original" }\n'
    )
    recipe.write_text(recipe.read_text().replace("DATA", data))
    run, mkdir = tmp_path / "run", Path.mkdir
    errors = [errno.ENOSPC, errno.EACCES, errno.EROFS]
    refused_names: list[str] = []

    def refuse(path: Path, *how: Any, **more: Any) -> None:
        name = re.sub(r"\.\d+|-[0-9a-f]{6,}|[0-9a-z_]{8}$", "", path.name)
        if run in (path, *path.parents) and name not in refused_names:
            refused_names.append(name)
            error = errors[len(refused_names) % 3]
            raise OSError(error, os.strerror(error), str(path))
        mkdir(path, *how, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # 17 runs need not survive a power cut
    for _ in range(30):
        before = len(refused_names)
        code, _, err = llava_run(recipe, "--out", run, "--resume")
        if code == 0:
            break
        assert code == 2, err
        assert len(refused_names) == before + 1, err
        assert f"cannot write {run}" in err
        assert "free some space or choose another place" in err
        assert "Traceback" not in err
    assert code == 0, err
    assert {"run", "01-scenes", "images", "held-out"} <= set(refused_names)
    assert len(refused_names) > 8, refused_names
