"""Our model against transformers' LlavaForConditionalGeneration with the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.core.peer import IMAGE_TOKEN, make_pair, their_inputs
from torch import Tensor
from torch.nn import functional as F

from llavakit.contracts.model import Sampling
from llavakit.stream.batch import pack
from llavakit.stream.encode import IMAGE_ID, Encoded

PROMPTS = [
    ("USER : <image> what colour is it ? ASSISTANT :", 1),
    ("USER : <image> a red circle <image> what is it in ? ASSISTANT :", 2),
    ("USER : what shape is the circle ? ASSISTANT :", 0),
    ("<image>", 1),
]


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(count)
    return [
        Image.fromarray(draw.integers(0, 255, (40 + 3 * n, 36, 3), dtype=np.uint8))
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def pair():  # type: ignore[no-untyped-def]
    return make_pair()


@pytest.mark.parametrize(("prompt", "images"), PROMPTS)
def test_logits_equal(pair, prompt: str, images: int) -> None:  # type: ignore[no-untyped-def]
    theirs, ours = pair
    sources = pictures(images)
    with torch.no_grad():
        expected = theirs(**their_inputs(ours, prompt, ours.prepare(sources))).logits[0]
    found = ours.logits(prompt, sources, raw=True)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("prompt", "images"), PROMPTS)
def test_greedy_tokens_equal(pair, prompt: str, images: int) -> None:  # type: ignore[no-untyped-def]
    theirs, ours = pair
    sources = pictures(images)
    inputs = their_inputs(ours, prompt, ours.prepare(sources))
    expected = theirs.generate(
        **inputs, max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=3
    )[0, inputs["input_ids"].shape[1] :].tolist()
    assert ours.generate_ids(prompt, sources, max_new_tokens=24, raw=True) == expected


def test_a_batch_of_unequal_prompts_equals_one_by_one(pair) -> None:  # type: ignore[no-untyped-def]
    _, ours = pair
    prompts = [(prompt, pictures(images)) for prompt, images in PROMPTS]
    batched = ours.answer_ids(prompts, Sampling(24), raw=True)
    single = [ours.answer_ids([prompt], Sampling(24), raw=True)[0] for prompt in prompts]
    assert batched == single


def encoded(draw: np.random.Generator, text: int, images: int) -> Encoded:
    ids = draw.integers(4, 40, text)
    for place in sorted(draw.choice(text - 1, images, replace=False) + 1):
        ids[place] = IMAGE_ID
    supervised = (np.arange(text) > text // 2) & (ids != IMAGE_ID)
    return Encoded(ids.astype(np.int64), supervised)


def test_loss_and_gradients_equal_those_of_padded_batches(pair) -> None:  # type: ignore[no-untyped-def]
    theirs, ours = pair
    draw = np.random.default_rng(0)
    samples = [encoded(draw, text, images) for text, images in ((12, 1), (31, 2), (9, 0), (20, 1))]
    pixels = torch.randn(4, 3, 32, 32)
    batch = pack(samples, range(4), ours.visual_tokens)

    rows = [sample.expand(ours.visual_tokens) for sample in samples]
    longest = max(len(row.token_ids) for row in rows)
    ids = torch.full((4, longest), 3)
    mask = torch.zeros(4, longest, dtype=torch.long)
    labels = torch.full((4, longest), -100)
    for number, row in enumerate(rows):
        length = len(row.token_ids)
        values = np.where(row.visual, IMAGE_TOKEN, row.token_ids)
        ids[number, :length] = torch.from_numpy(values)
        mask[number, :length] = 1
        labels[number, :length] = torch.from_numpy(np.where(row.supervised, row.token_ids, -100))
    theirs.zero_grad()
    logits = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    expected.backward()

    ours.zero_grad()
    found = ours.loss(batch, ours.features(pixels)) / len(batch.targets_M)
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    pairs = [
        (ours.connector.layers[0].weight, theirs.model.multi_modal_projector.linear_1.weight),
        (ours.connector.layers[2].bias, theirs.model.multi_modal_projector.linear_2.bias),
        (ours.language.embedding_VE, theirs.model.language_model.embed_tokens.weight),
        (ours.language.head.weight, theirs.lm_head.weight),
    ]
    pairs += list(
        zip(
            ours.language.model.model.layers.parameters(),
            theirs.model.language_model.layers.parameters(),
            strict=True,
        )
    )
    for mine, yours in pairs:
        torch.testing.assert_close(mine.grad, yours.grad, atol=1e-6, rtol=1e-5)


def test_recomputation_changes_no_gradient(pair) -> None:  # type: ignore[no-untyped-def]
    _, ours = pair
    draw = np.random.default_rng(1)
    batch = pack([encoded(draw, 15, 1), encoded(draw, 11, 0)], range(2), ours.visual_tokens)
    features = torch.randn(1, ours.vision.tokens(32), ours.vision.width)
    gradients = []
    for recompute in (False, True):
        ours.language.recompute = recompute
        ours.zero_grad()
        ours.loss(batch, features).backward()
        gradients.append(ours.connector.layers[0].weight.grad.clone())
    ours.language.recompute = False
    assert torch.equal(*gradients)


def test_a_neighbour_in_the_stream_changes_nothing(pair) -> None:  # type: ignore[no-untyped-def]
    _, ours = pair
    draw = np.random.default_rng(2)
    own = encoded(draw, 14, 1)
    features = torch.randn(2, ours.vision.tokens(32), ours.vision.width)

    def run(neighbour: Encoded, other: Tensor) -> tuple[Tensor, Tensor]:
        batch = pack([neighbour, own], range(2), ours.visual_tokens)
        mine = features[:1].clone().requires_grad_()
        hidden = ours.language.hidden(ours.embed(batch, torch.cat([other, mine])), batch.packing)
        start = batch.packing.starts[1]
        hidden[start:].square().sum().backward()
        assert mine.grad is not None
        return hidden[start:].detach(), mine.grad

    length = 14
    first = run(encoded(np.random.default_rng(3), length, 1), features[1:])
    second = run(encoded(np.random.default_rng(4), length, 1), -features[1:])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_truncation_keeps_the_first_rows_only(pair) -> None:  # type: ignore[no-untyped-def]
    _, ours = pair
    draw = np.random.default_rng(5)
    whole = encoded(draw, 14, 2)
    cut = Encoded(whole.ids, whole.supervised, max_length=25)  # within the second image
    features = torch.randn(2, ours.vision.tokens(32), ours.vision.width)
    full_batch, cut_batch = (pack([item], [0], ours.visual_tokens) for item in (whole, cut))
    full = ours.embed(full_batch, features)
    assert torch.equal(ours.embed(cut_batch, features), full[:25])
