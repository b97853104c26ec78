"""Thousands of conversations have the ids that transformers' own LLaMA tokenizer gives."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest
from tests import published
from tests.benchmarks import conversations
from transformers import LlamaTokenizer

from llavakit import Encoder, Ids, PromptTemplate, Registry, Sample, Turn, Use
from llavakit_plugins.huggingface.tokenizers import find_tokenizer

# without runs of spaces, which transformers does not read as SentencePiece does
ODD = [
    ("What is 3 + 4?\nSay it twice.", "It is 7.\n\n- 7\n- seven\n"),
    ("Où est le café ☕ ?", "À côté de l'école, 日本語も 🐱."),
    ("Is `x<y` true?", 'Only where "x" is less: x<y; (e.g. 1<2)…'),
    ("\n", "An answer to no question."),
    ("CamelCase_and_snake, 1234567890?", "https://example.org/a?b=c&d=%20e"),
]


@published.needs("tokenizer")
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2"])
def test_ids_are_those_of_transformers_for_the_whole_prompt(template: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(published.llama())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = LlamaTokenizer.from_pretrained(tmp_path)
    ours = find_tokenizer(str(published.llama()))
    rendered = Registry.installed().build(Use[PromptTemplate].model_validate({"use": template}))
    encoder = Encoder(rendered, ours)
    several = [*conversations.short(1000), *conversations.long(2000), ODD, ODD[::-1]]
    for number, said in enumerate(several):
        turns = [
            turn
            for question, answer in said
            for turn in (Turn("human", question), Turn("gpt", answer))
        ]
        found = Ids(array("i"), bytearray())
        encoder.read(Sample(str(number), tuple(turns)), found)
        prompt = "".join(segment.text for segment in rendered.segments(turns, ours))
        assert found.ids.tolist() == theirs(prompt)["input_ids"], prompt
