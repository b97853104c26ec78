"""Preferences: DPO against trl and by hand, log-probabilities against transformers, resuming."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Command, RecipeWriter
from tests.core import processes
from tests.core.engine.test_distributed import llava_run as torchrun
from tests.plugins.training.test_sharded import events, losses, same, sets, tensors
from tests.plugins.training.test_sharded_checkpoints import as_if_killed

from llavakit import DataError, LlavaModel, PromptTemplate, Registry, Use
from llavakit.model.folder import save_model
from llavakit.stream.encode import encode
from llavakit_plugins.datasets.conversation_rows import RowReader
from llavakit_plugins.training.answers import LastAnswer, both_answers
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.kinds import Objective
from llavakit_plugins.training.measure import Measure, entry_of
from llavakit_plugins.training.next_token import NextToken
from llavakit_plugins.training.objectives import Dpo, DpoOptions, sample_logprobs
from llavakit_plugins.training.testing import ObjectiveContract


class TestNextToken(ObjectiveContract):
    def build(self) -> Objective:
        return NextToken()


class TestDpo(ObjectiveContract):
    def build(self) -> Objective:
        return Dpo(DpoOptions())


class TestIpo(ObjectiveContract):
    options = {"loss": "ipo", "beta": 0.5}  # noqa: RUF012

    def build(self) -> Objective:
        return Dpo(DpoOptions(loss="ipo", beta=0.5))


def numbers() -> tuple[Any, ...]:
    """Return predictions, and what they are in plain numbers: log-probabilities, references."""
    predicted = TestDpo().predicted()
    hidden = predicted.hidden_ME.detach().double().numpy()
    logits = hidden @ predicted.language.head.weight.detach().double().numpy().T
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = logprobs[np.arange(len(logits)), predicted.targets_M.numpy()]
    ends = np.cumsum(predicted.counts)
    sums = np.array([part.sum() for part in np.split(rows, ends[:-1])])
    assert predicted.reference_S is not None
    return predicted, sums, predicted.reference_S.double().numpy()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DpoOptions(beta=0.3), lambda d, _: np.log1p(np.exp(-0.3 * d))),
        (
            DpoOptions(beta=0.3, label_smoothing=0.2),
            lambda d, _: 0.8 * np.log1p(np.exp(-0.3 * d)) + 0.2 * np.log1p(np.exp(0.3 * d)),
        ),
        (DpoOptions(beta=0.3, loss="hinge"), lambda d, _: np.maximum(0, 1 - 0.3 * d)),
        (DpoOptions(beta=0.3, loss="ipo"), lambda _, m: (m - 1 / 0.6) ** 2),
    ],
)
def test_the_loss_is_that_of_the_papers(
    options: DpoOptions, expected: Callable[[Any, Any], Any]
) -> None:
    predicted, sums, reference = numbers()
    loss, (chosen, rejected, accuracy, margin) = Dpo(options).loss(predicted)
    ratios = sums - reference
    means = ratios / np.array(predicted.counts)
    pairs = ratios[0::2] - ratios[1::2], means[0::2] - means[1::2]
    assert loss.item() == pytest.approx(expected(*pairs).sum(), rel=1e-5)
    assert chosen.item() == pytest.approx(0.3 * ratios[0::2].sum(), rel=1e-5)
    assert rejected.item() == pytest.approx(0.3 * ratios[1::2].sum(), rel=1e-5)
    assert accuracy.item() == (ratios[0::2] > ratios[1::2]).sum()
    assert margin.item() == pytest.approx(0.3 * pairs[0].sum(), rel=1e-4)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_the_loss_and_the_rewards_are_those_of_trl(kind: Any) -> None:
    theirs: Any = pytest.importorskip("trl.trainer.dpo_trainer")

    predicted, _, _ = numbers()
    pairs = len(predicted.counts) // 2
    longest = max(predicted.counts)
    order = [*range(0, 2 * pairs, 2), *range(1, 2 * pairs, 2)]  # theirs: all chosen ones first
    rows = predicted.language.logits(predicted.hidden_ME).log_softmax(-1)
    rows = rows.gather(1, predicted.targets_M[:, None])[:, 0].split(list(predicted.counts))
    logprobs = torch.zeros(2 * pairs, longest + 1)
    mask = torch.zeros(2 * pairs, longest + 2, dtype=torch.int64)
    for at, sample in enumerate(order):
        logprobs[at, 1 : 1 + len(rows[sample])] = rows[sample]
        mask[at, 2 : 2 + len(rows[sample])] = 1
    assert predicted.reference_S is not None
    chosen, rejected = predicted.reference_S[order].chunk(2)
    told: Any = {"train": defaultdict(list)}
    zeros = torch.zeros_like(logprobs)
    out = SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None,
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind],
        loss_weights=[1.0], beta=0.3, label_smoothing=0.0, use_weighting=False, _metrics=told,
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask),
        "completion_mask": mask, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    loss = theirs.DPOTrainer._compute_loss(trainer, lambda **_: out, inputs, False)
    ours, figures = Dpo(DpoOptions(beta=0.3, loss=kind)).loss(predicted)
    assert (ours / pairs).item() == pytest.approx(loss.item(), rel=1e-5)
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    for name, value in zip(names, figures, strict=True):
        assert (value / pairs).item() == pytest.approx(told["train"][name][0], rel=1e-4), name


# -- rows --------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "what ?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("red", "blue"))


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "what ?"}], "chosen": "red",
         "rejected": "blue"},
        {"conversations": [{"from": "human", "value": "what ?"}],
         "chosen": {"from": "gpt", "value": "red"}, "rejected": {"from": "gpt", "value": "blue"}},
        {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
        {"prompt": "what ?", "chosen": "red", "rejected": "blue"},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ],
    ids=["llava", "turns", "messages", "texts", "trl", "whole"],
)  # fmt: skip
def test_every_form_of_a_preference_is_read(row: dict[str, Any]) -> None:
    sample = RowReader("rows", Path()).sample(row, 0)
    assert [(turn.role, turn.text) for turn in sample.turns] == [
        ("human", "what ?"),
        ("gpt", "red"),
    ]
    assert sample.rejected == "blue"


def test_a_preferences_images_are_read() -> None:
    reader = RowReader("rows", Path("/data"))
    parts = [{"type": "image"}, {"type": "text", "text": "what ?"}]
    trl = {"prompt": [{"role": "user", "content": parts}], "images": ["a.png"], "chosen": [GOOD],
           "rejected": [BAD]}  # fmt: skip
    text = {"prompt": "what ?", "image": "a.png", "chosen": "red", "rejected": "blue"}
    for row in (trl, text):
        sample = reader.sample(row, 0)
        assert sample.turns[0].text == "<image>\nwhat ?"
        assert sample.images == (Path("/data/a.png"),)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "what ?", "chosen": "red"}, "has no `rejected`"),
        ({"prompt": "what ?", "chosen": "red", "rejected": " "}, "`rejected` is one answer"),
        ({"prompt": "what ?", "chosen": ASKED, "rejected": "blue"}, "`chosen` is from 'user'"),
        ({"chosen": "red", "rejected": "blue"}, "answer no common question"),
        ({"chosen": [ASKED, GOOD], "rejected": [GOOD, BAD]}, "answer no common question"),
        ({"prompt": "a", "messages": [ASKED], "chosen": "red", "rejected": "blue"}, "keep one"),
        ({"prompt": 3, "chosen": "red", "rejected": "blue"}, "^sample `#1` of rows: `prompt`"),
        (
            {"image": "a.png", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
            "^sample `#1` of rows: `chosen` and `rejected` has 1 image for 0",
        ),
    ],
)
def test_what_is_no_preference_is_said(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        RowReader("rows", Path()).sample(row, 0)


@pytest.fixture
def preferences(data: Path, tmp_path: Path) -> Path:
    """Rows of the data's images, of several turns and of text alone, with two answers each."""
    rows = json.loads((data / "train.json").read_text())
    for number, row in enumerate(rows):
        *turns, last = row["conversations"]
        other = "it is " + ("blue . red ." if number % 2 else "a square")
        row |= {"conversations": turns, "chosen": last["value"], "rejected": other}
    path = tmp_path / "preferences.json"
    path.write_text(json.dumps(rows))
    return path


