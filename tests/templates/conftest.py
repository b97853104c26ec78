from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llavakit_plugins.huggingface.words import by_words

MODEL = Path(__file__).parents[3] / "shared/data/tokenizer/llama2.model"


@pytest.fixture(scope="session")
def sentencepiece() -> SentencePieceProcessor:
    if not MODEL.is_file():
        pytest.skip(f"{MODEL} is absent")
    return SentencePieceProcessor(model_file=str(MODEL))


@pytest.fixture(scope="session", params=[True, False], ids=["legacy", "not-legacy"])
def llama(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    """LLaMA's tokenizer as transformers loads it, with both values of `legacy`."""
    if not MODEL.is_file():
        pytest.skip(f"{MODEL} is absent")
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(MODEL, folder / "tokenizer.model")
    # without `add_bos_token` transformers 5 adds no <s>; published LLaMA folders say true
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": request.param, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    in_order_of_scores(tokenizer, SentencePieceProcessor(model_file=str(MODEL)))
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
    scores = {sentencepiece.id_to_piece(n): sentencepiece.get_score(n) for n in range(32000)}
    data["model"]["merges"].sort(key=lambda pair: -scores["".join(pair)])
    backend.model = type(backend).from_str(json.dumps(data)).model
