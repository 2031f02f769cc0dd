"""A headless Chromium for tests of the chat page.

Needs the `browser` extra and a Chromium on the path; without them tests skip, or fail if
REQUIRE_BROWSER is set, as it should be where they must not be lost.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1100, "height": 800}
PATIENCE_MS = 20_000


@contextmanager
def chromium() -> Iterator[Any]:
    """Yields a running browser; skips the test if there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install 'dsv4_jax[browser]'")
    if path is None:
        missing("no Chromium on the path: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def missing(why: str) -> None:
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(why)
    pytest.skip(why)


@dataclass
class Tab:
    """One page with what it asked for and what it complained about."""

    page: Any
    url: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def send(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.get_by_role("button", name="Send", exact=True).click()

    def answer(self) -> Any:
        return self.page.locator("article.assistant").last

    def wait_done(self) -> None:
        self.page.locator("#log[aria-busy=false]").wait_for()
        self.answer().locator(".meta").wait_for()

    def overflow(self) -> int:
        """Returns by how many pixels the page is wider than the window."""
        return self.page.evaluate(
            "Math.max(document.documentElement.scrollWidth - innerWidth,"
            " document.querySelector('#log').scrollWidth - innerWidth)"
        )


@contextmanager
def tab(browser: Any, url: str, **options: Any) -> Iterator[Tab]:
    """Opens the page of the server at `url` in a profile of its own and waits for the model."""
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    context.set_default_timeout(PATIENCE_MS)
    shown = Tab(context.new_page(), url)
    shown.page.on("request", lambda request: shown.requests.append(request.url))
    shown.page.on("pageerror", lambda error: shown.complaints.append(str(error)))
    shown.page.on("console", lambda m: shown.complaints.append(m.text) if m.type == "error" else 0)
    try:
        shown.page.goto(url)
        yield shown
    finally:
        context.close()