def test_check_data_knows_preferences(preferences: Path, data: Path, llava_run: Command) -> None:
    ran = llava_run("check-data", preferences, "--images", data / "images", "--json")
    report = json.loads(ran.out)
    assert (ran.code, report["samples"], report["preferences"]) == (0, 24, 24)
    rows = json.loads(preferences.read_text())
    del rows[3]["rejected"]
    preferences.write_text(json.dumps(rows))
    ran = llava_run("check-data", preferences, "--images", data / "images", "--json")
    assert ran.code == 2
    messages = [m for sort in json.loads(ran.out)["findings"] for m in sort["messages"]]
    assert any("`s3`" in message and "has no `rejected`" in message for message in messages)


# -- log-probabilities and training ------------------------------------------------------------


def corpus_of(preferences: Path, data: Path, model: Any) -> Corpus:
    use = Use[Any].model_validate(
        {"use": "conversations", "path": str(preferences), "images": f"{data}/images"}
    )
    both = Registry.installed().build(both_answers(use))
    return Corpus(both, model, LastAnswer(model.template), 2048, together=2)


def test_pairs_stay_together_and_only_last_answers_are_supervised(
    model: LlavaModel, preferences: Path, data: Path
) -> None:
    corpus = corpus_of(preferences, data, model)
    seen: list[int] = []
    steps = list(corpus.epoch(3, 0, 5, 100))
    assert len(steps) == corpus.steps(5) == 5
    for step in steps:
        for micro in step.samples:
            assert all(a % 2 == 0 and b == a + 1 for a, b in corpus.groups(micro))
            seen += micro
    assert sorted(seen) == list(range(48))
    for index in (0, 1):  # two turns, of which the second one is a preference
        text = str(model.tokenizer.decode(_supervised(corpus, index)))
        assert text.split() == (["a", "square", ".", "</s>"] if index == 0 else
                                ["it", "is", "a", "square", "</s>"])  # fmt: skip


