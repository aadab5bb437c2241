"""The microscope page in a real browser: first paint, keystrokes, hovering, and long tasks.

    python benchmarks/page_speed.py [--presets tiny nanogpt --tokens 44 256 512 --threads 2
        --keys 20 --browser chromium]

A server of its own serves an untrained run whose context is as long as its text. First paint is
counted from the start of the program. A keystroke moves the caret, with the views of the first
visit open; it ends when these are drawn, and again when the sentences of the closed views are, too.
Tasks above 50 ms are those of the browser's own Long Tasks API.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from playwright.sync_api import Page, sync_playwright

from paired import heading
from serve_speed import TOKENIZER, free_port, make_run, process, serve_command

LONG_TASKS = """window.longTasks = [];
new PerformanceObserver((list) => longTasks.push(...list.getEntries().map((e) => e.duration)))
  .observe({entryTypes: ["longtask"]});"""
IS_DRAWN = """() => document.querySelector(".view.open figure")
  && !document.querySelector("[data-waiting], .waiting-box")"""
PRESS_KEY = """async (key) => {
  const before = document.querySelector(".crumb.after b").textContent;
  const start = performance.now();
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const frame = () => new Promise(requestAnimationFrame);
  const waits = () => [...document.querySelectorAll("[data-waiting], .waiting-box")];
  let open = 0;
  for (;;) {
    await frame();
    if (document.querySelector(".crumb.after b").textContent === before) continue;
    if (!open && waits().every((part) => part.matches(".view:not(.open) header *")))
      open = performance.now() - start;
    if (!waits().length) return [open, performance.now() - start];
  }
}"""
COUNT_FRAMES = """() => {
  window.frames_ms = [];
  let last = performance.now();
  const note = (now) => { frames_ms.push(now - last); last = now; requestAnimationFrame(note); };
  requestAnimationFrame(note);
}"""
FIRST_VIEWS = "write,attention,lens,why"


def hover(page: Page, moves: int = 150) -> list[float]:
    """Milliseconds between frames while the pointer crosses Attention."""
    page.locator("#attention .cells").scroll_into_view_if_needed()
    box = page.locator("#attention .cells").bounding_box()
    assert box is not None
    page.evaluate(COUNT_FRAMES)
    for i in range(moves):
        page.mouse.move(box["x"] + 7 * i % box["width"], box["y"] + 5 * i % box["height"])
        page.wait_for_timeout(8)
    frames: list[float] = page.evaluate("() => frames_ms.slice(3)")
    return frames


def measure(preset: str, tokens: int, options: argparse.Namespace, browser: Any) -> None:
    draw = np.random.default_rng(0)
    text = "".join(draw.choice(list(TOKENIZER.alphabet[1:]), tokens))
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", preset, block_size=tokens)
        start, port = time.time(), free_port()
        with process(serve_command(run, port, options.threads), "serving: "):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.add_init_script(LONG_TASKS)
            page.goto(f"http://127.0.0.1:{port}/#open={FIRST_VIEWS}&text={quote(text)}")
            page.wait_for_function(IS_DRAWN)
            drawn_s = time.time() - start
            paint_s = page.evaluate(
                "() => (performance.timeOrigin"
                " + performance.getEntriesByName('first-contentful-paint')[0].startTime) / 1000"
            )
            page.wait_for_timeout(1500)
            page.evaluate("() => { longTasks.length = 0 }")
            keys = [page.evaluate(PRESS_KEY, "ArrowLeft") for _ in range(options.keys)]
            key_tasks = page.evaluate("() => longTasks.splice(0)")
            page.wait_for_timeout(800)
            page.evaluate("() => { longTasks.length = 0 }")
            frames = hover(page)
            hover_tasks = page.evaluate("() => longTasks.splice(0)")
            page.close()
    row = [f"{preset:<8} {tokens:>4}", f"{paint_s - start:5.2f} s", f"{drawn_s:5.2f} s"]
    row += [f"{statistics.median(times):5.0f} ms, {max(times):5.0f} ms" for times in zip(*keys)]
    row.append(f"{len(key_tasks):3}")
    row += [f"{statistics.median(frames):5.1f} ms", f"{len(hover_tasks):3}"]
    print("  ".join(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["tiny", "nanogpt"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[44, 256, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    options = parser.parse_args()
    print(heading("numpy", threads=options.threads))
    print("preset  tokens, first paint, all drawn; a keystroke until the open views are drawn")
    print("(median, worst), and until the closed views' sentences are, its tasks > 50 ms;")
    print("a frame while hovering (median), tasks > 50 ms")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=options.browser, args=arguments)
        for preset in options.presets:
            for tokens in options.tokens:
                measure(preset, tokens, options, browser)
        browser.close()


if __name__ == "__main__":
    main()
