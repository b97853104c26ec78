"""The contracts: built-in components keep them, and a broken component does not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL.Image import Image
from tests.conftest import LANGUAGE, VISION, make_tokenizer
from torch import Tensor, nn

import llavakit.testing
import llavakit_plugins.training.testing
from llavakit import (
    Benchmark,
    ChatModel,
    Connector,
    Dataset,
    Exporter,
    Generator,
    ImageContext,
    LanguageModel,
    LlavaModel,
    Message,
    Options,
    Outcome,
    PromptTemplate,
    Question,
    Registry,
    ReplyError,
    Run,
    Sample,
    Score,
    Segment,
    Step,
    Tracker,
    Turn,
    Use,
    VisionEncoder,
)
from llavakit.contracts import hooks
from llavakit.contracts.packing import Packing
from llavakit.model.folder import create_model, load_model, save_model
from llavakit.recipe.model_choice import ModelRecipe
from llavakit.registry import all_kinds
from llavakit_plugins.connectors.mlp import Linear, Mlp, MlpOptions
from llavakit_plugins.datasets.conversations import Conversations
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions
from llavakit_plugins.vision.clip import Clip, ClipOptions

ROWS = [
    {
        "id": f"s{number}",
        "image": f"{number}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is it ?"},
            {"from": "gpt", "value": f"a {('red', 'blue')[number % 2]} circle ."},
        ],
    }
    for number in range(6)
]


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, known to the classes below, which pytest builds without arguments."""
    folder = tmp_path_factory.mktemp("contracts")
    for number in range(6):
        llavakit.testing.make_picture(number).save(folder / f"{number}.png")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    Place.folder = folder
    return folder


class Place:
    folder: ClassVar[Path]

    @classmethod
    def data(cls) -> dict[str, Any]:
        return {"use": "conversations", "path": str(cls.folder / "rows.json")}

    @classmethod
    def samples(cls) -> list[Sample]:
        """What the file holds, written by hand."""
        asked = Turn("human", "<image>\nwhat is it ?")
        colours = ("red", "blue") * 3
        return [
            Sample(
                f"s{n}", (asked, Turn("gpt", f"a {colour} circle .")), (cls.folder / f"{n}.png",)
            )
            for n, colour in enumerate(colours)
        ]


def small_language(seed: int = 0) -> Vicuna:
    torch.manual_seed(seed)
    language = Vicuna(VicunaOptions(config=LANGUAGE))
    language.tokenizer = make_tokenizer()
    return language


def small_model() -> LlavaModel:
    recipe = ModelRecipe(
        vision=Use[VisionEncoder].model_validate({"use": "clip", "config": VISION}),
        connector=Use[Connector](use="mlp"),
        language=Use[LanguageModel].model_validate({"use": "vicuna", "config": LANGUAGE}),
    )
    return create_model(recipe, Registry.installed(), seed=0, language=small_language())


# -- built-in components ---------------------------------------------------------------------------


class TestClip(llavakit.testing.VisionEncoderContract):
    options: Mapping[str, Any] = {"config": VISION}

    def build(self) -> VisionEncoder:
        torch.manual_seed(0)
        return Clip(ClipOptions(config=VISION))


class TestClipPadded(llavakit.testing.VisionEncoderContract):
    options: Mapping[str, Any] = {"config": VISION, "aspect": "pad", "layer": -1}

    def build(self) -> VisionEncoder:
        torch.manual_seed(0)
        return Clip(ClipOptions(config=VISION, aspect="pad", layer=-1))


class TestLinear(llavakit.testing.ConnectorContract):
    def build(self) -> Connector:
        torch.manual_seed(0)
        return Linear(Options(), vision_width=8, language_width=16)


class TestMlp(llavakit.testing.ConnectorContract):
    options: Mapping[str, Any] = {"depth": 3}

    def build(self) -> Connector:
        torch.manual_seed(0)
        return Mlp(MlpOptions(depth=3), vision_width=8, language_width=16)


class TestVicuna(llavakit.testing.LanguageModelContract):
    options: Mapping[str, Any] = {"config": LANGUAGE}

    def build(self) -> LanguageModel:
        return small_language()


