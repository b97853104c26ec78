"""Images of messages: what the service gets, what they count as, and what the ledger knows them by.

Everything that is sent goes over real HTTP to a server of ours; Pillow decodes what arrived.
"""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types.chat import ChatCompletionMessageParam
from PIL import Image, ImageOps
from pydantic import TypeAdapter
from tests.plugins.chat_server import Service, images_of, serve

from llavakit import ChatError, Message, Reply, ReplyError
from llavakit_plugins.chat_models.openai import OpenAI
from llavakit_plugins.chat_models.options import OpenAIOptions
from llavakit_plugins.generation.requests.image_tokens import image_tokens
from llavakit_plugins.generation.requests.ledger import Ledger, Request, hash_messages
from llavakit_plugins.generation.requests.pictures import hash_image, size_of
from llavakit_plugins.generation.requests.send import Tally
from llavakit_plugins.generation.requests.send_all import send_all


def model(service: Service, **options: Any) -> OpenAI:
    stated = {"model": "gpt-4o", "base_url": service.url, "backoff": 0.02, "timeout": 5.0}
    return OpenAI(OpenAIOptions(**{**stated, **options}))


def ask(chat: OpenAI, *images: Any, text: str = "What is it?") -> Reply:
    async def once() -> Reply:
        try:
            return await chat.reply([Message("user", text, images)])
        finally:
            await chat.close()

    return asyncio.run(once())


def noise(width: int = 40, height: int = 30) -> Image.Image:
    draw = np.random.default_rng(width * height)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))


def saved(path: Path, image: Image.Image, **how: Any) -> Path:
    image.save(path, **how)
    return path


def arrived(service: Service) -> Image.Image:
    ((kind, data),) = images_of(service.asked[-1])
    image = Image.open(io.BytesIO(data))
    assert Image.MIME[str(image.format)] == kind
    return image


def test_a_file_that_services_read_is_sent_as_it_is(service: Service, tmp_path: Path) -> None:
    files = [
        saved(tmp_path / "a.jpg", noise(), quality=80),
        saved(tmp_path / "b.png", noise(33, 9)),
        saved(tmp_path / "c.webp", noise(12, 50)),
        saved(tmp_path / "d.gif", noise(20, 20).convert("P")),
    ]
    assert ask(model(service, detail="low"), *files).text == "It is red."
    (body,) = service.asked
    found = images_of(body)
    assert [kind for kind, _ in found] == ["image/jpeg", "image/png", "image/webp", "image/gif"]
    assert [data for _, data in found] == [file.read_bytes() for file in files]
    # the official client's own types, and nothing that they do not have
    adapter: TypeAdapter[Any] = TypeAdapter(ChatCompletionMessageParam)
    for message in body["messages"]:
        adapter.validate_python(message, strict=True)
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url"] * 4 + ["text"]
    assert all(part["image_url"]["detail"] == "low" for part in parts[:4])
    assert parts[-1]["text"] == "What is it?"
    ask(model(service), files[0].read_bytes())  # bytes are a file, too
    assert images_of(service.asked[-1]) == found[:1]
    assert "detail" not in service.asked[-1]["messages"][0]["content"][0]["image_url"]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:  # so is a member of an archive
        archive.write(files[0], "a.jpg")
        ask(model(service), zipfile.Path(archive, "a.jpg"))
        assert images_of(service.asked[-1]) == found[:1]
        assert hash_image(zipfile.Path(archive, "a.jpg")) == hash_image(files[0])


def test_what_services_do_not_read_is_encoded_again(service: Service, tmp_path: Path) -> None:
    plain = Image.new("RGB", (30, 20), (200, 40, 60))
    moving = tmp_path / "moving.gif"
    plain.save(moving, save_all=True, append_images=[Image.new("RGB", (30, 20))], duration=100)
    deep = Image.fromarray(np.full((20, 30), 40_000, np.uint16))
    for source, colour in (
        (saved(tmp_path / "a.bmp", plain), (200, 40, 60)),
        (saved(tmp_path / "a.tiff", plain), (200, 40, 60)),
        (moving, (200, 40, 60)),
        (saved(tmp_path / "deep.png", deep), (round(40_000 / 65_535 * 255),) * 3),
        (plain, (200, 40, 60)),
    ):
        ask(model(service), source)
        image = arrived(service)
        assert image.format == "JPEG"
        assert image.size == (30, 20)
        assert not getattr(image, "is_animated", False)
        np.testing.assert_allclose(np.asarray(image)[10, 15], colour, atol=4)