def _supervised(corpus: Corpus, index: int) -> list[int]:
    encoded = corpus.encoded(index)
    found: list[int] = encoded.ids[encoded.supervised].tolist()
    return found


def test_log_probabilities_are_those_of_transformers_on_padded_batches(
    model: LlavaModel, preferences: Path, data: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    save_model(model, tmp_path / "model")
    ours: Any = model
    corpus = corpus_of(preferences, data, ours)
    text_only = [s for s in corpus.samples if not len(corpus.images[s])]
    batch = corpus.pack(text_only)
    measure = Measure(ours, entry_of(ours, sharded=False), Dpo(DpoOptions()), corpus)
    with torch.no_grad():
        found = entry_of(ours, sharded=False)(
            batch, None, lambda hidden: sample_logprobs(measure._predicted(batch, hidden, None))
        )
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model/language").float()
    encoded = [corpus.encoded(sample) for sample in text_only]
    longest = max(len(one.ids) for one in encoded)
    ids = torch.full((len(encoded), longest), 3)
    mask, kept = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, one in enumerate(encoded):
        ids[row, : len(one.ids)] = torch.from_numpy(one.ids)
        mask[row, : len(one.ids)] = 1
        kept[row, : len(one.ids)] = torch.from_numpy(one.supervised)
    with torch.no_grad():
        logprobs = theirs(ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
    rows = logprobs.gather(2, ids[:, 1:, None])[..., 0] * kept[:, 1:]
    torch.testing.assert_close(found, rows.sum(1), atol=2e-4, rtol=1e-4)


def recipe_of(write_recipe: RecipeWriter, preferences: Path, *more: tuple[str, str]) -> Path:
    """Write the small recipe with a step `prefer` for its second one."""
    old = 'use = "finetune"\ntrain = { connector = 1e-2, language = 1e-2 }'
    new = 'use = "prefer"\ntrain = { connector = 1e-3, language = 1e-3 }'
    path = write_recipe((old, new), *more)
    head, _, tail = path.read_text().rpartition('path = "')
    path.write_text(f'{head}path = "{preferences}"{tail.partition(chr(34))[2]}')
    return path


def test_chosen_answers_become_likelier(
    write_recipe: RecipeWriter, preferences: Path, llava_run: Command, tmp_path: Path
) -> None:
    recipe = recipe_of(write_recipe, preferences)
    held = f'{{ use = "conversations", path = "{preferences}", images = "{_images(recipe)}" }}'
    out = tmp_path / "run"
    more = {"steps.prefer.epochs": "4", "steps.prefer.held_out": held,
            "steps.prefer.validate_every": "6"}  # fmt: skip
    ran = llava_run(recipe, "--out", out, *sets(**GENTLE, **more))
    assert ran.code == 0, ran.err
    told = [event for event in events(out, "train") if event["step"].endswith("prefer")]
    assert told[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert told[0]["rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert told[-1]["loss"] < 0.65
    assert told[-1]["rewards/accuracy"] > 0.7
    margin = told[-1]["rewards/chosen"] - told[-1]["rewards/rejected"]
    assert told[-1]["rewards/margin"] == pytest.approx(margin, abs=1e-4)
    looks = [event["held_out_loss"] for event in events(out, "validation")]
    assert looks[0] == pytest.approx(math.log(2), abs=1e-5)
    assert looks[-1] < 0.65
    (step,) = out.glob("0?-prefer")
    found = json.loads((step / "artifact.json").read_text())
    assert found["metrics"]["rewards_accuracy"] > 0.7
    titles = [section["title"] for section in found["sections"]]
    assert {"Training loss", "Rewards/margin", "Rewards/accuracy"} <= set(titles)
    reference = load_file(step / "reference.safetensors")
    assert int(reference["done"]) == len(reference["values"]) == 48
    assert torch.isfinite(reference["values"]).all()


GENTLE = {"steps.1.skip": "true"}


def _images(recipe: Path) -> str:
    return recipe.read_text().rpartition('images = "')[2].partition('"')[0]


def test_a_resumed_run_is_the_same_bits_and_reads_its_reference(
    write_recipe: RecipeWriter, preferences: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    lora = 'use = "vicuna"\nlora = { rank = 4, alpha = 8, dropout = 0.1 }'
    recipe = recipe_of(write_recipe, preferences, ('use = "vicuna"', lora))
    more = {**GENTLE, "steps.prefer.keep": "9"}
    whole = tmp_path / "whole"
    assert processes.run(tmp_path, recipe, *sets(**more), "--out", whole) == 0
    (step,) = whole.glob("0?-prefer")
    before = load_file(step / "reference.safetensors")["values"]
    again = as_if_killed(whole, tmp_path / "again", 2, "prefer")
    assert processes.run(tmp_path, recipe, *sets(**more), "--out", again, "--resume") == 0
    # once more from a checkpoint, but the reference is gone: the model before training gives it
    lost = as_if_killed(whole, tmp_path / "lost", 4, "prefer")
    next(lost.glob("0?-prefer/reference.safetensors")).unlink()
    assert processes.run(tmp_path, recipe, *sets(**more), "--out", lost, "--resume") == 0
    for run, at in ((again, 2), (lost, 4)):
        assert losses(run)[-(6 - at) :] == losses(whole)[-(6 - at) :]
        for name, weight in tensors(whole / "model").items():
            assert torch.equal(tensors(run / "model")[name], weight), name
        (file,) = run.glob("0?-prefer/reference.safetensors")
        assert torch.equal(load_file(file)["values"], before)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["true", "false"])
def test_two_processes_prefer_as_one_does(
    write_recipe: RecipeWriter, preferences: Path, tmp_path: Path, shard: str
) -> None:
    recipe = recipe_of(write_recipe, preferences)
    more = {**GENTLE, "steps.prefer.shard": shard, "steps.prefer.train":
            "{ connector = 1e-4, language = 1e-4 }"}  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert processes.run(tmp_path, recipe, *sets(**more), "--out", one) == 0
    run = torchrun(2, recipe, *sets(**more), "--out", two)
    assert run.returncode == 0, run.stderr
    assert losses(two) == pytest.approx(losses(one), abs=5e-6)
    names = ("rewards/chosen", "rewards/margin", "rewards/accuracy")
    for mine, theirs in zip(events(two, "train"), events(one, "train"), strict=True):
        assert [mine[n] for n in names] == pytest.approx([theirs[n] for n in names], abs=5e-6)
    same(one / "model", two / "model")


def test_data_without_two_answers_is_refused(
    write_recipe: RecipeWriter, data: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    recipe = recipe_of(write_recipe, data / "train.json")
    said = refused(recipe, *sets(**GENTLE), "--out", tmp_path / "run")
    assert "sample `s0` has no two answers to prefer one of" in said


def test_only_the_last_answer_of_any_template_is_supervised() -> None:
    from llavakit import Sample, Turn
    from llavakit.testing import byte_tokenizer

    turns = [Turn("human", "a"), Turn("gpt", "b"), Turn("human", "c"), Turn("gpt", "dd")]
    registry, tokenizer = Registry.installed(), byte_tokenizer()
    for name in ("vicuna_v1", "v0", "llama_2"):
        template = registry.build(Use[PromptTemplate](use=name))
        sample = Sample("x", tuple(turns))
        plain = encode(sample, template, tokenizer)
        last = encode(sample, LastAnswer(template), tokenizer)
        assert np.array_equal(plain.ids, last.ids)
        assert not (last.supervised & ~plain.supervised).any()
        text = str(tokenizer.decode(last.ids[last.supervised].tolist()))
        assert "dd" in text
        assert "b" not in text.split()
        assert last.supervised.sum() < plain.supervised.sum()
