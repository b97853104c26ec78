"""Trains a small language model on text alone, before it ever meets an image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
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
from llavakit_plugins.training.backbones.loop import Training, shuffled, updates_of
from llavakit_plugins.training.backbones.options import TextOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# How often each kind of document is drawn; None is a document of captions alone. Several captions
# of one image repeat each other, so the model learns to look facts up, as it must for questions.
_KINDS: tuple[ResponseKind | None, ...] = (
    *(None,) * 3,
    *("conversation",) * 5,
    "detail",
    "reasoning",
)


Document = list[Segment]
_WORD = re.compile(r"[^\W_]+")


def documents(
    contexts: Sequence[ImageContext],
    generator: Generator,
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> Iterator[Document]:
    """Yield one document for each context: all its captions, or a dialogue about one of them.

    Each document begins with the words of one caption in random order, at the position where the
    image will be later. The patches of an image have no grammar either, so the model learns to find
    a fact by its content and not by its neighbours. Everything is supervised except these words and
    the questions. Only the special tokens of `tokenizer` are used.
    """
    draw = np.random.default_rng([seed, 3])
    end = Segment(str(tokenizer.eos_token), markup=True)
    for context in contexts:
        captions = [str(caption) for caption in draw.permutation(context.captions)]
        kind = _KINDS[int(draw.integers(len(_KINDS)))]
        words = " ".join(map(str, draw.permutation(_WORD.findall(captions[0].lower()))))
        if kind is None:
            text = Segment(f"\n{' '.join(captions)}", supervised=True)
            yield [Segment(words), text, end._replace(supervised=True)]
            continue
        turns = generator.generate(context, kind)
        yield [
            Segment(segment.text.replace(IMAGE, words), segment.supervised, segment.markup)
            for segment in template.segments(turns, tokenizer)
        ]


def language_training(
    language: LanguageModel, corpus: Sequence[Document], options: TextOptions, run: Run
) -> Training:
    """Return the training of `language`, in place, on the supervised tokens of the documents."""

    @cache
    def read() -> list[Encoded]:
        # when the first step needs it, beside other trainings: in a process that is forked for it
        both = (tokenise(document, language.tokenizer) for document in corpus)
        return [Encoded(ids, supervised, language.max_length) for ids, supervised in both]

    language.train()
    updates = updates_of(language, options, run)
    device = next(iter(updates.named.values())).device

    def batch(step: int) -> PackedBatch:
        begin = step * options.batch_size
        positions = range(begin, begin + options.batch_size)
        encoded, chosen = read(), shuffled(positions, len(corpus), run.seed, 4)
        return pack([encoded[index] for index in chosen], chosen, visual_tokens=1).to(device)

    def loss_of(step: int) -> Tensor:
        packed = batch(step)
        hidden_ME = language.hidden(
            language.embed(packed.token_ids_T), packed.packing, packed.supervised_rows
        )
        return language.loss(hidden_ME, packed.targets_M) / len(packed.targets_M)

    return Training("language", updates, options.steps, loss_of, language.eval)