class Templates(llavakit.testing.PromptTemplateContract):
    template: ClassVar[str]

    def build(self) -> PromptTemplate:
        return Registry.installed().build(Use[PromptTemplate](use=self.template))


class TestPlain(Templates):
    template = "plain"
    several_turns = False


class TestVicunaV1(Templates):
    template = "vicuna_v1"


class TestLlavaV0(Templates):
    template = "llava_v0"
    learns_roles = True  # as the original's masks do
    asks_as_it_trains = False  # neither does the original


class TestLlama2(Templates):
    template = "llava_llama_2"


class TestChatml(Templates):
    template = "chatml"


class TestConversations(llavakit.testing.DatasetContract):
    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {"path": Place.folder / "rows.json"}

    def build(self) -> Dataset:
        return Conversations(Conversations.Options(path=Place.folder / "rows.json"))

    def expected(self) -> Sequence[Sample]:
        return Place.samples()


class TestMix(llavakit.testing.DatasetContract):
    ids_recur = True  # both parts are of one file

    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {"parts": [Place.data(), {**Place.data(), "limit": 2}]}

    def build(self) -> Dataset:
        return Registry.installed().build(Use[Dataset](use="mix", **self.options))

    def expected(self) -> Sequence[Sample]:
        return [*Place.samples(), *Place.samples()[:2]]


class TestOffline(llavakit.testing.GeneratorContract):
    def build(self) -> Generator:
        return Registry.installed().build(Use[Generator](use="offline"))


class TestExactMatch(llavakit.testing.BenchmarkContract):
    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {"data": Place.data()}

    def build(self) -> Benchmark:
        return Registry.installed().build(Use[Benchmark](use="exact-match", **self.options))


class TestFinetune(llavakit.testing.StepContract):
    shared = ("tokenised",)

    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        train = {"connector": 1e-3, "language": 1e-3}
        return {"data": Place.data(), "train": train, "batch_size": 2}

    def build(self) -> Step:
        return Registry.installed().build(Use[Step](use="finetune", **self.options))

    def model(self) -> LlavaModel:
        return small_model()


class TestEvaluate(TestFinetune):
    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        benchmark = {"use": "exact-match", "data": Place.data()}
        return {
            "benchmarks": [benchmark],
            "losses": [Place.data()],
            "blind": True,
            "max_new_tokens": 2,
            "batch_size": 4,
        }

    def build(self) -> Step:
        return Registry.installed().build(Use[Step](use="evaluate", **self.options))


# -- kinds of which nothing is built in yet: the smallest that keep their contract -----------------


class Echo(ChatModel):
    """Says what was said."""

    name = "echo"

    def complete(self, messages: Sequence[Message]) -> str:
        return messages[-1].content


class Down(Echo):
    def complete(self, messages: Sequence[Message]) -> str:
        raise ReplyError("nobody answers; start the server")


class TestEcho(llavakit.testing.ChatModelContract):
    def build(self) -> ChatModel:
        return Echo()

    def sent(self, model: ChatModel) -> None:
        return None

    def failing(self) -> ChatModel:
        return Down()

    test_registered_by_an_installed_plugin = None  # type: ignore[assignment]


class Memory(Tracker):
    """Remembers events."""

    name = "memory"

    def __init__(self) -> None:
        self.seen: list[Mapping[str, Any]] = []

    def record(self, event: Mapping[str, Any]) -> None:
        self.seen.append(event)


class TestMemory(llavakit.testing.TrackerContract):
    def build(self) -> Tracker:
        return Memory()

    def recorded(self, tracker: Tracker, folder: Path) -> None:
        return None

    test_registered_by_an_installed_plugin = None  # type: ignore[assignment]


class Boxed(Exporter):
    """A model folder within a folder."""

    name = "boxed"

    def export(self, model: LlavaModel, folder: Path) -> Mapping[str, Any]:
        save_model(model, folder / "box")
        return {}

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return (folder / "box" / "model.toml").is_file()

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None) -> Any:
        return load_model(folder / "box", Registry.installed(), device=device, dtype=dtype).eval()


