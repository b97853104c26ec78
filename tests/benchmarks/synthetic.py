"""Samples that are computed, not stored: for benchmarks with more of them than anyone keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llavakit import Dataset, PromptTemplate, Registry, Sample, Turn, Use, View, Views

_WORDS = (
    "a", "red", "blue", "green", "small", "large", "old", "new", "cat", "dog", "house", "tree",
    "sits", "stands", "runs", "on", "under", "near",
)  # fmt: skip
IMAGES = 4096


class Synthetic(Dataset):
    """Conversations of one or two turns, every second one about an image of a folder."""

    name = "synthetic"

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Sample:
        count = len(_WORDS)
        words = [_WORDS[(index * 7 + at * at) % count] for at in range(4 + index % 37)]
        half = len(words) // 2
        turns = Turn("human", " ".join(words[:half])), Turn("gpt", " ".join(words[half:]))
        if index % 2:
            return Sample(f"synthetic-{index}", turns)
        image = Path(f"/data/coco/train2017/{index % IMAGES:012}.jpg")
        question = Turn("human", f"<image>\n{turns[0].text}")
        return Sample(f"synthetic-{index}", (question, turns[1]), (image,))


def small_model() -> tuple[Any, PromptTemplate]:
    """Return what tokenising asks of a model, and its template."""
    words = ["[UNK]", "<s>", "</s>", "USER", "ASSISTANT", ":", ".", ",", "'", *_WORDS]
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
    model = SimpleNamespace(
        views=Views(None, View(336, 16)),
        visual_tokens=16,
        language=SimpleNamespace(tokenizer=tokenizer, max_length=2048),
    )
    template = Registry.installed().build(
        Use[PromptTemplate].model_validate({"use": "vicuna_v1", "system": ""})
    )
    return model, template
