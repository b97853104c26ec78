"""Where LLaMA's tokenizers put a space in front of texts, whichever files say it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from tests import published
from transformers import AutoTokenizer

from llavakit import ModelError, Reader
from llavakit_plugins.checkpoints.tokenizers import read_tokenizer
from llavakit_plugins.huggingface.tokenizer_writing import write_tokenizer
from llavakit_plugins.huggingface.tokenizers import find_tokenizer

SETTINGS = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
SCHEMES = {
    "always": {"legacy": True},
    "first": {"legacy": False},
    "never": {"legacy": False, "add_prefix_space": False},
}
TEXT = "USER: What is it? ASSISTANT: a cat.</s>USER: Are you sure?"


def bare(folder: Path, model: Path, **settings: Any) -> Path:
    """Write a folder that holds SentencePiece's file alone."""
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def described(folder: Path, model_type: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_tokenizer_reads_as_it_did(scheme: str, tmp_path: Path) -> None:
    """A turn behind an end token begins with the same tokens once a model folder is loaded."""
    made = find_tokenizer(str(bare(tmp_path / "bare", published.llama(), **SCHEMES[scheme])))
    assert Reader.of(made).scheme == scheme
    (tmp_path / "model").mkdir()
    write_tokenizer(made, tmp_path / "model")
    ids = made(TEXT)["input_ids"]
    for kind in ("llama", "llava"):  # as a language model's own folder, and as LLaVA's
        folder = described(tmp_path / "model", kind)
        assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == ids
        assert find_tokenizer(str(folder))(TEXT)["input_ids"] == ids
        assert read_tokenizer(folder, "llama")(TEXT)["input_ids"] == ids


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("stated", [{}, {"legacy": False}, {"legacy": True}])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_of_a_folder_in_the_layout_hf_says_it(
    scheme: str, stated: dict[str, bool], name: str, tmp_path: Path
) -> None:
    """By transformers' own processor, which goes by tokenizer.json, whatever is beside it."""
    made = find_tokenizer(str(bare(tmp_path / "bare", published.llama(), **SCHEMES[scheme])))
    folder = tmp_path / "hf"
    made.save_pretrained(folder)
    table = json.loads((folder / "tokenizer_config.json").read_text())
    table.pop("add_prefix_space", None)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(table | stated | {"tokenizer_class": name})
    )
    theirs = AutoTokenizer.from_pretrained(described(folder, "llava"))
    found = read_tokenizer(folder, "llama")
    assert found(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert Reader.of(found).scheme == scheme


def test_a_file_of_before_the_setting_puts_a_space_always(tmp_path: Path) -> None:
    made = find_tokenizer(str(bare(tmp_path / "bare", published.llama(), legacy=True)))
    (tmp_path / "model").mkdir()
    write_tokenizer(made, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    table = json.loads(settings.read_text())
    assert table.pop("legacy") is True
    settings.write_text(json.dumps(table))
    found = read_tokenizer(described(tmp_path / "model", "llava"), "llama")
    assert found(TEXT)["input_ids"] == made(TEXT)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"model_type": "unigram"}, "not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "letters are normalised"),
        ({"remove_extra_whitespaces": True}, "spaces are left out"),
        ({"add_dummy_prefix": False}, "no space in front"),
    ],
)
def test_a_model_of_another_kind_than_llamas_is_refused(
    kind: dict[str, Any], said: str, tmp_path: Path
) -> None:
    llamas: dict[str, Any] = {
        "model_type": "bpe", "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": True,
    }  # fmt: skip
    draw = [f"this is a picture of {n} dogs and   {n * 7} cats, number {n}" for n in range(300)]
    for number, changes in enumerate(({}, kind)):
        model = tmp_path / f"{number}.model"
        with model.open("wb") as file:
            SentencePieceTrainer.train(
                sentence_iterator=iter(draw), model_writer=file, vocab_size=360,
                byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
                **(llamas | changes),
            )  # fmt: skip
        if not changes:
            assert len(find_tokenizer(str(model))) > 300
            continue
        for source in (model, bare(tmp_path / "folder", model)):
            with pytest.raises(ModelError, match=f"is not of LLaMA's kind .{said}"):
                find_tokenizer(str(source))
        with pytest.raises(ModelError, match="is not of LLaMA's kind"):
            read_tokenizer(tmp_path / "folder", "llama")