class TestBoxed(llavakit.testing.ExporterContract):
    def build(self) -> Exporter:
        return Boxed()

    def model(self) -> LlavaModel:
        return small_model()

    test_registered_by_an_installed_plugin = None  # type: ignore[assignment]


# -- broken on purpose -----------------------------------------------------------------------------


class Noisy(Linear):
    def forward(self, features_BPD: Tensor) -> Tensor:
        embeddings: Tensor = super().forward(features_BPD)
        return embeddings + torch.rand(())


class Wide(Linear):
    def __init__(self, options: Options, *, vision_width: int, language_width: int) -> None:
        super().__init__(options, vision_width=vision_width, language_width=2 * language_width)


class Short(Linear):
    def forward(self, features_BPD: Tensor) -> Tensor:
        embeddings: Tensor = super().forward(features_BPD)
        return embeddings[:, ::2]


class Detached(Linear):
    def forward(self, features_BPD: Tensor) -> Tensor:
        embeddings: Tensor = super().forward(features_BPD.detach())
        return embeddings


class Dead(Linear):
    def __init__(self, options: Options, **widths: int) -> None:
        super().__init__(options, **widths)
        self.scale = nn.Parameter(torch.ones(()))


class Mixed(Linear):
    def forward(self, features_BPD: Tensor) -> Tensor:
        embeddings: Tensor = super().forward(features_BPD - features_BPD.mean(0))
        return embeddings


class Forgetful(Linear):
    @classmethod
    def load(cls, options: Any, folder: Path, **context: Any) -> Any:
        return cls(options, **context)


class Misplaced(Linear):
    def project_into(self, features_BPD: Tensor, stream: Any) -> Tensor:
        return stream.embed(stream.token_ids_T)  # type: ignore[no-any-return]


class Loose(Linear):
    class Options(Options):
        model_config = {"extra": "ignore"}  # noqa: RUF012


class Prefixed(Clip):
    prefix_tokens = 0


class Narrow(Clip):
    def __init__(self, options: ClipOptions, model: Any = None) -> None:
        super().__init__(options, model)
        self.width += 1


class Uneven(Clip):
    def prepare(self, image: Image) -> Tensor:
        return super().prepare(image)[:, :-1]


class Random(Clip):
    def prepare(self, image: Image) -> Tensor:
        return super().prepare(image) + torch.rand(())


class Blind(Clip):
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return super().forward(torch.zeros_like(pixels_BCHW))


class Leaking(Vicuna):
    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Any = None) -> Tensor:
        whole = Packing((0, len(embeds_TE)), packing.position_ids_T, packing.cache)
        if packing.cache is not None or rows is not None:
            whole = packing
        return super().hidden(embeds_TE, whole, rows)


class Unordered(Vicuna):
    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Any = None) -> Tensor:
        still = Packing(packing.starts, packing.position_ids_T * 0, packing.cache)
        return embeds_TE.mean(0, keepdim=True) + 0 * super().hidden(embeds_TE, still, rows)


class Rowless(Vicuna):
    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Any = None) -> Tensor:
        hidden = super().hidden(embeds_TE, packing, None)
        return hidden if rows is None else hidden[: len(rows.index_M)]


class Cacheless(Vicuna):
    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Any = None) -> Tensor:
        still = Packing(packing.starts, packing.position_ids_T)
        return super().hidden(embeds_TE, still, rows)


@dataclass
class Words(PromptTemplate):
    """A template with what each case gets wrong."""

    name = "words"
    learn_question: bool = False
    learn_answer: bool = True
    end: str = "</s>"
    image: bool = True
    markup: bool = False
    check: bool = True

    def segments(self, turns: Sequence[Turn], tokenizer: Any) -> list[Segment]:
        if self.check:
            Sample(
                "x", tuple(turns), (Path(),) * sum(t.text.count("<image>") for t in turns)
            ).check()
        segments = []
        for turn in turns:
            text = turn.text if self.image else turn.text.replace("<image>", "")
            human = turn.role == "human"
            supervised = self.learn_question if human else self.learn_answer
            segments.append(Segment(f" {text}", supervised, self.markup))
            if not human:
                segments.append(Segment(self.end, True, markup=True))
        return segments


