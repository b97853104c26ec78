"""Computes the price of a job: all requests are counted before the first one is sent."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from llavakit import Generator, ImageContext, LlavaError, Message
from llavakit.contracts.data import ResponseKind
from llavakit.contracts.run import StepPlan
from llavakit_plugins.generation.items import Items, choose
from llavakit_plugins.generation.requests.booking import counts_all
from llavakit_plugins.generation.requests.desk import Desk, attempt
from llavakit_plugins.generation.requests.prompted import PromptedGenerator
from llavakit_plugins.generation.requests.rounds import MOST, Invented, Waiting
from llavakit_plugins.generation.requests.tokens import ESTIMATE, Counter
from llavakit_plugins.generation.sources import open_sources

if TYPE_CHECKING:
    from llavakit_plugins.generation.options import GenerateOptions

_TRIED = 4  # conversations of each kind that a generator of others is called for
_REPLIES: dict[ResponseKind, int] = {"conversation": 270, "detail": 145, "reasoning": 196}
_USUAL = 200  # of other sorts
"""Tokens of a usual reply: the median of the examples that the built-in prompts show."""


def price_job(options: GenerateOptions, generator: PromptedGenerator, seed: int) -> StepPlan:
    """Return the plan of a job with its price.

    Input tokens are counted exactly; replies are assumed to be as long as those of the examples.
    """
    generator.images = options.images
    files = [path for path in (options.contexts, options.held_out) if path is not None]
    if not all(path.is_file() for path in files):
        return _by_examples(options, generator)
    chat = generator.chat
    sent = made = count = failed = 0
    seen = True
    expected = {
        kind: chat.count([Message("assistant", generator.expected_reply(kind))])
        for kind in options.kinds
    }
    shown = generator.shows_images
    with (
        TemporaryDirectory() as folder,
        open_sources(options, Path(folder), shown=shown) as sources,
    ):
        for name, contexts in sources.items():
            counts = options.counts if not name else {}
            share = options.share(len(contexts))
            items = Items(contexts, options.kinds, counts, generator, 1, seed, share=share)
            for context, kind in items.pairs():
                count += 1
                try:
                    messages = generator.messages(context, kind)
                    sent += chat.count(messages)
                    seen = seen and counts_all(chat, messages)
                except LlavaError:
                    raise
                except Exception:  # a plugin's bug: the job reports it and makes the others
                    failed += 1
                else:
                    made += expected[kind]
    plan = _plan(generator, count - failed, sent, made, "counted", images=seen)
    note = f"generator `{generator.name}` fails at {failed} of {count} contexts; {plan.note}"
    return plan.model_copy(update={"note": note}) if failed else plan


def _by_examples(options: GenerateOptions, generator: PromptedGenerator) -> StepPlan:
    """Return the plan if the contexts do not exist yet: estimated from the examples."""
    if any(kind not in options.counts for kind in options.kinds):
        note = "no price yet: the contexts are not there; say `counts` for each kind"
        return StepPlan(note=note)
    chat = generator.chat
    counts = {kind: len(options.share(options.counts[kind])) for kind in options.kinds}
    nothing = ImageContext("", "", ())
    sent = made = 0
    for kind in options.kinds:
        messages = generator.messages(nothing, kind)
        told = [message for message in messages if message.role == "user"][:-1]
        each = chat.count(messages) + (chat.count(told) // len(told) if told else 0)
        reply = chat.count([Message("assistant", generator.expected_reply(kind))])
        sent += counts[kind] * each
        made += counts[kind] * reply
    count = sum(counts.values())
    known = not generator.shows_images  # their sizes are not
    return _plan(generator, count, sent, made, "estimated", images=known)


def price_own(options: GenerateOptions, generator: Generator, desk: Desk, seed: int) -> StepPlan:
    """Return the plan of a job whose generator asks its chat models in its own way.

    It is called for a few contexts, with invented replies as long as the paper's. Requests, and the
    tokens sent, are those of these few. `desk` is the one that the generator was built with.
    """
    files = [path for path in (options.contexts, options.held_out) if path is not None]
    if not all(path.is_file() for path in files):
        return StepPlan(note="no price yet: the contexts are not there")
    tried = total = broken = 0
    asked = Invented("")
    with TemporaryDirectory() as folder, open_sources(options, Path(folder)) as sources:
        for name, contexts in sources.items():
            counts = options.counts if not name else {}
            chosen = choose(len(contexts), options.kinds, counts, seed)
            share = options.share(len(contexts))
            for kind, mask in chosen.items():
                indices = share.start + np.flatnonzero(mask[share.start : share.stop])
                total += len(indices)
                for index in indices[:: max(1, len(indices) // _TRIED)][:_TRIED]:
                    tried += 1
                    asked.text, asked.left = " ".join(["word"] * _REPLIES.get(kind, _USUAL)), MOST
                    try:
                        with desk.answering_by(asked), attempt(0, ""):
                            generator.generate(contexts[int(index)], kind)
                    except (Exception, Waiting):  # the invented reply is none that it can use
                        broken += 1
    if not asked.requests:
        why = "fails with invented replies" if broken else "asked nothing"
        note = f"generator `{generator.name}` {why} at {tried} contexts"
        return StepPlan(samples=total, note=f"no price yet: {note}; `budget_usd` bounds it")
    times = total / tried
    prices = [
        chat.price(round(times * sent), round(times * asked.made[chat]))
        for chat, sent in asked.sent.items()
    ]
    usd = (
        None
        if None in prices or not asked.known
        else sum(price for price in prices if price is not None)
    )
    least = "at least " if broken else ""
    parts = [
        f"{least}{round(times * asked.requests):,} requests for {total:,} conversations, as "
        f"`{generator.name}` asks for {tried} of them with invented replies",
        f"about {round(times * sum(asked.sent.values())):,} tokens sent",
        f"about {round(times * sum(asked.made.values())):,} in replies as long as the paper's",
        f"no price is known; state `{'price' if asked.known else 'image_tokens'}` beside the model"
        if usd is None
        else f"{least or 'about '}{usd:,.2f} USD",
        "`budget_usd` bounds it",
    ]
    return StepPlan(samples=total, cost_usd=usd, note="; ".join(parts))


def _plan(
    generator: PromptedGenerator, requests: int, sent: int, made: int, how: str, *, images: bool
) -> StepPlan:
    """Return the plan; `images` says whether it is known what the images count as."""
    chat = generator.chat
    usd = chat.price(sent, made) if images else None
    counter: Counter | None = getattr(chat, "counter", None)
    exact = counter is not None and counter.exact
    by = f"as {counter.vocabulary}" if counter is not None and exact else ESTIMATE
    parts = [
        f"{requests:,} requests",
        f"{sent:,} tokens sent ({how}; {by})",
        f"about {made:,} in replies as long as the examples'",
    ]
    if not images:
        parts.append("what its images count as is not known; state `image_tokens` beside the model")
    elif usd is None:
        parts.append("no price is known; state `price` beside the model")
    else:
        parts.append(f"about {usd:,.2f} USD")
        if chat.reply_limit:
            most = chat.price(sent, requests * chat.reply_limit)
            parts.append(f"at most {most:,.2f} USD if every reply took {chat.reply_limit} tokens")
        parts.append("replies that are asked for again cost extra")
    return StepPlan(samples=requests, cost_usd=usd, note="; ".join(parts))
