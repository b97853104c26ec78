"""Generators of other people: they get the job's ledger, budget, retries and concurrency."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.plugins.chat_server import KEY, Handler, Service, completion, user_text
from tests.plugins.generation.test_generation import contexts, rows_of

from llavakit import (
    Build,
    ChatError,
    ChatModel,
    DataError,
    Generator,
    ImageContext,
    Message,
    Options,
    PluginError,
    Recipe,
    RecipeError,
    Registry,
    Reply,
    Stopped,
    Turn,
    Use,
    hookimpl,
)
from llavakit.contracts.data import IMAGE, ResponseKind
from llavakit.engine.runner import run as run_recipe
from llavakit.testing import GeneratorContract
from llavakit_plugins.generation.requests.desk import Desk
from llavakit_plugins.generation.requests.ledger import Ledger
from llavakit_plugins.generation.requests.prompted import PromptedGenerator, Verdict
from llavakit_plugins.generation.requests.send import Sender


def number_of(context: ImageContext) -> int:
    return int(context.id)


def turns(question: str, answer: str) -> list[Turn]:
    return [Turn("human", f"{IMAGE}\n{question}"), Turn("gpt", answer)]


Fault = Callable[[ImageContext], None]


class TwiceOptions(Options):
    chat: Use[ChatModel]


class Twice(Generator):
    """Asks for a question, then for its answer, as no generator of ours does."""

    name = "twice"
    Options = TwiceOptions
    fault: ClassVar[Fault] = lambda context: None

    def __init__(self, options: TwiceOptions, *, build: Build) -> None:
        self.options = options
        self.chat = build(options.chat)

    def generate(self, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        told = f"{context.captions[0]} {kind}"
        question = self.chat.complete([Message("user", f"ask about {told}")])
        type(self).fault(context)
        answer = self.chat.complete([Message("user", f"answer {question}")])
        return turns(question, answer)


class Late(Twice):
    """Builds its chat model when it first needs it, and asks in a loop of its own."""

    name = "late"

    def __init__(self, options: TwiceOptions, *, build: Build) -> None:
        self.options, self._build = options, build

    def generate(self, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        async def both() -> list[Reply]:
            chat = self._build(self.options.chat)
            try:
                told = [Message("user", f"{context.captions[0]} {kind}")]
                return list(await asyncio.gather(chat.reply(told), chat.reply(told, 1)))
            finally:
                await chat.close()

        first, second = asyncio.run(both())
        type(self).fault(context)
        return turns(first.text, second.text)


class AroundOptions(Options):
    inner: Use[Generator]


class Around(Generator):
    """A generator made of another one."""

    name = "around"
    Options = AroundOptions

    def __init__(self, options: AroundOptions, *, build: Build) -> None:
        self.inner = build(options.inner)

    def generate(self, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        return self.inner.generate(context, kind)


class Alone(Generator):
    """Asks nobody; takes long, perhaps."""

    name = "alone"
    fault: ClassVar[Fault] = lambda context: None
    made: ClassVar[list[str]] = []

    def generate(self, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        type(self).fault(context)
        self.made.append(f"{context.id}-{kind}")
        return turns(f"{kind}?", context.captions[0])


class Halves(PromptedGenerator):
    """In two halves, as the built-in one, and with faults in either."""

    name = "halves"
    Options = TwiceOptions
    fault: ClassVar[Fault] = lambda context: None
    misread: ClassVar[Fault] = lambda context: None

    def __init__(self, options: TwiceOptions, *, build: Build) -> None:
        self.options = options
        self.chat = build(options.chat)

    def messages(self, context: ImageContext, kind: ResponseKind) -> tuple[Message, ...]:
        type(self).fault(context)
        return (Message("user", f"{context.captions[0]} {kind}"),)

    def read(self, context: ImageContext, kind: ResponseKind, reply: Reply) -> Verdict:
        type(self).misread(context)
        return Verdict("accepted", tuple(turns("What?", reply.text)))

    def expected_reply(self, kind: ResponseKind) -> str:
        return "A thing."


class Plugin:
    @hookimpl
    def llava_generators(self) -> list[type[Generator]]:
        return [Twice, Late, Around, Alone, Halves]


@pytest.fixture(autouse=True)
def _no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    for generator in (Twice, Late, Alone, Halves):
        monkeypatch.setattr(generator, "fault", lambda context: None)
    monkeypatch.setattr(Halves, "misread", lambda context: None)
    Alone.made.clear()


class Job:
    """A run of one step `generate`."""

    def __init__(self, folder: Path, service: Service, generator: str, more: str = "") -> None:
        self.out = folder / "run"
        self.step = self.out / "01-generate"
        chat = (
            f'{{ use = "openai", model = "gpt-4o", base_url = "{service.url}", backoff = 0.02, '
            "retries = 1, price = { input = 10, output = 100 } }"
        )
        self.recipe = folder / "own.toml"
        self.recipe.write_text(
            f'[[steps]]\nuse = "generate"\ncontexts = "{contexts(folder, 5)}"\nconcurrency = 4\n'
            f'kinds = ["detail", "reasoning"]\n{more}\n'
            f"generator = {generator.replace('CHAT', chat)}\n"
        )
        self.registry = Registry.installed()
        self.registry.register(Plugin(), name="own")

    def run(self, *overrides: str, resume: bool = False) -> None:
        recipe = Recipe.load(self.recipe, self.registry, overrides, inputs=True)
        run_recipe(recipe, self.registry, self.out, resume=resume)

    def ids(self) -> list[str]:
        return [row["id"] for row in json.loads((self.step / "instruct.json").read_text())]


ALL = [f"{number:04}-{kind}" for number in range(5) for kind in ("detail", "reasoning")]
BUT_ONE = [label for label in ALL if not label.startswith("0001")]
ASKING = ['{ use = "twice", chat = CHAT }', '{ use = "late", chat = CHAT }']
ANY = [
    *ASKING,
    '{ use = "alone" }',
    '{ use = "around", inner = { use = "twice", chat = CHAT } }',
    '{ use = "around", inner = { use = "alone" } }',
    '{ use = "halves", chat = CHAT }',
]


def breaks(error: BaseException) -> Fault:
    """Return what fails at the second of the contexts."""

    def fault(context: ImageContext) -> None:
        if number_of(context) == 1:
            raise error

    return fault


def everywhere(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    for generator in (Twice, Late, Alone, Halves):
        monkeypatch.setattr(generator, "fault", fault)


@pytest.mark.parametrize("generator", ANY)
def test_one_failure_loses_no_other_conversation(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: str
) -> None:
    job = Job(tmp_path, service, generator)
    everywhere(monkeypatch, breaks(RuntimeError("out of \x1b[2Jmemory")))
    with pytest.raises(PluginError, match=r"failed at 2 of 10 conversations") as caught:
        job.run()
    assert re.search(r"0001-\w+: RuntimeError: out of \\x1b\[2Jmemory", str(caught.value))
    assert job.ids() == BUT_ONE
    told = (job.step / "failures.txt").read_text()
    assert "in fault" in told  # where it happened, for whoever wrote it
    assert "\x1b" not in told
    assert not (job.step / "artifact.json").exists()
    asked, made = len(service.asked), len(Alone.made)
    with pytest.raises(PluginError, match="failed at 2 of 10"):
        job.run(resume=True)
    everywhere(monkeypatch, lambda context: None)
    job.run(resume=True)
    assert job.ids() == ALL
    assert not (job.step / "failures.txt").exists()
    # what was made is neither made nor paid for again
    assert len(service.asked) in (0, 10, 20)
    assert len(service.asked) - asked in (0, 2)
    assert sorted(Alone.made[made:]) == ([*ALL[2:4]] if made else [])
    assert (job.step / "artifact.json").exists()


@pytest.mark.parametrize("generator", ASKING)
def test_its_replies_are_in_the_ledger_and_their_price_in_the_report(
    service: Service, tmp_path: Path, generator: str
) -> None:
    job = Job(tmp_path, service, generator)
    service.actions = [lambda h, b: h.fail(500, "oh")]  # and what passes is tried again
    job.run()
    assert len(service.asked) == 21
    with Ledger(job.step / "ledger.sqlite") as ledger:
        assert len(ledger) == 20
        assert Counter(entry.label for entry in ledger) == dict.fromkeys(ALL, 2)
        assert ledger.spent == pytest.approx(20 * 0.002)
    artifact = json.loads((job.step / "artifact.json").read_text())
    assert artifact["metrics"]["usd"] == pytest.approx(20 * 0.002)
    assert artifact["metrics"]["samples"] == 10
    assert [row["id"] for row in rows_of(job.step / "provenance.jsonl")] == ALL
    for name in ("detail.json", "reasoning.json", "captions.json", "review.html"):
        assert (job.step / name).is_file()
    # another recipe with the same generator makes and pays for nothing again
    job.run("steps.1.attempts=2")
    assert len(service.asked) == 21
    assert job.ids() == ALL


@pytest.mark.parametrize("generator", ASKING)
def test_many_are_asked_at_once_and_no_more_than_so_many(
    service: Service, tmp_path: Path, generator: str
) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.05)
        handler.answer(f"Re: {user_text(body)}")

    service.otherwise = answer
    Job(tmp_path, service, generator).run()
    assert 2 <= service.most_at_once <= 4


@pytest.mark.parametrize("generator", ASKING)
def test_its_budget_is_never_passed(service: Service, tmp_path: Path, generator: str) -> None:
    job = Job(tmp_path, service, generator, "budget_usd = 0.02")
    with pytest.raises(ChatError, match=r"stopped at budget_usd = 0\.02"):
        job.run("steps.1.generator.chat.max_tokens=20")
    with Ledger(job.step / "ledger.sqlite") as ledger:
        assert 0 < len(ledger) == len(service.asked) <= 10
        assert ledger.spent <= 0.02
    job.run("steps.1.generator.chat.max_tokens=20", "steps.1.budget_usd=5")
    assert len(service.asked) == 20, [(user_text(b), b.get("seed")) for b in service.asked]
    assert job.ids() == ALL


def test_a_budget_needs_a_price(service: Service, tmp_path: Path) -> None:
    job = Job(tmp_path, service, ASKING[0].replace("CHAT", '{ use = "openai", model = "x", '
              f'base_url = "{service.url}" }}'), "budget_usd = 1")  # fmt: skip
    with pytest.raises(ChatError, match="no price is known"):
        job.run()
    assert not service.asked


@pytest.mark.parametrize("generator", ASKING)
def test_a_service_that_is_down_leaves_its_conversations_open(
    service: Service, tmp_path: Path, generator: str
) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        if "number 3." in user_text(body):
            handler.fail(500, "oh")
        else:
            handler.answer(f"Re: {user_text(body)}")

    service.otherwise = answer
    job = Job(tmp_path, service, generator)
    with pytest.raises(ChatError, match="2 of 10 requests have no answer for now"):
        job.run()
    assert job.ids() == [label for label in ALL if not label.startswith("0003")]
    service.asked.clear()
    service.otherwise = lambda h, b: h.answer(f"Re: {user_text(b)}")
    job.run(resume=True)
    assert job.ids() == ALL
    assert all("number 3." in user_text(body) for body in service.asked)
    service.otherwise = lambda h, b: h.fail(401, "no")
    job.run("steps.1.concurrency=2")  # all is here already


def test_a_wrong_key_is_found_out_once(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY[::-1])
    job = Job(tmp_path, service, ASKING[0])
    with pytest.raises(ChatError, match="does not take the key"):
        job.run()
    assert len(service.asked) == 1
    assert not job.step.exists()


def test_another_attempt_gets_another_reply(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def fault(context: ImageContext) -> None:
        if not service.asked:  # the plan's
            return
        with lock:
            seen[context.id] += 1
            if seen[context.id] % 3:
                raise DataError("no use")

    monkeypatch.setattr(Twice, "fault", fault)
    job = Job(tmp_path, service, ASKING[0], "attempts = 3")
    job.run('steps.1.kinds=["detail"]')
    assert job.ids() == ALL[::2]
    assert Counter(map(user_text, service.asked)).most_common(1)[0][1] == 3
    origins = rows_of(job.step / "provenance.jsonl")
    assert all(origin["refused"] == ["no use"] * 2 for origin in origins)
    assert all(origin["draw"] == 2 for origin in origins)


@pytest.mark.parametrize(
    "bad",
    [[], [Turn("gpt", "x")], turns("What?", " "), turns("What?", "x")[:1],
     [Turn("human", "no image"), Turn("gpt", "x")]],
)  # fmt: skip
def test_what_is_no_conversation_is_rejected(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: list[Turn]
) -> None:
    real = Twice.generate

    def generate(self: Twice, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        found = real(self, context, kind)
        return bad if number_of(context) == 1 else found

    monkeypatch.setattr(Twice, "generate", generate)
    job = Job(tmp_path, service, ASKING[0], "attempts = 1")
    job.run()
    assert job.ids() == BUT_ONE
    assert {row["id"] for row in rows_of(job.step / "rejected.jsonl")} == set(ALL) - set(BUT_ONE)


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("y"), DataError("no use of it")])
def test_a_reply_that_cannot_be_read_stops_no_other(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(Halves, "misread", breaks(error))
    job = Job(tmp_path, service, ANY[-1])
    with pytest.raises((PluginError, DataError), match=r"failed at 2 of 10"):
        job.run()
    assert job.ids() == BUT_ONE
    assert len(service.asked) == 10  # another reply is not the remedy
    monkeypatch.setattr(Halves, "misread", lambda context: None)
    job.run(resume=True)
    assert job.ids() == ALL
    assert len(service.asked) == 10


@pytest.mark.parametrize("generator", ANY)
def test_a_generator_that_only_fails_is_left_soon(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: str
) -> None:
    def fault(context: ImageContext) -> None:
        raise RuntimeError("always")

    everywhere(monkeypatch, fault)
    job = Job(tmp_path, service, generator)
    contexts(tmp_path, 500)
    with pytest.raises(PluginError, match="RuntimeError: always"):
        job.run()
    assert len(service.asked) < 60


def test_asking_to_stop_keeps_what_is_on_its_way(service: Service, tmp_path: Path) -> None:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.1)
        handler.answer(f"Re: {user_text(body)}")

    service.otherwise = answer
    job, desk = Job(tmp_path, service, ASKING[0]), Desk()
    (step,) = Recipe.load(job.recipe, job.registry).steps
    use = Use[Generator].model_validate(step.options["generator"])
    generator = job.registry.build(use, build=desk.building(job.registry.build))
    made: list[Sequence[Turn]] = []

    async def keep(found: Sequence[Turn]) -> None:
        made.append(found)

    def work(number: int) -> Sequence[Turn]:
        return generator.generate(ImageContext(str(number), "x", (f"{number}",)), "detail")

    with Ledger(tmp_path / "ledger") as ledger:
        sender = Sender(
            desk.chats, ledger, None, lambda: len(service.asked) > 20, lambda entry: None
        )
        with pytest.raises(Stopped):
            desk.work_off(sender, ledger, iter(range(500)), work, keep, 8)
        assert len(ledger) == len(service.asked) < 500
        assert 0 < len(made) <= len(ledger) // 2


def test_a_resume_after_a_kill_pays_for_nothing_again(service: Service, tmp_path: Path) -> None:
    """A kill leaves the ledger and some conversations: here the last of each is taken away."""
    job = Job(tmp_path, service, ASKING[0])
    job.run()
    for name in ("artifact.json", "instruct.json", "provenance.jsonl"):
        (job.step / name).unlink()
    for name, kept in (("conversations", 4), ("ledger", 15)):
        with closing(sqlite3.connect(job.step / f"{name}.sqlite")) as database, database:
            database.execute("DELETE FROM replies WHERE number > ?", (kept,))
    job.run(resume=True)
    assert job.ids() == ALL
    assert len(service.asked) == 25


BATCHED = '{ use = "%s", chat = CHAT }'


@pytest.mark.parametrize("name", ["twice", "late"])
def test_the_batch_service_answers_it_in_rounds(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each request of a conversation that needs another's reply waits for the next batch."""
    answer: Callable[..., Any] = lambda self, body: completion(f"Re: {user_text(body)}")  # noqa: E731
    monkeypatch.setattr(Handler, "in_batch", answer)
    for folder in ("live", "batch"):
        (tmp_path / folder).mkdir()
    live = Job(tmp_path / "live", service, BATCHED % name)
    live.run()
    asked, live_paths = len(service.asked), len(service.paths)
    job = Job(tmp_path / "batch", service, BATCHED % name)
    more = ("steps.1.generator.chat.batch=true", "steps.1.generator.chat.poll_seconds=0.01")
    job.run(*more)
    assert job.ids() == ALL
    assert (job.step / "instruct.json").read_text() == (live.step / "instruct.json").read_text()
    assert not any(path.endswith("completions") for path in service.paths[live_paths:])
    assert len(service.asked) == 2 * asked
    assert len(service.batches) == (2 if name == "twice" else 1)
    batches = len(service.batches)
    (job.step / "artifact.json").unlink()
    job.run(*more, resume=True)
    assert len(service.batches) == batches  # every reply is in the ledger