class Unstable(Conversations):
    count = 0

    def __getitem__(self, index: int) -> Sample:
        Unstable.count += 1
        sample = super().__getitem__(index)
        return Sample(f"{sample.id}-{Unstable.count}", sample.turns, sample.images)


class Endless(Conversations):
    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index % len(self))


class Torn(Conversations):
    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return Sample(sample.id, sample.turns, ())


class Silent(Echo):
    def complete(self, messages: Sequence[Message]) -> str:
        return " "


class Meddling(Echo):
    def complete(self, messages: Sequence[Message]) -> str:
        messages.append(Message("user", "x"))  # type: ignore[attr-defined]
        return "x"


@dataclass
class Teacher(Generator):
    """A teacher with what each case gets wrong."""

    name = "teacher"
    turns: tuple[Turn, ...]
    calls: ClassVar[int] = 0

    def generate(self, context: ImageContext, kind: Any) -> Sequence[Turn]:
        Teacher.calls += 1
        return [Turn(t.role, t.text.replace("#", str(Teacher.calls))) for t in self.turns]


@dataclass
class Quiz(Benchmark):
    """A benchmark with what each case gets wrong."""

    name = "quiz"
    ids: tuple[str, str] = ("a", "b")
    fair: bool = True

    def questions(self) -> Sequence[Question]:
        return [Question(i, "what ?", truth="red") for i in self.ids]

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        right = [answer == "red" or not self.fair for answer in answers]
        return Score({"accuracy": sum(right) / len(right)}, right)


class Greedy(Boxed):
    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return "boxed" in folder.name or super().recognises(folder)


class Lossy(Boxed):
    def export(self, model: LlavaModel, folder: Path) -> Mapping[str, Any]:
        proof = super().export(model, folder)
        with torch.no_grad():
            model.language.head.weight.mul_(1.5)
        return proof


class Vain(Memory):
    def record(self, event: Mapping[str, Any]) -> None:
        event["seen"] = True  # type: ignore[index]


@dataclass
class Work(Step):
    """A step with what each case gets wrong."""

    name = "work"
    fault: str
    calls: ClassVar[int] = 0

    def run(self, run: Run) -> Outcome:
        Work.calls += 1
        if self.fault == "outside":
            (run.directory.parent / "x").write_text("")
        if self.fault == "model":
            run.model()
        if self.fault == "event":
            run.event("x", place=run.directory)
        values = {"nan": float("nan"), "random": float(Work.calls)}
        return Outcome({"value": values.get(self.fault, 1.0)})


CLIP = ClipOptions(config=VISION)
HUMAN, GPT = Turn("human", "<image> ?"), Turn("gpt", "x")


def linear(component: type[Linear]) -> Any:
    return component(component.Options(), vision_width=8, language_width=16)


def vicuna(component: type[Vicuna]) -> Any:
    language = component(VicunaOptions(config=LANGUAGE))
    language.tokenizer = make_tokenizer()
    return language


def conversations(component: type[Conversations]) -> Any:
    return component(component.Options(path=Place.folder / "rows.json"))


