"""Time from a keystroke to the microscope's answers, and what watching costs a run in training.

    python benchmarks/look_speed.py [--presets tiny nanogpt --tokens 44 256 --engine numpy]
        [--rounds 5 --threads 2 --watch-seconds 30]

A server of its own serves an untrained run. A keystroke is a text that the server has not seen:
POST /inside/texts, then the views that the page shows at first, one after the other, as the page
asks for them. Beside the whole, each view is timed on texts that were read before, where only its
own part is computed. The page's own drawing is not contained.

Watching is what an open page does while a run trains: it asks for /inside/runs every three seconds,
and for its views again when a checkpoint is new. Its cost is the server's CPU time for that, in
share of one core (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from glasslm.config.presets import PRESETS
from paired import heading
from serve_speed import TOKENIZER, cpu_seconds, free_port, make_run, process, serve_command

POLL_S = 3.0  # between two looks of the page at a run in training
FIRST_VIEWS = ("read", "attention?t={t}", "distribution?t={t}&temperature=0.8", "lens", "why?t={t}",
               "scores", "head?layer=0&head=0")  # fmt: skip
OTHER_VIEWS = ("thumbnails", "averages", "lens-at?t={t}", "ablate?t={t}", "off?t={t}&parts=0.0",
               "neurons?t={t}&layer=0&candidate=1&rival=2", "backward?t={t}", "step?t={t}&lr=0.01",
               "learning", "source?name=logits")  # fmt: skip


class Page:
    """What the page asks a server for."""

    def __init__(self, port: int, tokens: int) -> None:
        self.url, self.tokens = f"http://127.0.0.1:{port}", tokens
        self._draw = np.random.default_rng(0)
        self.checkpoint = self.runs()["runs"][0]["checkpoints"][-1]["hash"]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path) as response:
            body: bytes = response.read()
        return body

    def runs(self) -> Any:
        return json.loads(self.get("/inside/runs"))

    def new_text(self) -> str:
        """The name of a text that the server has not seen."""
        letters = self._draw.choice(list(TOKENIZER.alphabet[1:]), self.tokens)
        body = json.dumps({"text": "".join(letters)}).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/inside/texts", body, head)
        with urllib.request.urlopen(request) as response:
            return str(json.loads(response.read())["text"])

    def view(self, view: str, text: str) -> int:
        """The bytes of an answer."""
        name, _, query = view.format(t=self.tokens - 2).partition("?")
        return len(self.get(f"/inside/{name}/{self.checkpoint}/{text}?{query}"))

    def keystroke(self) -> None:
        text = self.new_text()
        for view in FIRST_VIEWS:
            self.view(view, text)


def median_ms(work: Any, rounds: int) -> float:
    """Median milliseconds of a call, after one that is not timed."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(preset: str, tokens: int, flags: argparse.Namespace, folder: Path) -> None:
    """Print the times of one size."""
    run = make_run(folder / f"{preset}-{tokens}", preset)
    tokens = min(tokens, PRESETS[preset]().model.block_size)
    port = free_port()
    command = serve_command(run, port, flags.threads)
    command[command.index("--engine") + 1] = flags.engine
    with process(command, "serving: ") as server:
        page = Page(port, tokens)
        print(f"{preset}, {tokens} tokens, {flags.engine}")
        print(f"  keystroke to all first views {median_ms(page.keystroke, flags.rounds):9.1f} ms")
        text = page.new_text()
        for view in (*FIRST_VIEWS, *OTHER_VIEWS):
            size = page.view(view, text)
            ms = median_ms(lambda: page.view(view, text), flags.rounds)  # noqa: B023
            print(f"  {view.partition('?')[0]:28} {ms:9.1f} ms {size / 1e3:9.1f} kB")
        print(f"  watching: {watching_share(page, server.pid, flags.watch_seconds):.2%} of a core")


def watching_share(page: Page, pid: int, seconds: float) -> float:
    """The CPU time of polling for `seconds` as the page does, as a share of one core."""
    polls = max(1, round(seconds / POLL_S))
    before = cpu_seconds(pid)
    for _ in range(polls):
        page.runs()
    return (cpu_seconds(pid) - before) / (polls * POLL_S)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["tiny", "nanogpt"], choices=list(PRESETS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[44, 256])
    parser.add_argument("--engine", default="numpy", choices=["numpy", "torch"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--watch-seconds", type=float, default=30.0)
    flags = parser.parse_args()
    print(heading("numpy", threads=flags.threads))
    with tempfile.TemporaryDirectory() as folder:
        for preset in flags.presets:
            for tokens in flags.tokens:
                measure(preset, tokens, flags, Path(folder))


if __name__ == "__main__":
    main()
