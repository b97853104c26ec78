"""Choosing a token: transformers' logits processors on the same logits, in torch and in numpy."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llavakit import ModelError, Token, Written, choose_tokens
from llavakit.contracts.model import Sampling
from llavakit.model.sampling import _penalised, distribution

V = 200
PROMPT, IDS = [5, 9, 9, -200, 30], [7, 30, 7, 7]


def some_logits(count: int = 1, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(count, V, generator=torch.Generator().manual_seed(seed))


def their_probabilities(logits: torch.Tensor, sampling: Sampling, ids: list[int]) -> Any:
    """What transformers draws with, `[S, V]`, of the prompt's and the answer's tokens."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    read: Any = torch.tensor([ids] * len(logits))
    scores: Any = steps(read, logits)
    return scores.softmax(-1)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.2, "top_p": 0.7},
    {"temperature": 2.0, "top_p": 0.3},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 3.0, "top_k": 40, "top_p": 0.5},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.5, "min_p": 0.05, "top_k": 30, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 10 * V},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.9, "repetition_penalty": 0.7, "top_k": 7},
]


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_drawn_as_in_transformers(options: dict[str, Any], numpy: bool) -> None:
    logits, sampling = some_logits(50), Sampling(**options)
    expected = their_probabilities(logits, sampling, [t for t in PROMPT + IDS if t >= 0])
    given = [Written(sampling, PROMPT, ids=[*IDS]) for _ in logits]
    scores = _penalised(logits.numpy() if numpy else logits, given)
    found = torch.as_tensor(distribution(scores, [sampling] * len(logits)))
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close((found / found.sum(-1, keepdim=True)).float(), expected)


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
@pytest.mark.parametrize("temperature", [1e-307, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature: float, numpy: bool) -> None:
    logits = some_logits(5)
    given = [Written(Sampling(temperature=temperature, seed=3)) for _ in logits]
    found = choose_tokens(logits.numpy() if numpy else logits, given)
    assert [token.id for token in found] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_penalties_are_those_of_openai_on_what_was_written(numpy: bool) -> None:
    """`mu[j] - c[j] * frequency - (c[j] > 0) * presence`, c counting the answer's tokens alone."""
    logits, sampling = some_logits(), Sampling(frequency_penalty=0.4, presence_penalty=-1.5)
    expected = logits.double().clone()
    for token, count in Counter(IDS).items():
        expected[0, token] -= count * 0.4 - 1.5
    found = _penalised(logits.numpy() if numpy else logits, [Written(sampling, PROMPT, ids=IDS)])
    torch.testing.assert_close(torch.as_tensor(found), expected)
    again = Sampling(repetition_penalty=1e6)
    flat = torch.ones(1, V)
    flat[0, [8, 30]] = torch.tensor([3.0, 4.0])
    assert choose_tokens(flat, [Written(again, [8], ids=[30])])[0].id not in (8, 30)


def test_the_share_of_each_token_is_its_probability() -> None:
    logits = some_logits()[0, :6]
    sampling = Sampling(temperature=2.0, min_p=0.1, seed=3)
    expected = their_probabilities(logits[None], sampling, [0])[0]
    drawn = [choose_tokens(logits, [Written(sampling, number=n)])[0].id for n in range(3000)]
    share = torch.bincount(torch.tensor(drawn), minlength=6) / len(drawn)
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert bool(((share - expected).abs() <= 5 * deviation + 1e-9).all())
    assert float(expected.min()) == 0  # min_p left some out


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(
        st.builds(
            Sampling,
            temperature=st.sampled_from([0.0, 0.7, 2.0]),
            top_p=st.sampled_from([1.0, 0.6]),
            top_k=st.sampled_from([0, 4]),
            min_p=st.sampled_from([0.0, 0.2]),
            frequency_penalty=st.sampled_from([0.0, 1.0]),
            logprobs=st.sampled_from([None, 2]),
            seed=st.integers(-5, 2**64),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 1000),
)
def test_a_token_depends_on_no_neighbour(chosen: list[Sampling], seed: int) -> None:
    """Nor on the array library."""
    logits = some_logits(len(chosen), seed)
    written = [Written(one, PROMPT, ids=IDS[: n % 4]) for n, one in enumerate(chosen)]
    found = choose_tokens(logits, written)
    for n, one in enumerate(written):
        assert choose_tokens(logits[n], [one]) == [found[n]]
        assert choose_tokens(logits[n].numpy(), [one])[0].id == found[n].id
    assert choose_tokens(logits.numpy(), written) == found


def test_a_seed_gives_other_numbers_to_each_token_and_answer() -> None:
    logits = torch.zeros(1, V)

    def drawn(number: int, length: int, seed: int | None = 1) -> int:
        sampling = Sampling(temperature=1.0, seed=seed)
        return choose_tokens(logits, [Written(sampling, number=number, ids=[0] * length)])[0].id

    assert len({drawn(number, length) for number in range(6) for length in range(6)}) > 24
    assert drawn(2, 3) == drawn(2, 3)
    assert len({drawn(0, 0, seed=None) for _ in range(20)}) > 10


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_logarithms_are_of_what_the_model_says(numpy: bool) -> None:
    logits = some_logits()
    sampling = Sampling(temperature=0.3, top_k=2, repetition_penalty=5.0, logprobs=4, seed=0)
    token = choose_tokens(logits.numpy() if numpy else logits, [Written(sampling, PROMPT)])[0]
    logs = logits[0].double().log_softmax(-1)
    assert token.logprob == pytest.approx(float(logs[token.id]), abs=1e-6)
    best = logs.topk(4)
    assert [number for number, _ in token.top] == best.indices.tolist()
    np.testing.assert_allclose([log for _, log in token.top], best.values, atol=1e-6)
    assert choose_tokens(logits, [Written(Sampling())]) == [Token(int(logits.argmax()))]


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("top_k", -1), ("min_p", 1.5), ("min_p", -0.1), ("top_p", 0), ("top_p", 1.1), ("n", 0),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("frequency_penalty", math.nan),
        ("presence_penalty", math.inf), ("logprobs", -1), ("temperature", -1),
        ("temperature", math.nan), ("temperature", math.inf), ("max_new_tokens", 0),
        ("max_new_tokens", 2.5), ("max_new_tokens", "8"), ("temperature", [0.5]), ("top_k", None),
        ("top_p", 3j), ("n", {}), ("seed", 1.5), ("seed", "x"), ("logprobs", b"1"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_name(option: str, wrong: Any) -> None:
    said = re.escape(f"cannot sample with {option}={wrong!r}; use ")
    with pytest.raises(ModelError, match=said):
        Sampling(**{option: wrong})


def test_a_text_is_no_list_of_stops() -> None:
    for wrong in ("###", [""], [3], None, {"#"}):
        with pytest.raises(ModelError, match=r"`stop` is a list .* empty text"):
            Sampling(stop=wrong)  # type: ignore[arg-type]
