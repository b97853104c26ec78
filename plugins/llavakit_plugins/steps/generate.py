"""Generates instruction-following data from captions and boxes (paper, section 3)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llavakit import (
    ChatModel,
    Generator,
    ImageContext,
    Options,
    Outcome,
    Run,
    Step,
    Stopped,
    Use,
    explain_write,
    kind_of,
)
from llavakit.contracts.data import IMAGE, ResponseKind
from llavakit.contracts.run import Planner, StepPlan
from llavakit.contracts.sections import Card, Gallery, Table
from llavakit_plugins.generation.contexts import Contexts
from llavakit_plugins.generation.conversations import Failures, Keeping, checked
from llavakit_plugins.generation.items import choose
from llavakit_plugins.generation.options import GenerateOptions
from llavakit_plugins.generation.output import text_list, to_text
from llavakit_plugins.generation.requests.desk import AtDesk, Desk
from llavakit_plugins.generation.requests.prompted import PromptedGenerator
from llavakit_plugins.generation.rows import (
    BRIEF,
    Row,
    brief_questions as brief_questions,
    caption_row,
    find_image,
    row_of,
)
from llavakit_plugins.generation.sources import open_sources

_SHOWN = 9

Made = tuple[ImageContext, ResponseKind, Row]


class Generate(Step):
    """Leaves `captions.json` for stage 1, and `KIND.json` and `instruct.json` for stage 2."""

    name = "generate"
    Options = GenerateOptions

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options

    @classmethod
    def plan(cls, options: GenerateOptions, planner: Planner) -> StepPlan | None:
        desk = Desk()
        generator = planner.build(options.generator, build=desk.building(planner.build))
        if isinstance(generator, PromptedGenerator):
            from llavakit_plugins.generation.price import price_job

            _ask_directly(generator)
            return price_job(options, generator, planner.seed)
        if not (desk.chats or _names_chat(generator)):
            return None
        from llavakit_plugins.generation.price import price_own

        return price_own(options, generator, desk, planner.seed)

    def run(self, run: Run) -> Outcome:
        desk = Desk()
        generator = run.build(self.options.generator, build=desk.building(run.build))
        if isinstance(generator, PromptedGenerator):
            from llavakit_plugins.generation.job import run_job

            _ask_directly(generator)
            return run_job(self.options, generator, run)
        if desk.chats or _names_chat(generator):
            from llavakit_plugins.generation.own import run_own_job

            return run_own_job(self.options, generator, desk, run)
        return self._at_once(generator, run)

    def _at_once(self, generator: Generator, run: Run) -> Outcome:
        """Write the data of a generator that needs no waiting, no retries and no money."""
        counts: dict[str, int] = {}
        shown: list[Card] = []
        kept = Keeping(run.directory, self.options)
        failures = Failures(generator.name, run.directory / "failures.txt")
        with open_sources(self.options, run.directory) as sources, kept.unless_done(failures):
            for name, contexts in sources.items():
                folder = run.directory / name
                with explain_write(folder):
                    folder.mkdir(exist_ok=True)
                labels = ("captions", "instruct", *self.options.kinds)
                found = dict.fromkeys(labels, 0)
                share = self.options.share(len(contexts))
                chosen = choose(
                    len(contexts), self.options.kinds, {} if name else self.options.counts, run.seed
                )
                cards = _Cards(run.directory, self.options, chosen, share)
                # row by row: a job may have millions
                with ExitStack() as stack:
                    write = {
                        label: stack.enter_context(text_list(folder / f"{label}.json"))
                        for label in labels
                    }
                    told = _captioned(contexts, share, run.seed, write["captions"])
                    found["captions"] = len(share)
                    samples = self._samples(generator, told, chosen, share, name, run, kept,
                                            failures)  # fmt: skip
                    for context, kind, row in samples:
                        cards.see(context, kind, row)
                        text = to_text(row)
                        for label in ("instruct", kind):
                            write[label](text)
                            found[label] += 1
                counts |= {f"{name}/{label}".lstrip("/"): n for label, n in found.items()}
                shown = shown or cards.cards()
        table = Table(
            title="Samples by file",
            columns=["file", "samples"],
            rows=[[name, count] for name, count in counts.items()],
        )
        metrics = {"samples": float(counts["instruct"])}
        return Outcome(metrics, [table, Gallery(title="What the teacher wrote", cards=shown)])

    def _samples(
        self,
        generator: Generator,
        contexts: Iterable[ImageContext],
        chosen: Mapping[ResponseKind, NDArray[np.bool_]],
        share: range,
        name: str,
        run: Run,
        kept: Keeping,
        failures: Failures,
    ) -> Iterator[Made]:
        """Yield every sample, in the order of the contexts."""
        for index, context in zip(share, contexts, strict=True):
            for kind in self.options.kinds:
                if chosen[kind][index]:
                    try:
                        turns = kept.get(context, kind)
                        if turns is None:
                            turns = checked(generator.generate(context, kind), context, kind)
                            kept.add(context, kind, turns)
                    except Stopped:
                        raise
                    except Exception as error:  # the others are made all the same
                        failures.add(f"{context.id}-{kind}", error, kept.count)
                        continue
                    yield context, kind, row_of(context, kind, turns)
            # every 256: asking and showing cost more than a rule-based sample does
            done = index - share.start + 1
            if done % 256 == 0 or done == len(share):
                if run.stopping():
                    raise Stopped
                run.progress(done, len(share), f"generating {name}".strip())


def _captioned(
    contexts: Contexts, share: range, seed: int, write: Callable[[str], None]
) -> Iterator[ImageContext]:
    """Yield the contexts of a share, and write the sample of stage 1 of each."""
    # from the seed alone for each source,
    # so that another source does not change this one's questions
    draw = np.random.default_rng(seed)
    for index, context in zip(range(share.stop), contexts, strict=False):
        row = caption_row(context, draw, BRIEF)  # those before the share have a draw, too
        if index in share:
            write(to_text(row))
            yield context


def _ask_directly(generator: PromptedGenerator) -> None:
    """Give a generator its chat model without the desk: the job asks it, not the generator."""
    if isinstance(generator.chat, AtDesk):
        generator.chat = generator.chat.inner


def _names_chat(generator: Generator) -> bool:
    """Say whether a generator has a chat model, or a choice of one, though it builds it late."""
    options = getattr(generator, "options", None)
    stated = vars(options).values() if isinstance(options, Options) else ()
    chosen = (use for use in stated if isinstance(use, Use) and issubclass(kind_of(use), ChatModel))
    held = (value for value in vars(generator).values() if isinstance(value, ChatModel))
    return any(True for _ in (*chosen, *held))


class _Cards:
    """Some samples of each kind, from all over the data, as a report shows them."""

    def __init__(
        self,
        folder: Path,
        options: GenerateOptions,
        chosen: Mapping[ResponseKind, NDArray[np.bool_]],
        share: range,
    ) -> None:
        self._folder, self._images = folder, options.images
        order = (*options.kinds,) * 3
        self._wanted: list[tuple[ResponseKind, int]] = []
        for number, kind in enumerate(order):
            total = int(np.count_nonzero(chosen[kind][share.start : share.stop]))
            if total:
                self._wanted.append((kind, number * max(1, total // _SHOWN) % total))
        self._seen: Counter[str] = Counter()
        self._found: dict[tuple[ResponseKind, int], Card] = {}

    def see(self, context: ImageContext, kind: ResponseKind, row: Row) -> None:
        """Keep a sample if it is to be shown; called with all of them, in order."""
        which = (kind, self._seen[kind])
        self._seen[kind] += 1
        if which in self._wanted:
            self._found[which] = self._card(context, kind, row)

    def cards(self) -> list[Card]:
        """Return those that there were."""
        return [self._found[which] for which in self._wanted if which in self._found]

    def _card(self, context: ImageContext, kind: ResponseKind, row: Row) -> Card:
        lines = [("told", context.captions[0])]
        for turn in row["conversations"]:
            label = "question" if turn["from"] == "human" else kind
            lines.append((label, turn["value"].replace(IMAGE, "").strip()))
        image = find_image(self._images, context)
        shown = None if image is None else os.path.relpath(image, self._folder)
        return Card(image=shown, lines=lines)