def test_what_is_too_large_is_made_smaller(service: Service, tmp_path: Path) -> None:
    large = saved(tmp_path / "large.png", noise(900, 300))
    ask(model(service, image_edge=300), large)
    image = arrived(service)
    assert image.size == (300, 100)
    assert size_of(large, 300) == (300, 100)  # what is counted is what is sent
    expected = noise(900, 300).resize((300, 100), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(image, float) - np.asarray(expected)).mean() < 20
    assert large.stat().st_size > 500_000
    ask(model(service, image_bytes=300_000), large)  # enough pixels, too many bytes
    ((kind, data),) = images_of(service.asked[-1])
    assert (kind, Image.open(io.BytesIO(data)).size) == ("image/jpeg", (900, 300))
    assert len(data) <= 300_000
    with pytest.raises(ReplyError, match=r"even as a small JPEG, and `image_bytes` allows 1,000"):
        ask(model(service, image_bytes=1000), large)
    assert len(service.asked) == 2


@pytest.mark.parametrize("turn", range(2, 9))
def test_an_image_is_sent_upright(service: Service, tmp_path: Path, turn: int) -> None:
    """As a person sees it: services do not say whether they heed a camera's note."""
    exif = Image.Exif()
    exif[0x0112] = turn
    smooth = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    smooth.paste((250, 0, 0), (0, 0, 30, 10))
    path = saved(tmp_path / "turned.jpg", smooth, exif=exif, quality=95)
    ask(model(service), path)
    image = arrived(service)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
    assert image.size == upright.size
    assert image.getexif().get(0x0112, 1) == 1
    difference = np.asarray(image, float) - np.asarray(upright, float)
    assert np.abs(difference).mean() < 3


def test_an_image_that_cannot_be_used_is_not_sent(service: Service, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.png", noise(200, 200)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for source in (tmp_path / "none.png", tmp_path / "cut.png", tmp_path / "text.jpg", b"junk"):
        with pytest.raises(ReplyError, match="a message cannot be sent: ") as error:
            ask(model(service), source)
        assert error.value.lasting
    assert not service.asked


def test_a_large_request_follows_a_redirect_whole(service: Service, tmp_path: Path) -> None:
    large = saved(tmp_path / "large.png", noise(1000, 700))
    assert large.stat().st_size > 2_000_000
    service.actions = [lambda h, b: h.json(307, {}, Location=f"{service.url}/chat/completions")]
    ask(model(service), large)
    assert len(service.asked) == 2
    assert service.asked[0] == service.asked[1]
    assert images_of(service.asked[1])[0][1] == large.read_bytes()


# -- the ledger ------------------------------------------------------------------------------------


def work_off(service: Service, folder: Path, *images: Any, **options: Any) -> Tally:
    budget = options.pop("budget", None)
    chat = model(service, price={"input": 2, "output": 4}, **options)
    requests = [Request((Message("user", "What is it?", (image,)),)) for image in images]
    with Ledger(folder / "ledger.jsonl", identity=chat.identity) as ledger:
        return send_all(chat, lambda: requests, ledger, budget_usd=budget)


def test_another_content_is_asked_again_and_another_place_is_not(
    service: Service, tmp_path: Path
) -> None:
    first = saved(tmp_path / "a.png", noise(30, 30))
    assert work_off(service, tmp_path, first).answered == 1
    copy = tmp_path / "elsewhere.png"
    copy.write_bytes(first.read_bytes())
    assert work_off(service, tmp_path, first, copy).answered == 0
    saved(first, noise(31, 30))
    assert work_off(service, tmp_path, first, copy).answered == 1
    assert len(service.asked) == 2
    # pixels in memory are known by their content, too
    assert work_off(service, tmp_path, noise(30, 30)).answered == 1
    assert work_off(service, tmp_path, noise(30, 30).copy()).answered == 0


def test_what_text_is_known_by_stays_what_it_was() -> None:
    """Ledgers of before there were images are paid for: their keys are of texts alone."""
    words = (Message("system", "Be brief."), Message("user", "Is it réd?"))
    plain = json.dumps([["system", "Be brief."], ["user", "Is it réd?"]])
    assert hash_messages(words) == sha256(plain.encode()).hexdigest()[:32]
    seen = (words[0], Message("user", "Is it réd?", (b"x",)))
    assert hash_messages(seen) != hash_messages(words)
    chat = OpenAI(OpenAIOptions(model="gpt-4o"))
    assert chat.identity == 'openai ["gpt-4o", null, null, null, 1024, {}]'
    assert OpenAI(OpenAIOptions(model="gpt-4o", detail="low")).identity != chat.identity


# -- what they count as ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "low", "tokens"),
    [  # the examples of OpenAI's guide
        ("gpt-4o", (1024, 1024), False, 765),
        ("gpt-4o-2024-08-06", (2048, 4096), False, 1105),
        ("gpt-4o", (4096, 8192), True, 85),
        ("gpt-4.1-mini", (1024, 1024), False, 1659),  # 1024 patches of 1.62
        ("gpt-4.1-mini", (1800, 2400), False, 2353),  # 1452 patches
        ("gpt-4o-mini", (512, 512), False, 2833 + 5667),
        ("llava-v1.5-7b", (512, 512), False, None),
    ],
)
def test_images_count_as_the_published_examples_do(
    name: str, size: tuple[int, int], low: bool, tokens: int | None
) -> None:
    assert image_tokens(name, *size, low=low) == tokens


