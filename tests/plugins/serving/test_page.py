"""The web chat as a person uses it, in a browser without a window."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from tests.plugins.serving.conftest import Running, asks, data_url, picture, serving, until
from tests.plugins.serving.pages import (
    ask,
    begin,
    finish,
    needs_chromium,
    opened,
    say,
    sync_api,
    titles,
)

from llavakit import LlavaModel

pytestmark = needs_chromium

QUESTION = "what colour is the picture ?"
SENDS = """([selector, name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "image.png", { type: "image/png" }));
  const given = { bubbles: true, cancelable: true };
  const event = name === "paste"
    ? new ClipboardEvent(name, { ...given, clipboardData: data })
    : new DragEvent(name, { ...given, dataTransfer: data });
  document.querySelector(selector).dispatchEvent(event);
}"""  # what a hand does that drops or pastes a file


@pytest.fixture
def page(browser: Any, running: Running) -> Iterator[Any]:
    yield from opened(browser, running)


def turned(kind: str, orientation: int) -> bytes:
    """Return the file of a photograph that a camera took while it was held otherwise."""
    image = Image.new("RGB", (96, 48), "white")
    image.paste("red", (0, 0, 48, 24))
    image.paste("blue", (48, 24, 96, 48))
    note = Image.Exif()
    note[274] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=note, quality=95)
    return file.getvalue()


def shown(text: str) -> str:
    """Return a text as `inner_text` gives it: without space at its ends."""
    return text.strip()


def test_a_persons_path(page: Any, running: Running, photo: Path, browser: Any) -> None:
    expect, model = sync_api.expect, running.model
    expect(page.locator("#ask")).to_be_focused()  # one can type at once
    page.locator("#files").set_input_files(photo)
    expect(page.locator("#pictures img")).to_have_count(1)
    messages = asks(QUESTION, photo.read_bytes())
    assert ask(page, QUESTION, 1) == shown(model.generate(messages, max_new_tokens=512))
    expect(page.locator(".message.user img")).to_have_count(1)
    expect(page.locator(".message.assistant .tools")).to_contain_text("tokens")

    # the model is told what was said before
    said = page.locator(".message.assistant .text").inner_text()
    answer = model.generate(messages, max_new_tokens=512)
    assert said == shown(answer)
    second = [*messages, {"role": "assistant", "content": answer}, *asks("what shape is it ?")]
    assert ask(page, "what shape is it ?", 2) == shown(model.generate(second, max_new_tokens=512))

    # where it looked, word by word
    page.get_by_role("button", name="Heat map").first.click()
    words = page.locator("#heat-words button")
    expect(words).to_have_count(1 + len(answer.split()))
    words.nth(1).click()
    expect(words.nth(1)).to_have_attribute("aria-pressed", "true")
    assert page.locator("#heat-images canvas").bounding_box()["width"] > 100
    page.keyboard.press("Escape")
    expect(page.locator("#heat")).to_be_hidden()

    # another question in place of the first: what came behind it goes
    page.get_by_role("button", name="Edit").first.click()
    expect(page.locator("#ask")).to_have_value(QUESTION)
    expect(page.locator("#pictures img")).to_have_count(1)
    edited = asks("is it red ?", photo.read_bytes())
    assert ask(page, "is it red ?", 1) == shown(model.generate(edited, max_new_tokens=512))
    expect(page.locator(".message")).to_have_count(2)

    # parameters, and the same question again
    page.get_by_role("button", name="Parameters").click()
    page.get_by_label("Tokens at most").fill("3")
    page.get_by_label("System text").fill("a square .")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".message.assistant .tools")).to_contain_text("cut at the limit")
    told = [{"role": "system", "content": "a square ."}, *edited]
    text = page.locator(".message.assistant .text").inner_text()
    assert text == shown(model.generate(told, max_new_tokens=3))

    # a second dialogue; both are there when the page is opened again, images too
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".message")).to_have_count(0)
    ask(page, "what is it ?", 1)
    page.reload()
    page.get_by_role("button", name="Dialogues").click()
    titles = page.locator("#dialogues li > button:first-child")
    expect(titles).to_have_text(["what is it ?", QUESTION])
    titles.nth(1).click()
    expect(page.locator(".message.assistant .text")).to_have_text(text)
    assert page.locator(".message.user img").evaluate("image => image.naturalWidth") == 640
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete what is it ?").click()
    expect(titles).to_have_text([QUESTION])


def test_dropped_and_pasted_images(page: Any) -> None:
    data = base64.b64encode(picture(3)).decode()
    for count, (selector, event) in enumerate((("main", "drop"), ("#ask", "paste")), start=1):
        page.evaluate(SENDS, [selector, event, data])
        sync_api.expect(page.locator("#pictures img")).to_have_count(count)
    page.evaluate(SENDS, ["main", "dragenter", data])
    sync_api.expect(page.locator("#drop")).to_be_visible()
    page.get_by_role("button", name="Remove image 1").click()
    sync_api.expect(page.locator("#pictures img")).to_have_count(1)


def test_an_answer_is_stopped_and_its_place_is_free(browser: Any, endless: LlavaModel) -> None:
    with serving(endless, default_tokens=9000) as server:
        for page in opened(browser, server):
            page.locator("#ask").fill("what is it ?")
            page.locator("#send").click()
            sync_api.expect(page.locator(".message.assistant .text")).not_to_be_empty()
            page.keyboard.press("Escape")
            sync_api.expect(page.locator(".message.assistant .tools")).to_contain_text("stopped")
            until(lambda: server.server.scheduler.busy == 0)
            page.get_by_role("button", name="Regenerate").click()
            page.locator("#stop").click()
            until(lambda: server.server.scheduler.busy == 0)


def test_what_a_model_writes_is_text(page: Any) -> None:
    text = '<img src=x onerror="document.title=1"><b>bold</b> **stars** https://example.org'
    chunk = '{"choices":[{"index":0,"delta":{"content":%s},"finish_reason":null}]}'
    last = '{"choices":[],"usage":{"completion_tokens":9}}'
    body = f"data: {chunk % json.dumps(text)}\n\ndata: {last}\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    assert ask(page, "what is it ?", 1) == text
    assert page.locator(".message.assistant .text *").count() == 0
    assert page.title() == "small"


def test_errors_are_shown(page: Any) -> None:
    page.locator("#ask").fill("what is it ? " * 300)
    page.locator("#send").click()
    sync_api.expect(page.locator(".message .wrong")).to_contain_text("reads at most")
    page.locator("#files").set_input_files(
        {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"}
    )
    sync_api.expect(page.locator("#status")).to_contain_text("x.png cannot be read")
    assert ask(page, "what is it ?", 2)  # the question without an answer is left out


def test_a_key_is_asked_for(browser: Any, lively: LlavaModel) -> None:
    key = "0123456789abcdef0123456789abcdef"
    with serving(lively, keys=(key,)) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Done").click()
        sync_api.expect(page.locator("#model")).to_have_text("small")
        assert ask(page, "what is it ?", 1)
        context.close()


def test_photos_are_sent_upright(held: Any) -> None:
    def sent(data: bytes, kind: str) -> bytes:
        file = {"name": "photo", "mimeType": f"image/{kind.lower()}", "buffer": data}
        held.locator("#files").set_input_files(file)
        sync_api.expect(held.locator("#pictures img")).to_have_count(1)
        [image, _] = begin(held, "what is it ?")["content"]
        finish(held)
        return base64.b64decode(image["image_url"]["url"].split(",")[1])

    padding = bytes(4_000_000)  # behind the end of the image: a large file
    for kind, orientation, more in (
        *(("JPEG", orientation, b"") for orientation in range(2, 9)),
        ("JPEG", 6, padding), ("PNG", 6, b""),
    ):  # fmt: skip
        data = turned(kind, orientation)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        got = Image.open(io.BytesIO(sent(data + more, kind)))
        assert got.getexif().get(274, 1) == 1
        assert got.size == upright.size
        assert np.abs(np.asarray(got, float) - np.asarray(upright, float)).mean() < 8
    for kind in ("JPEG", "PNG", "WEBP"):  # as it is, where nothing is to be turned
        assert sent(turned(kind, 1), kind) == turned(kind, 1)


def test_heat_maps_of_turned_photos(page: Any) -> None:
    data, canvas = turned("JPEG", 6), page.locator("#heat-images canvas")
    page.locator("#files").set_input_files(
        {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": data}
    )
    sync_api.expect(page.locator("#pictures img")).to_have_count(1)
    ask(page, QUESTION, 1)
    page.get_by_role("button", name="Heat map").click()
    sync_api.expect(canvas).to_be_visible()
    assert canvas.evaluate("(canvas) => canvas.height === 2 * canvas.width")

    # one kept before photos were sent upright: the server sees its pixels as they are stored
    asked = {"role": "user", "text": QUESTION, "images": [data_url(data, "image/jpeg")]}
    messages = [asked, {"role": "assistant", "text": "red .", "note": "2 tokens"}]
    old = {"id": "old", "title": "old", "changed": 0, "settings": {}, "messages": messages}
    page.evaluate("async (old) => (await import('/store.js')).keep(old)", old)
    page.reload()
    titles(page).filter(has_text="old").click()
    page.get_by_role("button", name="Heat map").click()
    sync_api.expect(canvas).to_be_visible()
    assert canvas.evaluate("(canvas) => canvas.width === 2 * canvas.height")


def test_right_to_left_text(held: Any) -> None:
    for text, direction in (("مرحبا (test).", "rtl"), ("hello", "ltr")):
        begin(held, text)
        say(held, text)
        sync_api.expect(held.locator(".message .text")).to_have_text([text, text])
        for place in (held.locator(".message .text"), titles(held).first):
            for found in place.all():
                sync_api.expect(found).to_have_css("direction", direction)
        held.locator("#ask").fill(text)
        sync_api.expect(held.locator("#ask")).to_have_css("direction", direction)
        held.get_by_role("button", name="New dialogue").click()


def test_dropped_text_is_left_to_the_browser(page: Any) -> None:
    taken = """([name, file]) => {
      const data = new DataTransfer();
      if (file) data.items.add(new File(["text"], "text.txt", { type: "text/plain" }));
      else data.setData("text/plain", "words");
      const given = { bubbles: true, cancelable: true, dataTransfer: data };
      return !document.querySelector("#ask").dispatchEvent(new DragEvent(name, given));
    }"""
    for file in (False, True):
        page.evaluate(taken, ["dragenter", file])
        assert page.locator("#drop").is_visible() == file
        for name in ("dragover", "drop"):
            assert page.evaluate(taken, [name, file]) == file


def test_parameters_are_taken_by_done_alone(held: Any) -> None:
    field = held.get_by_label("Temperature")
    for chosen, given, end, kept in (
        ("9", None, "Escape", ""), ("0.5", 0.5, "Enter", "0.5"), ("9", 0.5, "Escape", "0.5")
    ):  # fmt: skip
        held.get_by_role("button", name="Parameters").click()
        field.fill(chosen)
        held.keyboard.press(end)
        sync_api.expect(held.locator("#parameters")).to_be_hidden()
        begin(held, "what is it ?")
        assert held.evaluate("() => window.asked.temperature ?? null") == given
        finish(held)
        held.get_by_role("button", name="Parameters").click()
        sync_api.expect(field).to_have_value(kept)
        held.keyboard.press("Escape")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1180])
def test_width_and_colours(
    browser: Any, running: Running, photo: Path, scheme: str, width: int
) -> None:
    for page in opened(browser, running, color_scheme=scheme):
        page.set_viewport_size({"width": width, "height": 740})
        page.locator("#files").set_input_files(photo)
        sync_api.expect(page.locator("#pictures img")).to_have_count(1)
        ask(page, QUESTION, 1)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        for name in ("Dialogues", "New dialogue", "Dark or light", "Parameters", "Send"):
            box = page.get_by_role("button", name=name, exact=True).bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert min(box["width"], box["height"]) >= 36  # a finger's
        before = brightness(page)
        assert (before > 128) == (scheme == "light")
        page.get_by_role("button", name="Dark or light").click()
        after = brightness(page)
        assert (after > 128) == (scheme == "dark")
        page.reload()
        sync_api.expect(page.locator("#model")).to_have_text("small")
        assert (brightness(page) > 128) == (after > 128)  # it is kept


def brightness(page: Any) -> float:
    """Return the mean brightness of what is seen, 0 to 255."""
    grey = Image.open(io.BytesIO(page.screenshot())).convert("L")
    return float(grey.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))  # type: ignore[arg-type]
