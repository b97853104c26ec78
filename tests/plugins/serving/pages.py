"""A browser without a window that drives the web chat, for its tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.plugins.serving.conftest import Running, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (on Debian: apt install chromium)"
)
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
sync_api.expect.set_options(timeout=15_000)

HELD = """(() => {
  const { fetch, createImageBitmap } = window;
  window.fetch = async (path, options) => {
    if (!path.endsWith("chat/completions")) return fetch(path, options);
    options.signal.throwIfAborted();
    window.asked = JSON.parse(options.body);
    return new Response(new ReadableStream({ start(answer) {
      window.answer = answer;
      options.signal.addEventListener("abort", () => answer.error(options.signal.reason));
    } }));
  };
  window.createImageBitmap = async (image) => {
    await window.gate;
    return createImageBitmap(image);
  };
})()"""  # answers come as `say` and `finish` write them; images are read once `gate` is open


@contextmanager
def launched() -> Iterator[Any]:
    """Yield a browser."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, server: Running, script: str = "", **options: Any) -> Iterator[Any]:
    """Yield the page; fail where it complained, or asked anyone but the server."""
    context = browser.new_context(viewport={"width": 1180, "height": 780}, **options)
    context.set_default_timeout(15_000)
    context.add_init_script(script)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda line: complaints.append(line.text) if own(line.text) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    sync_api.expect(page.locator("#model")).to_have_text("small")
    yield page
    context.close()
    assert not complaints
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked)


def own(line: str) -> bool:
    """Say whether a line of the console is the page's, and not the browser's about a status."""
    return not line.startswith("Failed to load resource: the server responded with a status")


def flower(folder: Path) -> Path:
    """Write a photograph, of those that scikit-learn brings, and return its path."""
    datasets = pytest.importorskip("sklearn.datasets")
    file = folder / "flower.jpg"
    Image.fromarray(datasets.load_sample_image("flower.jpg")).save(file, quality=90)
    return file


def ask(page: Any, text: str, count: int) -> str:
    """Type a question, send it by Enter, and return the answer, the `count`-th."""
    page.locator("#ask").fill(text)
    page.keyboard.press("Enter")
    whole = page.locator(".message.assistant").nth(count - 1)
    whole.locator(".tools").wait_for()
    return str(whole.locator(".text").inner_text())


def begin(page: Any, text: str) -> Any:
    """Ask a page that is held; return the last message of the request once it is sent."""
    page.evaluate("() => { window.answer = null; }")
    page.locator("#ask").fill(text)
    page.keyboard.press("Enter")
    until(lambda: page.evaluate("() => !!window.answer"))
    return page.evaluate("() => window.asked.messages.at(-1)")


def say(page: Any, text: str) -> None:
    """Write a piece of the answer."""
    write(page, {"choices": [{"delta": {"content": text}, "finish_reason": None}]})


def finish(page: Any, text: str = "") -> None:
    """Write the rest of the answer, and wait until the page has its end."""
    say(page, text)
    write(page, {"choices": [], "usage": {"completion_tokens": 7}})
    write(page, "[DONE]")
    page.evaluate("() => window.answer.close()")
    sync_api.expect(page.locator(".message").last.locator(".tools")).to_contain_text("7 tokens")


def write(page: Any, event: object) -> None:
    data = event if isinstance(event, str) else json.dumps(event)
    page.evaluate(
        "(text) => window.answer.enqueue(new TextEncoder().encode(text))", f"data: {data}\n\n"
    )


def titles(page: Any) -> Any:
    """Return the titles of the kept dialogues, opening their list where it is closed."""
    if page.locator("#dialogues").is_hidden():
        page.get_by_role("button", name="Dialogues").click()
    return page.locator("#dialogues li > button:first-child")
