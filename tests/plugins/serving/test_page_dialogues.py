"""What the web chat keeps: questions, images, answers and dialogues, whatever is done meanwhile."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tests.plugins.serving.conftest import until
from tests.plugins.serving.pages import (
    begin,
    finish,
    needs_chromium,
    say,
    sync_api,
    titles,
)

pytestmark = needs_chromium


def test_a_question_waits_for_its_image(held: Any, photo: Path) -> None:
    expect, status = sync_api.expect, held.locator("#status")
    closed = "() => { window.gate = new Promise((open) => { window.open_gate = open; }); }"

    def enter(file: Any) -> None:  # while the image is still being read
        held.evaluate(closed)
        held.locator("#files").set_input_files(file)
        held.locator("#ask").fill("what is it ?")
        held.keyboard.press("Enter")
        expect(status).to_have_text("Reading the image…")
        expect(held.locator(".message")).to_have_count(0)

    # another dialogue is opened meanwhile: nothing is sent, and nothing lost
    enter(photo)
    held.get_by_role("button", name="New dialogue").click()
    held.evaluate("() => window.open_gate()")
    expect(status).to_contain_text("Not sent")
    expect(held.locator("#pictures img")).to_have_count(1)
    expect(held.locator("#ask")).to_have_value("what is it ?")
    held.get_by_role("button", name="Remove image 1").click()

    # an image that cannot be read is not left out without a word
    enter({"name": "x.png", "mimeType": "image/png", "buffer": b"no image"})
    held.evaluate("() => window.open_gate()")
    expect(status).to_contain_text("x.png cannot be read")
    expect(held.locator("#ask")).to_have_value("what is it ?")

    enter(photo)
    held.evaluate("() => window.open_gate()")
    until(lambda: held.evaluate("() => !!window.answer"))
    [image, text] = held.evaluate("() => window.asked.messages[0].content")
    assert base64.b64decode(image["image_url"]["url"].split(",")[1]) == photo.read_bytes()
    assert text["text"] == "what is it ?"
    expect(held.locator("#pictures img")).to_have_count(0)

    # what is in the composer is there again after an edit
    finish(held)
    held.locator("#files").set_input_files(photo)
    held.locator("#ask").fill("and this ?")
    held.get_by_role("button", name="Edit").click()
    expect(held.locator("#ask")).to_have_value("what is it ?")
    held.get_by_role("button", name="Leave it as it was").click()
    expect(held.locator("#ask")).to_have_value("and this ?")
    expect(held.locator("#pictures img")).to_have_count(1)


def test_other_dialogues_while_an_answer_comes(held: Any) -> None:
    expect, text = sync_api.expect, held.locator(".message.assistant .text")
    begin(held, "first ?")
    say(held, "one ")
    titles(held).click()  # it is the current one
    say(held, "two")
    expect(text).to_have_text("one two")
    finish(held, " three")
    expect(text).to_have_text("one two three")

    held.get_by_role("button", name="New dialogue").click()
    begin(held, "second ?")
    say(held, "half")
    expect(text).to_have_text("half")
    titles(held).nth(1).click()
    expect(text).to_have_text("one two three")
    expect(held.get_by_role("button", name="Regenerate")).to_be_visible()
    titles(held).nth(0).click()
    expect(text).to_have_text("half")
    expect(held.locator(".message.assistant .tools")).to_contain_text("stopped")


def test_a_dialogue_deleted_during_its_answer_stays_deleted(held: Any) -> None:
    held.on("dialog", lambda dialog: dialog.accept())
    begin(held, "first ?")
    say(held, "one")
    titles(held).wait_for()
    held.get_by_role("button", name="Delete first ?").click()
    sync_api.expect(held.locator(".message")).to_have_count(0)
    begin(held, "second ?")
    held.reload()
    sync_api.expect(titles(held)).to_have_text(["second ?"])


def test_two_tabs_lose_nothing(held: Any) -> None:
    expect = sync_api.expect
    other = held.context.new_page()
    other.goto(held.url)
    begin(held, "first ?")
    finish(held, "one")
    titles(other).click()  # its list is refreshed
    expect(other.locator(".message")).to_have_count(2)
    begin(held, "of the first tab ?")
    finish(held, "two")
    begin(other, "of the other tab ?")
    finish(other, "three")
    expect(other.locator("#status")).to_contain_text("this one is now a copy")
    for tab in (held, other):
        expect(titles(tab)).to_have_text(["first ? (copy)", "first ?"])
    for place, question in enumerate(("of the other tab ?", "of the first tab ?")):
        titles(held).nth(place).click()
        expect(held.locator(".message.user .text")).to_have_text(["first ?", question])

    # deleted in one tab, it is not put back by another that still shows it
    other.on("dialog", lambda dialog: dialog.accept())
    other.get_by_role("button", name="Delete first ?", exact=True).click()
    begin(held, "still there ?")
    finish(held, "no")
    expect(held.locator("#status")).to_contain_text("was deleted")
    expect(titles(held)).to_have_text(["first ? (copy)"])


def test_an_answer_that_is_interrupted_is_kept(held: Any) -> None:
    begin(held, "first ?")
    say(held, "as far as this")
    other = held.context.new_page()
    other.goto(held.url)
    text = other.locator(".message.assistant .text")

    def seen() -> bool:  # every second what has come is kept, should the browser crash
        other.get_by_role("button", name="New dialogue").click()
        titles(other).click()
        other.locator(".message.assistant").wait_for()
        return bool(text.count())

    until(seen)
    say(held, ", and this")
    sync_api.expect(held.locator(".message .text").last).to_have_text("as far as this, and this")
    held.reload()
    titles(held).click()
    text = held.locator(".message.assistant .text")
    sync_api.expect(text).to_have_text("as far as this, and this")
    sync_api.expect(held.locator(".message.assistant .tools")).to_contain_text("interrupted")
