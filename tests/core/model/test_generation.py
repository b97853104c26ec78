"""Decoding: sampling, stop texts, streaming, and batches that equal one by one."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from tests import published
from tests.conftest import LANGUAGE, make_tokenizer
from tests.core.peer import make_pair
from tests.plugins.families import qwen_tokenizer

from llavakit import LlavaModel, ModelError
from llavakit.contracts.model import Sampling
from llavakit.model.sampling import distribution
from llavakit.stream.detokenise import AnswerText, decode
from llavakit_plugins.huggingface.hub import load_tokenizer

LLAMA = published.llama()


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    """Every token of its vocabulary is a word; it never ends an answer by itself."""
    vocabulary = len(make_tokenizer())
    ours = make_pair(language={**LANGUAGE, "vocab_size": vocabulary})[1]
    ours.language.tokenizer.eos_token = None
    network: Any = ours.language.model
    network.generation_config.eos_token_id = None
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)  # so that answers are not one token again and again
        ours.language.head.weight += torch.randn_like(ours.language.head.weight)
        ours.language.head.weight[:4] = 0  # nor special tokens
    return ours


@pytest.fixture(scope="module", params=["llama", "qwen"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "qwen":
        return qwen_tokenizer()
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(LLAMA, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return load_tokenizer(str(folder))


PIECES = ["a", " b", "  ", "\n", "é", "中文", "😀", "Human", "###", " ###", "#", "</s>", "end", "."]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=3),
    noise=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 300)), max_size=4),
    stops=st.lists(st.sampled_from(["###", "Human", "\n\n", "文", "d.", "a b"]), max_size=2),
)
def test_the_pieces_of_a_stream_are_the_answer(
    tokenizer: Any, texts: list[str], noise: list[tuple[int, int]], stops: list[str]
) -> None:
    """Of text, cut anywhere, and with tokens thrown in that are no character or special."""
    ids = [t for text in texts for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    for place, token in noise:
        ids.insert(min(place, len(ids)), token % len(tokenizer))
    stream = AnswerText(tokenizer, stops)
    pieces, read = [], []
    for token in ids:
        read.append(token)
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    assert "".join([*pieces, stream.finish()]) == decode(tokenizer, read, stops)
    whole = str(tokenizer.decode(read, skip_special_tokens=True))
    found = [place for stop in stops if (place := whole.find(stop)) >= 0]
    assert decode(tokenizer, read, stops) == whole[: min(found, default=None)].strip()
    if not noise:
        assert not any("\ufffd" in piece for piece in pieces)  # no broken character is shown
    if stream.stopped:
        assert found


def test_a_stream_shows_words_as_they_come() -> None:
    tokenizer = qwen_tokenizer()
    stream = AnswerText(tokenizer, ["###"])
    ids = tokenizer("It is 中 ## so ### no")["input_ids"]
    shown = [piece for token in ids if (piece := stream.add(token))]
    assert shown[:4] == ["I", "t", " i", "s"]  # a space waits for what follows it
    assert " 中" in shown
    assert stream.stopped
    assert "".join(shown) + stream.finish() == "It is 中 ## so"


def test_samples_follow_the_seed_and_the_distribution(model: LlavaModel) -> None:
    options: dict[str, Any] = {"raw": True, "temperature": 2.0, "max_new_tokens": 12}
    first = model.generate("a red", seed=3, **options)
    assert model.generate("a red", seed=3, **options) == first
    assert len({model.generate("a red", seed=seed, **options) for seed in range(8)}) > 4
    greedy = model.generate("a red", raw=True, max_new_tokens=12)
    assert model.generate("a red", seed=1, **{**options, "top_p": 1e-6}) == greedy
    logits = model.logits("a red", raw=True)[-1]
    sampling = Sampling(1, 1.5, 0.8, seed=0, n=4000)
    drawn = [ids[0] for ids in model.answer_ids([("a red", ())], sampling, raw=True)]
    expected = distribution(logits[None], [sampling])[0]
    expected = expected / expected.sum()
    share = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / len(drawn)
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert bool(((share - expected).abs() <= 5 * deviation + 1e-9).all())


def pictures(count: int, seed: int) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    return [
        Image.fromarray(draw.integers(0, 255, (30, 34, 3), dtype=np.uint8)) for _ in range(count)
    ]


def test_a_batch_of_many_prompts_equals_one_by_one(model: LlavaModel) -> None:
    """Of unequal length, with no image, one or several, ending at different times."""
    draw = np.random.default_rng(0)
    words = ["a", "red", "blue", "circle", "square", "is", "what", "colour", "picture", "?"]
    prompts: list[tuple[str, list[Image.Image]]] = []
    for number in range(24):
        images = number % 4
        text = [str(w) for w in draw.choice(words, draw.integers(1, 25))] + ["<image>"] * images
        prompts.append((" ".join(draw.permutation(text).tolist()), pictures(images, number)))
    words = " ".join(model.answer(prompts, Sampling(10), raw=True)).split()
    stops = [word for word, _ in Counter(words).most_common()][3:5]
    sampling = Sampling(10, stop=tuple(stops))
    batch = model.answer_ids(prompts, sampling, raw=True)
    alone = [model.answer_ids([prompt], sampling, raw=True)[0] for prompt in prompts]
    assert batch == alone
    assert len({len(ids) for ids in batch}) > 1
    texts = model.answer(prompts, sampling, raw=True)
    assert not any(stop in text for text in texts for stop in sampling.stop)


def test_stop_texts_end_an_answer_and_its_stream(model: LlavaModel) -> None:
    whole = model.generate("a red circle", max_new_tokens=40, raw=True)
    words = whole.split()
    pairs = [" ".join(pair) for pair in pairwise(words)]
    stop = max(pairs, key=whole.index)  # the one that comes last for the first time
    expected = whole[: whole.index(stop)].strip()
    found = model.generate("a red circle", max_new_tokens=40, stop=[stop, "never"], raw=True)
    assert found == expected
    pieces = list(model.stream("a red circle", max_new_tokens=40, stop=[stop], raw=True))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    ids = model.answer_ids([("a red circle", ())], Sampling(40, stop=(stop,)), raw=True)[0]
    assert len(ids) < 40
    with pytest.raises(ModelError, match="an empty text stops none"):
        model.generate("a", stop=[""])


def test_a_special_token_stops_though_it_leaves_no_text(model: LlavaModel) -> None:
    free = model.generate_ids("a red circle", max_new_tokens=40, raw=True)
    tokenizer = model.language.tokenizer
    word = str(tokenizer.convert_ids_to_tokens([free[5]])[0])
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    ids = model.answer_ids([("a red circle", ())], Sampling(40, stop=(word,)), raw=True)[0]
    tokenizer.add_special_tokens({"additional_special_tokens": []})
    assert ids == free[: free.index(free[5]) + 1]


def test_the_number_of_new_tokens_is_bounded(model: LlavaModel) -> None:
    limit = model.language.max_length
    assert len(model.generate_ids("a red", max_new_tokens=7, raw=True)) == 7
    prompt = " ".join(["a"] * (limit - 4))  # and <s>
    assert len(model.generate_ids(prompt, max_new_tokens=99, raw=True)) == 3
    with pytest.raises(ModelError, match=rf"{limit} tokens .*reads at most {limit}: shorten it"):
        model.generate_ids(prompt + " a a a", raw=True)
    wrong_ones: list[dict[str, Any]] = [{"max_new_tokens": 0}, {"top_p": 0.0}]
    wrong_ones += [{"temperature": value} for value in (-1.0, float("nan"), float("inf"))]
    for wrong in wrong_ones:
        with pytest.raises(ModelError, match="cannot sample"):
            model.generate("a", **wrong)