BROKEN: list[tuple[type[Any], Any, str]] = [
    (TestLinear, lambda: linear(Noisy), "the_same_input"),
    (TestLinear, lambda: linear(Wide), "maps_the_vision_width"),
    (TestLinear, lambda: linear(Short), "how_many_tokens"),
    (TestLinear, lambda: linear(Detached), "gradient_reaches"),
    (TestLinear, lambda: linear(Dead), "gradient_reaches"),
    (TestLinear, lambda: linear(Mixed), "of_no_other"),
    (TestLinear, lambda: linear(Forgetful), "come_back"),
    (TestLinear, lambda: linear(Misplaced), "fills_the_stream"),
    (TestLinear, lambda: linear(Loose), "refuse_unknown_keys"),
    (TestLinear, lambda: linear(Noisy), "registered"),
    (TestLinear, lambda: Memory(), "whole_component"),
    (TestMlp, lambda: linear(Linear), "refuse_unknown_keys|determine_the_shape"),
    (TestClip, lambda: Prefixed(CLIP), "one_feature_for_each_patch"),
    (TestClip, lambda: Narrow(CLIP), "one_feature_for_each_patch"),
    (TestClip, lambda: Uneven(CLIP), "same_square"),
    (TestClip, lambda: Random(CLIP), "same_square"),
    (TestClip, lambda: Blind(CLIP), "of_no_other"),
    (TestVicuna, lambda: vicuna(Leaking), "neighbours"),
    (TestVicuna, lambda: vicuna(Unordered), "order_of_tokens|later_ones"),
    (TestVicuna, lambda: vicuna(Rowless), "selected_rows"),
    (TestVicuna, lambda: vicuna(Cacheless), "the_cache"),
    (TestVicuna, lambda: Vicuna(VicunaOptions(config=LANGUAGE)), "tokenizer"),
    (TestVicunaV1, lambda: Words(learn_question=True), "question_is_not"),
    (TestVicunaV1, lambda: Words(learn_answer=False), "answer_is_learned"),
    (TestVicunaV1, lambda: Words(end="."), "end_of_an_answer"),
    (TestVicunaV1, lambda: Words(image=False), "every_image"),
    (TestVicunaV1, lambda: Words(markup=True), "not_markup"),
    (TestVicunaV1, lambda: Words(check=False), "out_of_order"),
    (TestConversations, lambda: conversations(Unstable), "every_build"),
    (TestConversations, lambda: conversations(Endless), "every_index"),
    (TestConversations, lambda: conversations(Torn), "whole"),
    (TestEcho, Silent, "answers_with_text"),
    (TestEcho, Meddling, "answers_with_text"),
    (TestOffline, lambda: Teacher((HUMAN,)), "whole_conversations"),
    (TestOffline, lambda: Teacher((GPT, HUMAN)), "whole_conversations"),
    (TestOffline, lambda: Teacher((Turn("human", "?"), GPT)), "whole_conversations"),
    (TestOffline, lambda: Teacher((HUMAN, Turn("gpt", " "))), "whole_conversations"),
    (TestOffline, lambda: Teacher((HUMAN, GPT, Turn("human", "?"), GPT)), "one_answer"),
    (TestOffline, lambda: Teacher((HUMAN, Turn("gpt", "#"))), "same_context"),
    (TestExactMatch, lambda: Quiz(("a", "a")), "whole"),
    (TestExactMatch, lambda: Quiz(fair=False), "true_answers"),
    (TestBoxed, Greedy, "by_content"),
    (TestBoxed, Lossy, "same_model"),
    (TestMemory, Vain, "changes_none"),
    (TestFinetune, lambda: Work("nan"), "numbers_and_sections"),
    (TestFinetune, lambda: Work("event"), "numbers_and_sections"),
    (TestFinetune, lambda: Work("random"), "same_numbers"),
    (TestFinetune, lambda: Work("outside"), "own_folder"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("contract", "build", "test"), BROKEN, ids=[f"{c.__name__}-{t}" for c, _, t in BROKEN]
)
def test_a_broken_component_fails_its_contract(
    contract: type[Any], build: Any, test: str, tmp_path: Path
) -> None:
    broken = type("Broken", (contract,), {"build": lambda self: build()})()
    names = [name for name in dir(broken) if any(part in name for part in test.split("|"))]
    assert names, f"the contract has no test {test}"
    failures = 0
    for number, name in enumerate(name for name in names if name.startswith("test_")):
        check = getattr(broken, name)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check(folder) if "tmp_path" in check.__code__.co_varnames else check()
        except (AssertionError, TypeError, AttributeError):
            failures += 1
    assert failures


def test_a_step_that_asks_for_a_model_needs_one(tmp_path: Path) -> None:
    class Modelless(llavakit.testing.StepContract):
        def build(self) -> Step:
            return Work("model")

    with pytest.raises(AssertionError, match="gives no `model`"):
        Modelless().start(tmp_path / "step")


def test_every_kind_has_a_contract() -> None:
    for kind in all_kinds():
        # a package that adds a kind brings its contract, too
        own = kind.__name__ in hooks.OWN
        tests = llavakit_plugins.training.testing if own else llavakit.testing
        assert getattr(tests, f"{kind.__name__}Contract").kind is kind