@pytest.mark.parametrize("name", ["gpt-4o", "gpt-4.1-nano"])
def test_no_image_counts_as_more_than_the_most(name: str) -> None:
    most = {"gpt-4o": 85 + 170 * 8, "gpt-4.1-nano": 3779}[name]
    draw = np.random.default_rng(0)
    for width, height in draw.integers(1, 9000, (300, 2)).tolist():
        tokens = image_tokens(name, width, height)
        assert tokens is not None
        assert 1 <= tokens <= most


def test_a_budget_knows_what_images_cost(service: Service, tmp_path: Path) -> None:
    image = saved(tmp_path / "a.png", noise(1024, 1024))
    text = OpenAI(OpenAIOptions(model="gpt-4o")).count([Message("user", "What is it?")])
    chat = OpenAI(OpenAIOptions(model="gpt-4o"))
    assert chat.count([Message("user", "What is it?", (image,))]) == text + 765
    most = ((text + 765) * 2 + 1024 * 4) / 1e6
    with pytest.raises(ChatError, match=r"stopped at budget_usd"):
        work_off(service, tmp_path, image, budget=most * 0.99)
    assert not service.asked
    assert work_off(service, tmp_path, image, budget=most * 1.01).answered == 1
    with pytest.raises(ChatError, match=r"no price is known .* state `image_tokens = \.\.\.`"):
        work_off(service, tmp_path, image, model="llava", budget=1.0)
    stated = model(service, model="llava", image_tokens=576)
    assert stated.counts([Message("user", "", (image,))])
    assert stated.count([Message("user", "", (image,))]) > 576


def test_a_batchs_file_holds_the_images(tmp_path: Path) -> None:
    images = [saved(tmp_path / f"{n}.png", noise(20 + n, 20)) for n in range(5)]
    with serve() as service:
        tally = work_off(service, tmp_path, *images, batch=True, batch_size=2, poll_seconds=0.02)
        assert tally.answered == 5
        sent = [image for body in service.asked for image in images_of(body)]
    assert sorted(data for _, data in sent) == sorted(file.read_bytes() for file in images)
    assert len(service.batches) == 3


def test_batches_of_large_images_stay_below_what_a_service_takes(tmp_path: Path) -> None:
    limit = 30_000
    images = [saved(tmp_path / f"{n}.png", noise(60 + n, 60)) for n in range(6)]
    with serve() as service:
        work_off(service, tmp_path, *images, batch=True, batch_bytes=limit, poll_seconds=0.02)
        files = [data for data in service.files.values() if b"custom_id" in data]
        inputs = [data for data in files if b'"method"' in data]
    assert len(inputs) > 1
    assert max(map(len, inputs)) <= limit
    assert sum(data.count(b"custom_id") for data in inputs) == 6
