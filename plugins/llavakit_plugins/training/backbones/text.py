"""Trains a small language model on text alone, before it ever meets an image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llavakit import (
    Encoded,
    Generator,
    ImageContext,
    LanguageModel,
    PackedBatch,
    PromptTemplate,
    Run,
    Segment,
    pack,
    tokenise,
)
from llavakit.contracts.data import IMAGE, ResponseKind
from llavakit_plugins.training.backbones.loop import optimise, shuffled
from llavakit_plugins.training.optimiser import Group, Optimiser, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# captions alone say again what the first said, which teaches to look it up, as questions do
_KINDS: tuple[ResponseKind | None, ...] = (
    *(None,) * 3,
    *("conversation",) * 5,
    "detail",
    "reasoning",
)


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=48, ge=1)
    """Documents of a step."""
    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)


Document = list[Segment]
_WORD = re.compile(r"[^\W_]+")


def documents(
    contexts: Sequence[ImageContext],
    generator: Generator,
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> Iterator[Document]:
    """Yield one document a context: all its captions, or a dialogue about one of them.

    In front stand the words of one caption in any order, where the image will be. So the model
    learns to find what a question asks for by what it is and not by what it stands behind: the
    patches of an image have no grammar. Nothing else of a document goes unlearned but questions.
    Of `tokenizer` only the special tokens matter.
    """
    draw = np.random.default_rng([seed, 3])
    end = Segment(str(tokenizer.eos_token), markup=True)
    for context in contexts:
        captions = [str(caption) for caption in draw.permutation(context.captions)]
        kind = _KINDS[int(draw.integers(len(_KINDS)))]
        words = " ".join(map(str, draw.permutation(_WORD.findall(captions[0].lower()))))
        if kind is None:
            text = Segment(f"\n{' '.join(captions)}", supervised=True)
            yield [Segment(words), text, replace(end, supervised=True)]
            continue
        turns = generator.generate(context, kind)
        yield [
            Segment(segment.text.replace(IMAGE, words), segment.supervised, segment.markup)
            for segment in template.segments(turns, tokenizer)
        ]


def train_language(
    language: LanguageModel, corpus: Sequence[Document], options: TextOptions, run: Run
) -> list[tuple[int, float]]:
    """Train `language` on the learned tokens of the documents; return the losses by step."""
    encoded: list[Encoded] = []
    for document in corpus:
        ids, supervised = tokenise(document, language.tokenizer)
        encoded.append(Encoded(ids, supervised, language.max_length))
    language.train()
    named = dict(language.named_parameters())
    device = next(iter(named.values())).device
    decayed = {name: p for name, p in named.items() if p.ndim > 1 and "embed" not in name}
    others = {name: p for name, p in named.items() if name not in decayed}
    groups = [Group(decayed, options.lr, options.weight_decay), Group(others, options.lr)]
    schedule = Schedule(options.steps, options.warmup)
    optimiser = Optimiser(groups, schedule, betas=(0.9, 0.98))

    def batch(step: int) -> PackedBatch:
        begin = step * options.batch_size
        positions = range(begin, begin + options.batch_size)
        chosen = shuffled(positions, len(encoded), run.seed, 4)
        return pack([encoded[index] for index in chosen], chosen, visual_tokens=1).to(device)

    def loss_of(step: int) -> Tensor:
        packed = batch(step)
        hidden_ME = language.hidden(
            language.embed(packed.token_ids_T), packed.packing, packed.supervised_rows
        )
        return language.loss(hidden_ME, packed.targets_M) / len(packed.targets_M)

    losses = optimise(run, "language", optimiser, loss_of)
    language.eval()
    return losses
