"""Runs a job for a generator that calls chat models in its own way.

It gets the same ledger, budget, retries and files as any other job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llavakit import (
    ChatError,
    Generator,
    ImageContext,
    LlavaError,
    Message,
    Outcome,
    RecipeError,
    ReplyError,
    Run,
    Stopped,
)
from llavakit.contracts.data import ResponseKind
from llavakit_plugins.generation.contexts import as_text
from llavakit_plugins.generation.conversations import (
    FILE,
    Conversation,
    Conversations,
    Failures,
    checked,
    ledgers_to_join,
)
from llavakit_plugins.generation.items import Item, Items, choose
from llavakit_plugins.generation.job import (
    LEDGER,
    Spending,
    Unanswered,
    earlier_ledgers,
    finish,
    total_of,
)
from llavakit_plugins.generation.output import write_output
from llavakit_plugins.generation.requests.desk import Desk, EmptyReply, attempt
from llavakit_plugins.generation.requests.ledger import (
    SUFFIX,
    Entry,
    Ledger,
    Request,
    RequestRecord,
)
from llavakit_plugins.generation.requests.prompted import Verdict
from llavakit_plugins.generation.requests.rounds import Collected, Waiting
from llavakit_plugins.generation.requests.send import Sender, Tally
from llavakit_plugins.generation.requests.send_all import send_all
from llavakit_plugins.generation.review import Review
from llavakit_plugins.generation.sources import open_sources

if TYPE_CHECKING:
    from llavakit_plugins.generation.options import GenerateOptions


@dataclass
class _State:
    """The results of the conversations that this process tried."""

    conversations: Conversations
    failures: Failures
    unanswered: Unanswered = field(default_factory=Unanswered)
    rejected: dict[str, Conversation] = field(default_factory=dict)
    """Conversations of which no attempt can be used, by key."""

    def is_over(self, record: RequestRecord) -> bool:
        """Return whether a conversation was tried, and cannot be made in this attempt."""
        tried = record.key in self.rejected or record.key in self.unanswered.reasons
        return tried or record.label in self.failures.errors


class _Items(Items):
    """The items of a job; their state depends on the conversations made so far."""

    def __init__(
        self,
        contexts: Sequence[ImageContext],
        kinds: Sequence[ResponseKind],
        counts: dict[ResponseKind, int],
        state: _State,
        seed: int,
        share: range,
    ) -> None:
        self._contexts, self._kinds, self._state = contexts, kinds, state
        self.share = share
        self.chosen = choose(len(contexts), kinds, counts, seed)

    def walk(self, ledger: Ledger) -> Iterator[Item]:
        state = self._state
        for context, kind in self.pairs():
            record = state.conversations.record(context, kind)
            request = Request((Message("user", as_text(context, boxes=True)),), 0, record.label)
            item = Item(context, kind, None, None, (), record, request, open=True)
            if found := state.conversations.get(context, kind):
                made, entry = found
                text = "\n\n".join(turn.text for turn in made.turns)
                outcome = Verdict("accepted", made.turns)
                item = replace(
                    item, verdict=outcome, entry=replace(entry, text=text), refused=made.refused
                )
                item = replace(item, open=False)
            elif record.label in state.failures.errors:
                refused = Verdict("rejected", notes=(state.failures.reason(record.label),))
                item = replace(item, verdict=refused, refused=refused.notes, open=False)
            elif record.key in state.rejected:
                notes = state.rejected[record.key].refused
                verdict = Verdict("rejected", notes=notes[-1:])
                item = replace(item, verdict=verdict, refused=notes, open=False)
            yield item


def run_own_job(options: GenerateOptions, generator: Generator, desk: Desk, run: Run) -> Outcome:
    """Do what `run_job` does, with conversations that the generator makes itself.

    Raises the errors of `run_job`.
    """
    failures = Failures(generator.name, run.directory / "failures.txt")
    path = run.directory / f"{FILE}{SUFFIX}"
    # a generator may build its chat model later: then replies of every model are taken over
    identities = frozenset(chat.identity for chat in desk.chats) or None
    earlier = earlier_ledgers(run.directory, options)
    with open_sources(options, run.directory) as sources:
        conversations = Conversations(path, options.generator, ledgers_to_join(options, FILE))
        with (
            conversations.ledger as made,
            Ledger(
                run.directory / f"{LEDGER}{SUFFIX}", identity=identities, earlier=earlier
            ) as ledger,
        ):
            state = _State(conversations, failures)
            jobs = []
            for name, contexts in sources.items():
                counts = options.counts if not name else {}
                share = options.share(len(contexts))
                items = _Items(contexts, options.kinds, counts, state, run.seed, share)
                jobs.append((name, contexts, items))
            review = Review(options.images, run.seed)
            try:
                _make(options, generator, desk, run, ledger, [items for *_, items in jobs], state)
                if failures.errors:
                    raise failures.complaint(total_of(jobs))
                if not len(made) and state.unanswered.reasons:
                    raise state.unanswered.complaint(total_of(jobs))
            except (LlavaError, Stopped):
                if len(ledger) or len(made) or failures.errors:
                    write_output(jobs, ledger, state.unanswered.reasons, review, run)
                else:
                    ledger.discard()
                    made.discard()
                raise
            return finish(jobs, ledger, state.unanswered, review, run)


def _make(
    options: GenerateOptions,
    generator: Generator,
    desk: Desk,
    run: Run,
    ledger: Ledger,
    jobs: Sequence[_Items],
    state: _State,
) -> None:
    """Make all missing conversations, many at a time."""
    spending = Spending(run, ledger)
    made = state.conversations.ledger
    total = sum(map(len, jobs))
    if len(made):
        run.progress(len(made), total, f"{len(made)} conversations are here already")

    def todo() -> Iterator[_Pair]:
        for pair in (pair for items in jobs for pair in items.pairs()):
            record = state.conversations.record(*pair)
            if not (record.key in made or state.is_over(record)):
                yield pair

    def work(pair: _Pair) -> _Made:
        return pair, _converse(generator, *pair, options.attempts)

    def note(found: _Made) -> Entry | None:
        """Note a result; return the entry of a conversation that was made."""
        (context, kind), came = found
        record = state.conversations.record(context, kind)
        if isinstance(came, Conversation):
            if came.turns:
                return state.conversations.entry(context, kind, came)
            state.rejected[record.key] = came
        elif isinstance(came, ReplyError):
            state.unanswered.reasons[record.key] = str(came)
            if came.lasting:
                state.unanswered.refused.add(record.key)
        elif isinstance(came, ChatError | Stopped):
            raise came
        else:
            state.failures.add(record.label, came, len(made))
        return None

    async def after(found: _Made) -> None:
        if (entry := note(found)) is not None:
            await made.write(entry)
        spending.show(len(made), total, "")

    def in_rounds() -> None:
        """Call the generator for all conversations, and send what all of them wait for."""
        asked, served = Tally(), Counter[str]()
        while True:
            own = Collected(ledger, asked.unanswered, frozenset(asked.refused))
            with desk.answering_by(own):
                for pair in todo():
                    if run.stopping():
                        raise Stopped
                    label = state.conversations.record(*pair).label
                    try:
                        entry = note(work(pair))
                    except Waiting:
                        # it got fewer replies than last time before it waits:
                        # its requests have changed
                        if own.served[label] < served[label]:
                            raise _changing(generator) from None
                        served[label] = own.served[label] + 1  # the reply that it waits for
                        continue
                    if entry is not None:
                        made.append(entry)
                    spending.show(len(made), total, "")
            # the last call of each generator found all of its replies
            if not own.wanted:
                return
            for chat, requests in own.wanted.values():
                tally = send_all(
                    chat,
                    requests.values,
                    ledger,
                    concurrency=options.concurrency,
                    budget_usd=options.budget_usd,
                    stopping=run.stopping,
                    progress=lambda entry: spending.show(len(made), total, ""),
                )
                asked.unanswered |= tally.unanswered
                asked.refused |= tally.refused

    try:
        if _has_batches(desk, work, todo(), ledger):
            in_rounds()
        else:
            sender = Sender(
                desk.chats, ledger, options.budget_usd, run.stopping, lambda entry: None
            )
            desk.work_off(sender, ledger, todo(), work, after, options.concurrency)
    finally:
        spending.note()


def _has_batches(
    desk: Desk, work: Callable[[_Pair], object], todo: Iterator[_Pair], ledger: Ledger
) -> bool:
    """Return whether a chat model uses a batch service; it may be built when it is first used."""
    if not desk.chats and (pair := next(todo, None)) is not None:
        # one conversation is begun without sending anything,
        # so that the generator builds its chat model
        with desk.answering_by(Collected(ledger, {})), suppress(Waiting):
            work(pair)
    return any(getattr(chat, "batches", None) is not None for chat in desk.chats)


def _changing(generator: Generator) -> RecipeError:
    return RecipeError(
        f"generator `{generator.name}` asks other things each time it is called for the same "
        "conversation, so that the batch service's replies do not belong to them; take out `batch`"
    )


_Pair = tuple[ImageContext, ResponseKind]
_Made = tuple[_Pair, Conversation | Exception]


def _converse(
    generator: Generator, context: ImageContext, kind: ResponseKind, attempts: int
) -> Conversation | Exception:
    """Return a conversation, or the generator's error if another attempt would not help.

    Errors are returned and not raised, so that one failure does not end the other threads' work.
    """
    refused: list[str] = []
    for number in range(attempts):
        try:
            with attempt(number, f"{context.id}-{kind}"):
                turns = checked(generator.generate(context, kind), context, kind)
            return Conversation(turns, tuple(refused), number)
        except EmptyReply as error:
            refused.append(str(error))
        except (ChatError, Stopped) as error:
            return error
        except LlavaError as error:  # the reply cannot be used; another reply may be usable
            refused.append(str(error))
        except Exception as error:
            return error
    return Conversation((), tuple(refused))