def test_a_batch_keeps_within_the_budget(service: Service, tmp_path: Path) -> None:
    job = Job(tmp_path, service, BATCHED % "twice", "budget_usd = 0.000001")
    with pytest.raises(ChatError, match="stopped at budget_usd"):
        job.run("steps.1.generator.chat.batch=true")
    assert not service.batches


def test_a_batch_is_not_for_a_generator_that_asks_other_things_each_time(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))
    generate = Twice.generate

    def changing(self: Twice, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        told = ImageContext(context.id, context.image, (f"{next(calls)}",))
        return generate(self, told, kind)

    monkeypatch.setattr(Twice, "generate", changing)
    job = Job(tmp_path, service, BATCHED % "twice")
    with pytest.raises(RecipeError, match=r"asks other things each time .*take out `batch`"):
        job.run("steps.1.generator.chat.batch=true", "steps.1.generator.chat.poll_seconds=0.01")
    assert len(service.batches) == 1


def plan_of(job: Job) -> Any:
    from llavakit.engine.plan import make_plan

    return make_plan(Recipe.load(job.recipe, job.registry), job.registry).steps["01-generate"]


@pytest.mark.parametrize(
    ("generator", "requests"), [(ASKING[0], 20), (ASKING[1], 20), (ANY[3], 20)]
)
def test_a_plan_tells_its_price(
    service: Service, tmp_path: Path, generator: str, requests: int
) -> None:
    """Twice as many requests as conversations; nothing is sent, and nothing is left behind."""
    job = Job(tmp_path, service, generator)
    plan = plan_of(job)
    assert not service.asked
    assert plan.samples == 10
    assert plan.note.startswith(f"{requests} requests for 10 conversations")
    # 100 USD a million: two replies each, of 145 and of 196 tokens; sent are 10 to 300 each
    replies = 1e-4 * 10 * (145 + 196)
    assert 0.9 * replies < plan.cost_usd < 1.1 * replies + 1e-5 * 20 * 300
    job.run()
    assert len(service.asked) == requests


def test_a_plan_of_one_that_is_never_pleased_ends(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Twice, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        while True:
            try:
                if self.chat.complete([Message("user", "again ?")]) == "yes":
                    return turns("?", "yes")
            except Exception:
                pass

    monkeypatch.setattr(Twice, "generate", never)
    plan = plan_of(Job(tmp_path, service, ASKING[0]))
    assert "at least" in plan.note
    assert plan.cost_usd > 0


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda job: job.recipe.write_text(job.recipe.read_text().replace(", price = { input = 10, "
         "output = 100 }", "").replace("gpt-4o", "none")), "no price is known"),
        (lambda job: (job.recipe.parent / "contexts.jsonl").unlink(), "contexts are not there"),
    ],
)  # fmt: skip
def test_a_plan_says_what_is_not_known_of_the_price(
    service: Service, tmp_path: Path, change: Callable[[Job], object], note: str
) -> None:
    job = Job(tmp_path, service, ASKING[0])
    change(job)
    plan = plan_of(job)
    assert note in plan.note
    assert plan.cost_usd is None


