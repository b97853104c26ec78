"""Configurations, weights and tokenizers from folders."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tests import published
from tests.conftest import make_tokenizer

from llavakit import ModelError
from llavakit.cli import main
from llavakit_plugins.huggingface.hub import (
    PretrainedOptions,
    load_tokenizer,
    missing_source,
    read_config,
)
from llavakit_plugins.huggingface.tokenizer_faults import without_panics
from llavakit_plugins.huggingface.tokenizers import find_tokenizer

LLAMA = published.llama()


def test_a_bare_sentencepiece_model_gives_sentencepiece_ids(tmp_path: Path) -> None:
    shutil.copy(LLAMA, tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path))
    oracle = SentencePieceProcessor(model_file=str(LLAMA))
    for text in ("a  b", "Hello,   world", "x" + " " * 9 + "y", "two\n\n  lines", "日本 🐱"):
        assert tokenizer(text)["input_ids"] == [1, *oracle.encode(text)]


@pytest.mark.parametrize("bare", [True, False], ids=["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_a_tokenizer_that_was_saved_puts_spaces_as_before(
    tmp_path: Path, bare: bool, legacy: bool | None
) -> None:
    """A model is asked with the tokens that it learnt from: behind `</s>`, too."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    shutil.copy(LLAMA, source / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if not bare:
        load_tokenizer(str(source)).save_pretrained(source)
        (source / "tokenizer.model").unlink()
    settings |= {} if legacy is None else {"legacy": legacy}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(source))
    hello = tokenizer("</s>hello")["input_ids"]
    word = "▁hello" if legacy else "hello"  # 22172 with a space in front, 12199 without
    assert hello == [1, 2, SentencePieceProcessor(model_file=str(LLAMA)).piece_to_id(word)]
    tokenizer.save_pretrained(saved)
    again = load_tokenizer(str(saved))
    for text in ("</s>hello", "USER: a\nASSISTANT: b</s>USER: c", "a  b</s> d"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_whole_clip_gives_its_vision_half(tmp_path: Path) -> None:
    table = {"model_type": "clip", "vision_config": {"hidden_size": 32}, "projection_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(table))
    found = read_config(PretrainedOptions(source=str(tmp_path), config={"image_size": 64}))
    assert found["hidden_size"] == 32
    assert found["image_size"] == 64


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(ModelError, match=r"`nobody/nothing` is neither a folder .*hf download"):
        read_config(PretrainedOptions(source="nobody/nothing"))


def test_known_names_have_their_published_size() -> None:
    from llavakit.engine.plan import count_parameters
    from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions
    from llavakit_plugins.vision.clip import Clip, ClipOptions

    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        clip = Clip(ClipOptions(source="openai/clip-vit-large-patch14"))
        vicuna = Vicuna(VicunaOptions(source="lmsys/vicuna-7b-v1.5"))
    assert count_parameters(clip) == 303_179_776  # as transformers counts the published weights
    assert count_parameters(vicuna) == 6_738_415_616
    assert clip.tokens(224) == 256


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    sentence = missing_source("vision encoder", PretrainedOptions(source=str(tmp_path)))
    assert sentence is not None
    assert "holds no model.safetensors" in sentence


def test_legacy_decides_on_the_space_behind_special_tokens(tmp_path: Path) -> None:
    shutil.copy(LLAMA, tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for legacy, pieces in ((True, ["▁US", "ER"]), (False, ["USER"])):
        tokenizer = load_tokenizer(str(tmp_path), legacy=legacy)
        saved = tmp_path / f"legacy-{legacy}"
        tokenizer.save_pretrained(saved)  # now with a tokenizer.json
        for made in (tokenizer, load_tokenizer(str(saved))):
            ids = made("ok</s>USER")["input_ids"]
            assert made.convert_ids_to_tokens(ids) == ["<s>", "▁ok", "</s>", *pieces]


@pytest.mark.parametrize("find", [load_tokenizer, find_tokenizer])
def test_a_protobuf_that_sentencepiece_does_not_go_with_is_named(
    tmp_path: Path, find: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is not: transformers takes it for tiktoken's then."""
    shutil.copy(LLAMA, tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.delattr("sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(ModelError, match=r"sentencepiece and protobuf.*upgrade protobuf") as caught:
        find(str(tmp_path))
    assert "copy it again" not in str(caught.value)


def test_legacy_of_another_tokenizer_is_refused(backbones: Path) -> None:
    with pytest.raises(ModelError, match=r"SentencePiece tokenizers, and that of .* is none"):
        load_tokenizer(str(backbones / "language"), legacy=True)


def test_a_tokenizer_that_makes_rust_panic_is_a_sentence_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rust's own lines of a panic do not reach the terminal; other lines there are kept."""
    folder = tmp_path / "language"
    make_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text())
    table["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(table))
    (tmp_path / "rows.json").write_text("[]")
    for source in (folder, path):
        with without_panics():
            os.write(2, b"kept\n")
        with pytest.raises(ModelError, match="gives no tokenizer"):
            find_tokenizer(str(source))
    with pytest.raises(ModelError, match=r"tokenizer in .*language cannot be read"):
        load_tokenizer(str(folder))
    out, err = capfd.readouterr()
    assert "panicked" not in out + err
    assert err.count("kept") == 2
    assert main(["check-data", str(tmp_path / "rows.json"), "--tokenizer", str(folder)]) == 2
    assert capfd.readouterr().err.startswith(f"error: `{folder}` gives no tokenizer")


@pytest.mark.parametrize("where", ["vocab", "added"])
def test_a_tokenizer_whose_ids_would_fill_the_memory_is_refused(tmp_path: Path, where: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    table = json.loads(path.read_text())
    if where == "vocab":
        table["model"]["vocab"]["shape"] = 10**9
    else:
        table["added_tokens"][0]["id"] = 10**9
    path.write_text(json.dumps(table))
    for read in (load_tokenizer, find_tokenizer):
        with pytest.raises(ModelError, match="the id 1000000000, and no vocabulary is that large"):
            read(str(tmp_path))
