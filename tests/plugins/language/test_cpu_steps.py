"""Steps of decoding on a CPU by numpy, against transformers and against the usual forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import LANGUAGE
from tests.core.peer import make_pair, their_inputs
from torch import Tensor, nn

from llavakit.contracts.model import Sampling
from llavakit.contracts.packing import KVCache, Packing
from llavakit_kernels import few_rows
from llavakit_plugins.huggingface.products import Products
from llavakit_plugins.language import cpu_steps
from llavakit_plugins.language.causal_lm import CausalLM, CausalLMOptions
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions

pytestmark = pytest.mark.skipif(
    not hasattr(np, "vecdot"), reason="this numpy has no products of vectors"
)
LENGTHS = [5, 1, 9]
PROMPTS = ["<image> what colour is it ?", "what shape", "<image> what is the colour ?"]
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "a key for each head": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 20},
    "tied embeddings": {"tie_word_embeddings": True},
    "scaled positions": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every machine computes as those do that gain by it."""
    monkeypatch.setattr(few_rows, "faster_here", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of every step that ran by numpy."""
    counts: list[int] = []
    hidden = cpu_steps.hidden

    def counted(decoder: Any, blocks: Any, embeds_SE: Tensor, packing: Packing) -> Tensor:
        counts.append(len(embeds_SE))
        return hidden(decoder, blocks, embeds_SE, packing)

    monkeypatch.setattr(cpu_steps, "hidden", counted)
    return counts


def vicuna(**changes: Any) -> Vicuna:
    options = {key: changes.pop(key) for key in ("lora", "products", "dtype") if key in changes}
    torch.manual_seed(0)
    model = Vicuna(VicunaOptions(config={**LANGUAGE, **changes}, **options)).eval()
    for parameter in model.parameters():  # zero biases would hide a forgotten one
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def read(model: Any, lengths: list[int], extra: int = 3) -> KVCache:
    """Return a cache that holds random prompts."""
    cache = KVCache(model.cache_shape()[0], [n + extra for n in lengths])
    prompt = replace(Packing.of(lengths), cache=cache)
    ids = torch.randint(4, 64, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    model.hidden(model.embed(ids), prompt)
    cache.advance(prompt)
    return cache


def step(model: Any, cache: KVCache, tokens: list[int], **changes: Any) -> Tensor:
    """Return the logits of one more token a sequence."""
    packing = Packing(tuple(range(len(tokens) + 1)), torch.tensor(cache.lengths), cache)
    hidden = model.hidden(model.embed(torch.tensor(tokens)), replace(packing, **changes))
    cache.advance(packing)
    logits: Tensor = model.logits(hidden)
    return logits


def decode(model: Any, lengths: list[int]) -> Tensor:
    cache = read(model, lengths)
    return torch.stack([step(model, cache, [7, 12, 9, 30][: len(lengths)]) for _ in range(3)])


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[6], LENGTHS, [3, 8, 2, 5]])
def test_steps_are_those_of_the_usual_pass(
    shape: str, lengths: list[int], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vicuna(**SHAPES[shape])
    found = decode(model, lengths)
    assert steps == [len(lengths)] * 3
    monkeypatch.setattr(few_rows, "faster_here", lambda: False)
    usual = Vicuna(VicunaOptions(config=LANGUAGE), model.model)
    assert type(usual.head) is nn.Linear
    expected = decode(usual, lengths)
    assert len(steps) == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


@torch.no_grad()
def test_a_sequence_gets_the_same_bits_alone_and_beside_others(steps: list[int]) -> None:
    model = vicuna(attention_bias=True)
    together, first = read(model, LENGTHS), read(model, LENGTHS)
    first.select([2])
    for token in (7, 40):
        both = step(model, together, [5, 9, token])
        assert torch.equal(step(model, first, [token]), both[2:])
    assert steps == [3, 1, 3, 1]


@pytest.mark.parametrize("products", ["torch", "onednn"])
@pytest.mark.parametrize("count", [1, 3])
def test_greedy_answers_are_those_of_transformers(
    products: Products, count: int, steps: list[int]
) -> None:
    theirs, ours = make_pair(products=products)
    ours.language.tokenizer.eos_token = None
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked: Any = [(text, [None] * text.count("<image>")) for text in PROMPTS[:count]]
    answers = ours.answer_ids(
        asked, Sampling(24), raw=True, pixels_IHW=pixels[: 1 if count == 1 else 2]
    )
    assert steps == [count] * 23
    images = iter(pixels.split(1))
    for text, answer in zip(PROMPTS, answers, strict=False):
        inputs = their_inputs(ours, text, next(images) if "<image>" in text else None)
        expected = theirs.generate(**inputs, do_sample=False, max_new_tokens=24, min_new_tokens=24)
        assert answer == expected[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_families_of_transformers_multiply_few_rows_so_too() -> None:
    config = {**LANGUAGE, "model_type": "qwen2"}
    model = CausalLM(CausalLMOptions(config=config)).eval()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert {type(layer) for layer in layers} == {few_rows.Linear}
    for _ in range(2):  # as often as one likes, either way
        again = CausalLM(CausalLMOptions(config=config, products="onednn"), model.model)
        assert {type(layer) for layer in layers} == {few_rows.OnednnLinear}
        again = CausalLM(CausalLMOptions(config=config), model.model)
        assert {type(layer) for layer in layers} == {few_rows.Linear}
    found = decode(again, LENGTHS)
    for layer in layers:
        layer.__class__ = nn.Linear
    torch.testing.assert_close(found, decode(again, LENGTHS), rtol=1e-5, atol=1e-5)


class Watched:
    """Sees the layers of a step."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def see(self, layer: int, *_: Any) -> None:
        self.layers.append(layer)


@torch.no_grad()
def test_what_does_not_fit_takes_the_usual_pass(
    steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vicuna()
    watch = Watched()
    step(model, read(model, [4]), [7], watch=watch)
    assert watch.layers == [0, 1]
    step(model, read(model, [4] * 5), [7] * 5)  # more rows than gain by it
    cache = read(model, [4])
    with torch.enable_grad():
        assert step(model, cache, [7]).requires_grad
    seen: list[Any] = []
    for module in (model.model.model.layers[1], model.model.model.layers[0].mlp.up_proj):
        hook = module.register_forward_hook(lambda *given: seen.append(given[0]))
        cache = read(model, [4])
        step(model, cache, [7])
        assert seen == [module] * 2  # the prompt and the step
        seen.clear()
        hook.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, read(model, [4]), [7])
    others = [
        vicuna(hidden_act="gelu"), vicuna(dtype="bfloat16"), vicuna(lora={"rank": 2}),
        vicuna().double(),
    ]  # fmt: skip
    for other in others:
        assert step(other, read(other, [4]), [7]).isfinite().all()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    step(model, read(model, [4, 3]), [7, 8])  # which are faster on eight threads of torch's
    assert steps == []
    step(model, read(model, [4]), [7])
    assert steps == [1]


@torch.no_grad()
def test_weights_that_change_are_read_anew(steps: list[int]) -> None:
    model = vicuna()
    cache = read(model, [4])
    before = step(model, cache, [7])
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.01
    cache.lengths = [4]
    assert not torch.allclose(step(model, cache, [7]), before)
    assert steps == [1, 1]
