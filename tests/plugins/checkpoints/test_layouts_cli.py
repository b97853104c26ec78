"""`llava-run chat`, `import` and `export` on other projects' folders, and their tokenizers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from tests import published
from tests.plugins.checkpoints.test_layouts_original import make
from tests.plugins.made_checkpoints import make_hf, pictures
from tests.plugins.onnx_models import HEADS_OF_16, make_model

import llavakit
from llavakit.cli import main
from llavakit.model.folder import save_model
from llavakit_plugins.checkpoints.tokenizers import read_tokenizer

LLAMA = published.llama()


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pictures(1)[0].save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_chat_on_a_folder_of_transformers(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "m")
    capsys.readouterr()
    asked = ("--image", picture, "--prompt", "what ?", "--device", "cpu", "--max-new-tokens", 6)
    assert run("chat", tmp_path / "m", *asked) == 0
    answer = capsys.readouterr().out.strip()
    expected = llavakit.load(tmp_path / "m", device="cpu").generate(
        "what ?", images=[picture], max_new_tokens=6
    )
    assert answer == expected


def test_chat_import_and_export_of_an_original_checkpoint(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlavaForConditionalGeneration

    made = make(tmp_path)
    assert run("chat", made.folder, "--vision", made.tower, "--prompt", "what ?",
               "--device", "cpu", "--max-new-tokens", 3, "--template", "llava_v1") == 0  # fmt: skip
    native, exported = tmp_path / "native", tmp_path / "exported"
    assert run("import", made.folder, native, "--vision", made.tower) == 0
    capsys.readouterr()
    assert run("export", native, exported, "--format", "hf", "--set", "max_shard_size=50KB") == 0
    assert "largest_logit_difference" in capsys.readouterr().out
    theirs = LlavaForConditionalGeneration.from_pretrained(exported)
    projector = theirs.model.multi_modal_projector
    assert torch.equal(projector.linear_2.weight, made.projector.state_dict()["2.weight"])
    assert run("export", native, tmp_path / "back", "--format", "original") == 0
    name = "model.layers.1.mlp.up_proj.weight"
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back[name], made.language.state_dict()[name])


def test_a_head_that_is_the_embedding_goes_through_both_layouts(
    tmp_path: Path, picture: Path
) -> None:
    model = make_model({**HEADS_OF_16, "tie_word_embeddings": True})
    save_model(model, tmp_path / "native")
    for layout in ("original", "hf"):
        out = tmp_path / layout
        assert run("export", tmp_path / "native", out, "--format", layout) == 0
        assert str(tmp_path) not in (out / "config.json").read_text()
        loaded = llavakit.load(out, device="cpu")
        torch.testing.assert_close(
            loaded.logits("what ?", [picture]), model.logits("what ?", [picture])
        )
        assert run("import", out, tmp_path / f"{layout}-native") == 0
        assert run("export", tmp_path / f"{layout}-native", tmp_path / "again", "--format",
                   layout) == 0  # fmt: skip
        first, again = (
            {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
            for folder in (out, tmp_path / "again")
        )
        assert first == again
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("arguments", [
    ("import", "checkpoint", "out"),  # no vision tower
    ("import", "checkpoint", "out", "--vision", "clip", "--base", "nowhere"),
    ("import", "checkpoint", "out", "--vision", "clip", "--template", "nonsense"),
    ("export", "checkpoint", "out", "--vision", "clip", "--format", "hf",
     "--set", "max_shard_size=huge"),
    ("export", "checkpoint", "out", "--vision", "clip", "--format", "hf", "--set", "projector=x"),
])  # fmt: skip
def test_what_the_user_can_mend_gives_exit_code_2_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert "Traceback" not in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "clip"]


def test_a_model_folder_can_be_asked_with_another_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_hf(tmp_path / "hf")
    assert run("import", tmp_path / "hf", tmp_path / "native") == 0
    caplog.clear()
    with caplog.at_level(logging.WARNING, "llavakit"):
        own = llavakit.load(tmp_path / "native", device="cpu")
        other = llavakit.load(tmp_path / "native", device="cpu", template="llava_v0")
    assert (own.template.name, other.template.name) == ("vicuna_v1", "llava_v0")
    assert not caplog.text


# -- tokenizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False},
    {"tokenizer_class": "LLaMATokenizer"},  # as the first releases spelt it
    {},
    None,
])  # fmt: skip
def test_a_bare_tokenizer_model_is_read_as_llamas(
    tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    shutil.copy(LLAMA, tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(tmp_path, "llama")
    oracle = SentencePieceProcessor(model_file=str(LLAMA))
    for text in ("a b", "USER: ", "\nWhat  is it?"):
        assert tokenizer(text)["input_ids"] == [1, *oracle.encode(text)]


@pytest.mark.parametrize("legacy", [True, False])
def test_llamas_own_tokenizer_through_both_layouts(
    tmp_path: Path, legacy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The ids of the original, cut at the image, stay; transformers' processor is compared."""
    from tests.conftest import LANGUAGE
    from transformers import AutoProcessor

    pieces = SentencePieceProcessor(model_file=str(LLAMA))
    size = pieces.get_piece_size()  # 32,000
    made = make(tmp_path, language={**LANGUAGE, "vocab_size": size})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made.folder / name).unlink()
    shutil.copy(LLAMA, made.folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy}
    (made.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run("import", made.folder, tmp_path / "native", "--vision", made.tower) == 0
    native = llavakit.load(tmp_path / "native", device="cpu")
    ids = native.prompt("Hi", pictures(1)).ids.tolist()
    at = ids.index(-200)
    assert ids[at - 1] == pieces.piece_to_id("▁")  # the space that a stretch of text ends with
    # and begins with, a newline, "Hi"
    assert ids[at + 1 : at + 4] == [pieces.piece_to_id(piece) for piece in ("▁", "<0x0A>", "Hi")]
    assert run("export", tmp_path / "native", tmp_path / "hf", "--format", "hf") == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    assert processor.image_token_id == size
    text = "".join(
        segment.text
        for segment in native.template.segments(
            [llavakit.Turn("human", "<image>\nHi")], native.language.tokenizer
        )
    )
    theirs = processor(text=[text], images=pictures(1))["input_ids"][0]
    mine = native.prompt("Hi", pictures(1)).ids.tolist()
    expanded = mine[:at] + [size] * native.visual_tokens + mine[at + 1 :]
    if legacy:
        assert theirs == expanded
    else:  # one space fewer, and the export says so
        assert theirs == [*expanded[: at + 16], *expanded[at + 17 :]]
        assert "transformers' processor tokenises the text behind an image otherwise" in caplog.text
    assert run("export", tmp_path / "native", tmp_path / "original", "--format", "original") == 0
    again = llavakit.load(tmp_path / "original", device="cpu")
    assert again.prompt("Hi", pictures(1)).ids.tolist() == mine
