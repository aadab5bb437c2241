"""The microscope page in a real browser: chromium, driven by playwright, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
NARROW, WIDE = 360, 1280  # pixels: a phone and a desktop

READY = """() => document.querySelector(".view")
  && !document.querySelector("[data-waiting], .waiting-box")"""

# What makes a page hard to read or to use.
FAULTS = Path(__file__).with_name("page_faults.js").read_text(encoding="utf-8")


class PageDriver:
    """A page in the browser, with all requests and complaints since it was opened."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.downloads: list[Any] = []
        page.on("download", lambda download: self.downloads.append(download))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._note_console)
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))

    def _note_console(self, message: Any) -> None:
        if message.type in ("error", "warning") and "400 (Bad Request)" not in message.text:
            self.complaints.append(message.text)

    def open(self, address: str = "") -> None:
        """Go to `#address` and wait until all is drawn."""
        self.page.goto(f"{self.url}/#{address}")
        self.wait()

    def wait(self) -> None:
        """Wait until nothing on the page waits for an answer."""
        self.page.wait_for_function(READY)
        self.page.wait_for_timeout(60)
        self.page.wait_for_function(READY)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text().replace("−", "-")

    def sentence(self, view: str) -> str:
        return self.text(f"#{view} header p")

    def choose_number(self, selector: str) -> tuple[str, str]:
        """Choose a number; its value in the rail, and the line of Python that repeats it."""
        self.page.locator(selector).first.click()
        self.wait()  # else the lines of the number before may still stand there
        self.page.wait_for_selector(".where .python")
        return self.text(".where .big"), self.text(".where .python")

    def state(self) -> dict[str, str]:
        """The selection in the address."""
        self.page.wait_for_timeout(150)  # the address follows with a delay
        fields = self.page.evaluate(
            "() => Object.fromEntries(new URLSearchParams(location.hash.slice(1)))"
        )
        return fields

    def save(self, form: str, folder: Path, view: str = "") -> list[Path]:
        """Save the open views, or one; returns the files."""
        page = self.page
        page.keyboard.press("s")
        page.locator("dialog select").select_option(view)
        self.downloads.clear()
        page.locator("dialog dt button", has_text=form).click()
        page.wait_for_function(
            "() => /^Saved/.test(document.querySelector('dialog p').textContent)", polling=50
        )  # not at each frame, which takes as long as to save
        page.wait_for_timeout(200)
        page.locator("dialog button", has_text="Close").click()
        paths = []
        for download in self.downloads:
            path = folder / download.suggested_filename
            download.save_as(path)
            paths.append(path)
        return paths

    def faults(self) -> list[str]:
        """What makes the page hard to read or to use: contrasts below 4.5, missing names."""
        return self.page.evaluate(FAULTS)

    def require_silence(self) -> None:
        """No complaint of the browser, and no request to another origin."""
        assert not self.complaints, self.complaints
        outside = [url for url in self.requests if not url.startswith((self.url, "data:", "blob:"))]
        assert not outside, outside


@contextmanager
def running_browser() -> Iterator[Any]:
    """Chromium without a network but this machine. Skips where there is none."""
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        yield browser
        browser.close()


@contextmanager
def open_page(
    browser: Any,
    url: str,
    *,
    width: int = WIDE,
    theme: Literal["light", "dark"] = "light",
    **options: Any,
) -> Iterator[PageDriver]:
    """A page of its own; nothing is opened yet."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=theme, **options
    )
    context.set_default_timeout(60_000)  # on a busy machine
    try:
        yield PageDriver(context.new_page(), url)
    finally:
        context.close()
