from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from sentencepiece import SentencePieceProcessor
from tests import published
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llavakit_plugins.huggingface.words import by_words


@pytest.fixture(
    scope="session",
    params=[pytest.param(True, marks=published.needs("tokenizer")), False],
    ids=["published", "trained"],
)
def model(request: pytest.FixtureRequest) -> Path:
    """LLaMA's SentencePiece model, and one like it."""
    return published.llama(published=request.param)


@pytest.fixture(scope="session")
def sentencepiece(model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(model))


@pytest.fixture(scope="session", params=[True, False], ids=["legacy", "not-legacy"])
def llama(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    """LLaMA's tokenizer as transformers loads it, with both values of `legacy`."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(model, folder / "tokenizer.model")
    # without `add_bos_token` transformers 5 adds no <s>; published LLaMA folders say true
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": request.param, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    in_order_of_scores(tokenizer, SentencePieceProcessor(model_file=str(model)))
    return by_words(tokenizer)


def in_order_of_scores(
    tokenizer: PreTrainedTokenizerBase, sentencepiece: SentencePieceProcessor
) -> None:
    """Merge as SentencePiece does.

    transformers 5.23 reads the merges of a bare tokenizer.model in order of ids, which for runs
    of spaces is not that of scores: `a  b` becomes `▁a ▁▁ b` instead of `▁a ▁ ▁b`.
    """
    backend: Any = cast(Any, tokenizer).backend_tokenizer
    data = json.loads(backend.to_str())
    size = sentencepiece.get_piece_size()
    scores = {sentencepiece.id_to_piece(n): sentencepiece.get_score(n) for n in range(size)}
    data["model"]["merges"].sort(key=lambda pair: -scores["".join(pair)])
    backend.model = type(backend).from_str(json.dumps(data)).model
