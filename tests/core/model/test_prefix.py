"""A next turn reads only what is new, and its answer is the same."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import LANGUAGE, make_tokenizer
from tests.core.peer import make_pair

from llavakit import LlavaModel, Prefixes, PromptTemplate, Registry
from llavakit.contracts.component import Use
from llavakit.contracts.packing import KVCache

NEW: dict[str, Any] = {"max_new_tokens": 8}


def picture(seed: int) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize((40, 30))


def user(text: str, *seeds: int) -> dict[str, Any]:
    images = [{"type": "image", "image": picture(seed)} for seed in seeds]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TURNS = [
    user("what is it ?", 1),
    user("what shape is the circle ?"),
    user("is it a red picture ?", 2),
    user("a blue square ?"),
]


@pytest.fixture(scope="module")
def trained() -> LlavaModel:
    language = {**LANGUAGE, "max_position_embeddings": 1024, "vocab_size": len(make_tokenizer())}
    model = make_pair(language=language)[1].eval()
    options: Any = {"system": ""}
    model.template = Registry.installed().build(Use[PromptTemplate](use="vicuna_v1", **options))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)  # so that answers are not one token again and again
        model.language.head.weight += torch.randn_like(model.language.head.weight)
        model.language.head.weight[:4] = 0
    return model


@pytest.fixture
def model(trained: LlavaModel) -> LlavaModel:
    trained.prefixes = Prefixes()
    return trained


class Read(list[int]):
    """How many rows the language model has read at a time, and images the encoder."""

    images = 0


@contextmanager
def reading(model: LlavaModel) -> Iterator[Read]:
    found, hidden, vision = Read(), model.language.hidden, model.vision.forward

    def see(embeds_TE: Any, *rest: Any) -> Any:
        found.append(len(embeds_TE))
        return hidden(embeds_TE, *rest)

    def look(pixels: Any) -> Any:
        found.images += len(pixels)
        return vision(pixels)

    watched: Any = model
    watched.language.hidden, watched.vision.forward = see, look
    try:
        yield found
    finally:
        del watched.language.hidden, watched.vision.forward


def anew(model: LlavaModel, messages: Any, **options: Any) -> str:
    kept, model.prefixes = model.prefixes, Prefixes(0)
    try:
        with reading(model) as read:
            answer = model.generate(messages, **{**NEW, **options})
        whole = model.prompt(messages, ()).length(model.visual_tokens)
        assert read[0] == whole
        return answer
    finally:
        model.prefixes = kept


def test_a_next_turn_reads_what_is_new_and_answers_the_same(model: LlavaModel) -> None:
    messages: list[Any] = []
    before, answers = 0, []
    for number, turn in enumerate(TURNS):
        messages.append(turn)
        whole = model.prompt(messages, ()).length(model.visual_tokens)
        with reading(model) as read:
            answer = model.generate(messages, **NEW)
        assert answer == anew(model, messages)
        assert read.images == (number % 2 == 0)  # each image is looked at once
        if before:  # an answer's last tokens may be others once they are read as text
            assert read[0] <= whole - before
        answers.append(answer)
        messages.append(assistant(answer))
        before = whole
    assert len(set(answers)) > 1
    assert len(model.prefixes.kept) == 1  # a dialogue replaces what it goes on from


def test_the_logits_are_those_without_a_cache_but_for_rounding(model: LlavaModel) -> None:
    """Not bit by bit: a product of fewer rows sums in another order."""
    model.generate(TURNS[:1], **NEW)
    messages = [TURNS[0], assistant("a blue one ."), TURNS[1]]
    (token,) = model.answers(messages, max_new_tokens=1, logprobs=10)[0].tokens
    logs = model.logits(messages)[-1].double().log_softmax(-1)
    expected = [float(logs[number]) for number, _ in token.top]
    np.testing.assert_allclose([log for _, log in token.top], expected, atol=2e-5)


def test_every_way_to_ask_goes_on_and_seeds_hold(model: LlavaModel) -> None:
    messages = [TURNS[0], assistant("a blue one ."), TURNS[2]]
    expected = anew(model, messages)
    warm: dict[str, Any] = {"temperature": 2.0, "seed": 3}
    drawn = anew(model, messages, **warm)
    model.generate(messages[:1], **NEW)
    for _ in range(2):
        assert "".join(model.stream(messages, **NEW)) == expected
        assert model.generate(messages, **warm, **NEW) == drawn
        assert model.decode(model.generate_ids(messages, **NEW)) == expected
        assert model.answers(messages, n=3, **warm, **NEW)[0].text == drawn
    with reading(model) as read:
        model.generate(messages, **NEW)
    assert read[0] == 1  # all but the last token was read


def test_an_edited_turn_is_read_from_there_on(model: LlavaModel) -> None:
    first = [TURNS[0], assistant("a blue one ."), TURNS[1]]
    model.generate(first, **NEW)
    for edited in (
        [TURNS[0], assistant("a blue one ."), user("what colour ?")],
        [TURNS[0], assistant("a red one ."), TURNS[1]],
        [user("what is it ?", 3), *first[1:]],  # another image of the same size
        [user("what is the shape ?", 1), *first[1:]],
        [{"role": "system", "content": "a blue"}, *first],
        first[:1],
    ):
        assert model.generate(edited, **NEW) == anew(model, edited)


def test_weights_and_training_are_never_answered_from_before(model: LlavaModel) -> None:
    messages = [TURNS[0], assistant("a blue one ."), TURNS[1]]
    model.generate(messages, **NEW)
    changed = copy.deepcopy(model)
    assert not changed.prefixes.kept  # a copy has read nothing
    changed.generate(messages, **NEW)
    with torch.no_grad():
        weight = changed.language.head.weight
        for part in (*changed.language.parameters(), *changed.connector.parameters()):
            if part is not weight:
                part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(1)))
    with reading(changed) as read:
        answer = changed.generate(messages, **NEW)
    assert read.images == 1
    assert answer == anew(changed, messages)
    assert len(changed.prefixes.kept) == 1  # what older weights read is dropped
    changed.train()
    with reading(changed) as read:
        changed.generate(messages, **NEW)
    assert read.images == 1


def through_data(model: LlavaModel) -> None:
    for part in model.language.parameters():  # as averaged weights are put in
        part.data.copy_(part.data * 1.5)


def by_vectors(model: LlavaModel) -> None:
    vector = torch.nn.utils.parameters_to_vector(model.language.parameters())
    torch.nn.utils.vector_to_parameters(vector * 1.5, model.language.parameters())


def by_a_hook(model: LlavaModel) -> None:
    model.language.blocks[0].register_forward_hook(
        lambda _, __, out: (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5
    )


def as_inference(model: LlavaModel) -> None:
    with torch.inference_mode():
        for name, part in model.language.named_parameters():
            if "layers" in name:
                part.mul_(1.5)


@pytest.mark.parametrize("change", [through_data, by_vectors, by_a_hook, as_inference])
def test_changes_without_a_version_are_seen(
    model: LlavaModel, change: Callable[[LlavaModel], None]
) -> None:
    changed = copy.deepcopy(model)
    messages = [TURNS[0], assistant("a blue one ."), TURNS[1]]
    changed.generate(messages, **NEW)
    change(changed)
    with reading(changed) as read:
        answer = changed.generate(messages, **NEW)
    assert read.images == 1
    assert answer == anew(changed, messages)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_that_are_switched_are_seen(model: LlavaModel) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    changed = copy.deepcopy(model)
    language: Any = changed.language
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), language.model)
    tuned: list[Any] = [part for part in changed.modules() if isinstance(part, BaseTunerLayer)]
    for part in tuned:
        torch.nn.init.normal_(part.lora_B["default"].weight)
    messages = [TURNS[0], assistant("a blue one ."), TURNS[1]]
    switches: list[Callable[[Any], Any]] = [
        lambda part: part.scale_layer(20.0),
        lambda part: part.enable_adapters(False),
        lambda part: part.enable_adapters(True),
    ]
    for switch in switches:
        changed.generate(messages, **NEW)
        for part in tuned:
            switch(part)
        with reading(changed) as read:
            answer = changed.generate(messages, **NEW)
        assert read.images == 1
        assert answer == anew(changed, messages)


def test_questions_of_a_batch_are_not_kept(model: LlavaModel) -> None:
    from llavakit.contracts.model import Sampling

    model.answer([(TURNS[:1], ())], Sampling(4))
    assert not model.prefixes.kept


def test_memory_is_bounded_and_the_oldest_goes(model: LlavaModel) -> None:
    def ask(number: int) -> None:
        model.generate([user(f"what is {'a red ' * number} circle ?", number)], max_new_tokens=1)

    ask(10)
    (kept,) = model.prefixes.kept
    cache = kept.held
    assert kept.size == sum(x.nbytes for x in (*cache.keys, *cache.values))
    model.prefixes.most_bytes = 3 * kept.size
    for number in (11, 12, 13, 14):
        ask(number)
    assert sum(one.size for one in model.prefixes.kept) <= 3 * kept.size
    assert 1 < len(model.prefixes.kept) < 4
    with reading(model) as read:
        ask(14)
    assert not read.images
    with reading(model) as read:
        ask(10)
    assert read.images == 1
    model.prefixes.most_bytes = 0
    ask(1)
    assert not model.prefixes.kept


def test_what_a_stream_has_read_is_kept_where_it_is_left(model: LlavaModel) -> None:
    pieces = model.stream(TURNS[:1], max_new_tokens=30)
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    messages = [TURNS[0], assistant(first), TURNS[1]]
    with reading(model) as read:
        answer = model.generate(messages, **NEW)
    assert not read.images
    assert answer == anew(model, messages)


def test_a_state_that_cannot_be_cut_is_not_kept(
    model: LlavaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recurrent layer's state holds all rows at once."""
    advance = KVCache.advance

    def recurrent(cache: KVCache, packing: Any) -> None:
        cache.states[0]["sum"] = torch.ones(len(cache.lengths), 1)
        advance(cache, packing)

    monkeypatch.setattr(KVCache, "advance", recurrent)
    model.generate(TURNS[:1], **NEW)
    assert not model.prefixes.kept


def test_threads_talk_at_once(model: LlavaModel) -> None:
    dialogues = [
        [user("what is it ?", n), assistant("a red ."), user("what shape ?", n + 1)]
        for n in range(4)
    ]
    expected = [anew(model, dialogue) for dialogue in dialogues]
    wrong: list[Any] = []

    def talk(number: int) -> None:
        for _ in range(3):
            model.generate(dialogues[number][:1], **NEW)
            if (found := model.generate(dialogues[number], **NEW)) != expected[number]:
                wrong.append((number, found))

    threads = [threading.Thread(target=talk, args=(n % 4,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
