"""`causal-lm` against transformers' own forward passes, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.plugins.families import FAMILIES, config_of, qwen_tokenizer, their_model
from torch import Tensor
from torch.nn import functional as F

import llavakit.testing
from llavakit import LanguageModel, ModelError
from llavakit.contracts.model import Sampling
from llavakit.contracts.packing import Packing, Rows
from llavakit.model.generate import generate_stream
from llavakit_plugins.language.causal_lm import CausalLM, CausalLMOptions

LENGTHS = (9, 1, 14)


def ours_like(theirs: Any, family: str, **changes: Any) -> CausalLM:
    ours = CausalLM(CausalLMOptions(config=config_of(family, **changes))).eval()
    ours.model.load_state_dict(theirs.state_dict())
    ours.tokenizer = qwen_tokenizer()
    return ours


def some_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 255, (count,), generator=torch.Generator().manual_seed(seed))


class Contract(llavakit.testing.LanguageModelContract):
    family: ClassVar[str]

    @property
    def options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {"config": config_of(self.family)}

    def build(self) -> LanguageModel:
        torch.manual_seed(0)
        language = CausalLM(CausalLMOptions(**self.options))
        language.tokenizer = qwen_tokenizer()
        return language


class TestQwen2(Contract):
    family = "qwen2"


class TestGemma2(Contract):
    family = "gemma2"


class TestPhi(Contract):
    family = "phi"


del Contract  # or pytest would try it


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_transformers(family: str) -> None:
    theirs = their_model(family)
    ours = ours_like(theirs, family)
    ids = some_ids(sum(LENGTHS))
    embeds = ours.embed(ids).detach().requires_grad_()
    rows = Rows(torch.tensor([2, 5, 8, 12, 22]), (3, 0, 2))
    targets = some_ids(5, seed=1)
    packing = Packing.of(LENGTHS)
    with torch.no_grad():
        found = ours.logits(ours.hidden(embeds, packing))
        alone = [theirs(input_ids=part[None]).logits[0] for part in ids.split(LENGTHS)]
    expected = torch.cat(alone)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours.loss(ours.hidden(embeds, packing, rows), targets).backward()

    inputs = embeds.detach().clone().requires_grad_()
    their_logits = torch.cat(
        [theirs(inputs_embeds=part[None]).logits[0] for part in inputs.split(LENGTHS)]
    )
    F.cross_entropy(their_logits[rows.index_M].float(), targets, reduction="sum").backward()
    torch.testing.assert_close(embeds.grad, inputs.grad, atol=1e-5, rtol=1e-4)
    for (name, mine), yours in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        if yours.grad is not None and "embed" not in name:  # theirs looked nothing up
            torch.testing.assert_close(mine.grad, yours.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_a_batch_are_those_of_transformers(family: str) -> None:
    theirs = their_model(family)
    ours = ours_like(theirs, family)
    prompts = [some_ids(length, seed=length) for length in LENGTHS]
    answers: list[list[int]] = [[] for _ in prompts]
    embeds = ours.embed(torch.cat(prompts)).detach()
    for step in generate_stream(ours, embeds, Packing.of(LENGTHS), Sampling(12)):
        for sequence, token in step:
            answers[sequence].append(token.id)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = theirs.generate(
            input_ids=prompt[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12, do_sample=False, eos_token_id=sorted(ours.end_ids), pad_token_id=0,
        )[0, len(prompt) :]  # fmt: skip
        assert answer == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_goes_on_from_what_was_read_before(family: str) -> None:
    """With sliding windows, caps and sinks; and what was read may hold more than is used."""
    ours = ours_like(their_model(family), family)
    ids = some_ids(30, seed=1)
    kept: list[Any] = []

    def answer(begin: int, end: int, **options: Any) -> list[int]:
        embeds = ours.embed(ids[begin:end]).detach()
        packing = Packing.of([end - begin])
        steps = generate_stream(ours, embeds, packing, Sampling(10), **options)
        return [step[0][1].id for step in steps]

    expected = answer(0, 30)
    answer(0, 21, keep=lambda cache, size, written: kept.append(cache))
    for known in (21, 13, 1):
        assert answer(known, 30, held=kept[0], known=known) == expected


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mistral"])
def test_a_neighbour_changes_neither_logits_nor_gradients(family: str) -> None:
    ours = ours_like(their_model(family), family)

    def run(neighbour: Tensor) -> tuple[Tensor, Tensor]:
        own = ours.embed(some_ids(9)).detach().requires_grad_()
        stream = torch.cat([neighbour, own])
        logits = ours.logits(ours.hidden(stream, Packing.of([11, 9])))[11:]
        logits.square().sum().backward()
        assert own.grad is not None
        return logits.detach(), own.grad

    other = ours.embed(some_ids(11, seed=1)).detach()
    for one, two in zip(run(other), run(-2 * other), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_a_frozen_model_computes_again_what_its_gradient_needs() -> None:
    """In evaluation mode, as while only the connector learns; windows and all."""
    ours = ours_like(their_model("gemma2"), "gemma2").requires_grad_(False)
    gradients, saved = [], []
    for recompute in (False, True):
        ours.recompute = recompute
        embeds = ours.embed(some_ids(24)).detach().requires_grad_()
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = ours.hidden(embeds, Packing.of(LENGTHS))
        other = ours.hidden(embeds.detach()[:5], Packing.of([5]))  # a pass in between
        assert other.shape == (5, ours.width)
        hidden.square().sum().backward()
        assert embeds.grad is not None
        gradients.append(embeds.grad)
        saved.append(sum(kept))
    assert torch.equal(gradients[0], gradients[1])
    assert saved[1] < saved[0] / 4


def test_gemma_scales_text_and_not_images() -> None:
    """What a connector writes goes into the first layer as it is, beside scaled text."""
    ours = ours_like(their_model("gemma"), "gemma")
    table = ours.model.get_input_embeddings().weight
    ids = some_ids(4)
    torch.testing.assert_close(ours.embed(ids), table[ids] * ours.width**0.5)
    assert ours.embedding_VE is None
    seen: list[Tensor] = []
    ours.model.model.layers[0].register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0])
    )
    visual = torch.randn(4, ours.width)
    ours.hidden(visual, Packing.of([4]))
    assert torch.equal(seen[0][0], visual)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba"}, "layers of kind linear_attention, which would mix samples"),
        ({"model_type": "bloom"}, "does not go through transformers' attention interface"),
        ({"model_type": "bart"}, "it has an encoder besides its decoder"),
        ({"model_type": "vit"}, "it is no causal language model"),
        ({"model_type": "gemma3n_text"}, "each of its layers reads token ids"),
        ({"model_type": "llama4_text"}, "layers of kind chunked_attention"),
        ({"model_type": "bert"}, "not those of a linear layer behind its decoder"),
        ({"model_type": "no-such"}, "transformers cannot make a `no-such`"),
        ({"hidden_size": 32}, "say which model it is"),
        (config_of("qwen2", layer_types=["full_attention"]), "cannot make a `qwen2` of this"),
    ],
)
def test_a_model_that_cannot_run_over_the_stream_is_refused(
    config: dict[str, Any], reason: str
) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=reason):
        CausalLM(CausalLMOptions(config=config))


def test_what_shows_only_when_it_runs_is_refused_then() -> None:
    small = config_of("llama", model_type="diffllama")
    twice = CausalLM(CausalLMOptions(config=small))
    with pytest.raises(ModelError, match=r"cannot run `diffllama`: .*not each of them once"):
        twice.hidden(twice.embed(some_ids(3)), Packing.of([3]))
    dropping = CausalLM(CausalLMOptions(config=config_of("qwen2", attention_dropout=0.1))).train()
    with pytest.raises(ModelError, match=r"no dropout, the model asks for 0\.1"):
        dropping.hidden(dropping.embed(some_ids(3)), Packing.of([3]))


def test_positions_that_depend_on_the_longest_neighbour_are_not_reached() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4, "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = config_of("phi3", original_max_position_embeddings=32, rope_parameters=rope)
    assert CausalLM(CausalLMOptions(config=config)).max_length == 32
    with pytest.raises(ModelError, match="`max_length = 32` or less"):
        CausalLM(CausalLMOptions(config=config, max_length=64))


def test_every_end_token_of_generation_config_ends_an_answer(tmp_path: Path) -> None:
    theirs = their_model("qwen2")
    theirs.generation_config.eos_token_id = [256, 258]
    theirs.save_pretrained(tmp_path)
    qwen_tokenizer().save_pretrained(tmp_path)
    ours = CausalLM.create(CausalLMOptions(source=str(tmp_path)))
    assert ours.end_ids == {256, 258}  # <|endoftext|> and <|im_end|>, the tokenizer's own
    free = [int(token) for token in theirs.generate(
        input_ids=some_ids(5)[None], max_new_tokens=8, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, 5:]]  # fmt: skip
    ours.model.generation_config.eos_token_id = [free[4], 256]
    steps = list(generate_stream(ours, ours.embed(some_ids(5)), Packing.of([5]), Sampling(8)))
    assert [step[0][1].id for step in steps] == free[: free.index(free[4]) + 1]


def test_a_model_folder_asks_for_the_tokenizer_that_fits(tmp_path: Path) -> None:
    their_model("qwen2", vocab_size=256).save_pretrained(tmp_path)
    qwen_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has 259 tokens, the language model 256"):
        CausalLM.create(CausalLMOptions(source=str(tmp_path)))