# -- sorts of response of one's own ---------------------------------------------------------------


class Tagger(Generator):
    """Writes two sorts of response that the paper has not."""

    name = "tagger"
    kinds = ("caption", "tags")

    def generate(self, context: ImageContext, kind: ResponseKind) -> Sequence[Turn]:
        return turns(f"{kind}?", f"{kind} of {context.captions[0]}")


class TestTagger(GeneratorContract):
    def build(self) -> Generator:
        return Tagger()

    test_registered_by_an_installed_plugin = None  # type: ignore[assignment]


def tagging(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> tuple[Path, Registry]:
    class Tags:
        @hookimpl
        def llava_generators(self) -> list[type[Generator]]:
            return [Tagger]

    registry = Registry.installed()
    registry.register(Tags(), name="tags")
    monkeypatch.setattr("llavakit_plugins.generation.options._INSTALLED", lambda: registry)
    path = folder / "tags.toml"
    path.write_text(
        f'[[steps]]\nuse = "generate"\ncontexts = "{contexts(folder, 3)}"\n{more}\n'
        'generator = { use = "tagger" }\n'
    )
    return path, registry


def test_a_generator_may_write_sorts_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, registry = tagging(tmp_path, monkeypatch, "counts = { tags = 1 }")
    run_recipe(Recipe.load(path, registry, inputs=True), registry, tmp_path / "run")
    step = tmp_path / "run" / "01-generate"
    rows = {name: json.loads((step / f"{name}.json").read_text()) for name in Tagger.kinds}
    assert [row["id"] for row in rows["caption"]] == [f"{n:04}-caption" for n in range(3)]
    assert len(rows["tags"]) == 1
    assert rows["tags"][0]["conversations"][1]["value"].startswith("tags of ")
    assert len(json.loads((step / "instruct.json").read_text())) == 4


def test_a_sort_that_the_generator_has_not_is_said_at_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, registry = tagging(tmp_path, monkeypatch, 'kinds = ["tags", "detail"]')
    with pytest.raises(RecipeError, match=r"writes no `detail`; it writes caption, tags"):
        Recipe.load(path, registry)
    own = tmp_path / "offline.toml"
    own.write_text(path.read_text().replace("tagger", "offline"))
    with pytest.raises(RecipeError, match=r"offline.toml:\d+: .*writes no `tags`; it writes conv"):
        Recipe.load(own, registry)


def test_a_reply_with_half_a_character_is_asked_for_again(service: Service, tmp_path: Path) -> None:
    job = Job(tmp_path, service, '{ use = "twice", chat = CHAT }', "attempts = 2\nbudget_usd = 5")
    service.actions = [lambda handler, body: handler.answer("a bus \ud83d")]
    job.run()
    assert job.ids() == ALL
    assert len(service.asked) == 21  # the first question twice, and nothing of the first reply
    assert not any("\ud83d" in user_text(body) for body in service.asked)


class Counting(ChatModel):
    """Counts by the guess that every chat model has."""

    name = "counting"

    def complete(self, messages: Sequence[Message]) -> str:
        return ""


def test_a_question_with_half_a_character_is_counted() -> None:
    assert Counting().count([Message("user", "x" * 8 + "\ud83d")]) == 4 + 2
