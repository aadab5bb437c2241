"""The terminal display.

What a log gets, what a terminal gets, and that foreign text can steer neither.
"""

from __future__ import annotations

import dataclasses
import io
import math
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from glasslm.runs.history import loss_range
from glasslm.text import (
    escape_control_chars,
    format_bytes,
    format_duration,
    format_number,
    to_one_line,
)
from glasslm.training.dashboard import View, braille_cells, build_panel
from glasslm.training.display import Display, can_draw, format_line, summary_text
from glasslm.training.plan import TrainingPlan, format_plan

HOSTILE = (
    "[/red][bold]\x1b[2J\x1b]0;title\x07\x00\r\x9b31m\u202eevil\u2066 <b>&</b>"
    " 漢字かな \U0001f600\ud800\t|"
)
STEPS = 200

Line = dict[str, Any]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def metrics_lines(hostile: str = HOSTILE) -> Iterator[Line]:
    """A run in which everything happens, null losses included; a step takes 0.1 s."""
    yield {"kind": "plan", "step": 0, "max_steps": STEPS}
    for step in range(STEPS + 1):
        timing = {
            "elapsed_s": step / 10,
            "remaining_s": (STEPS - step) / 10,
            "tokens_per_s": 18000.0,
        }
        loss = None if step == 70 else 1.5 + 3 * math.exp(-step / 40)
        if step % 50 == 0:
            yield {
                "kind": "eval",
                "step": step,
                "split": "val",
                "loss": loss,
                "perplexity": loss and math.exp(loss),
                "bpb": loss,
                "tokens": 99,
                "bytes": 99,
                "whole": True,
                "best": True,
                "timing": {"elapsed_s": step / 10},
            }
        if step % 100 == 0:
            yield {
                "kind": "sample",
                "step": step,
                "prompt": hostile,
                "text": hostile * 9,
                "temperature": 0.8,
                "seed": 1,
            }
            yield {
                "kind": "checkpoint",
                "step": step,
                "path": f"checkpoints/{step:06d}",
                "best": step == 100,
            }
        if step == 70:
            yield {"kind": "warning", "step": step, "code": "nonfinite", "message": hostile}
        if step:
            yield {
                "kind": "step",
                "step": step,
                "loss": loss,
                "lr": 1e-3,
                "grad_norm": loss,
                "clipped": False,
                "tokens": step * 10,
                "epoch": 0.1,
                "timing": timing,
            }
    yield {
        "kind": "end",
        "step": STEPS,
        "status": "finished",
        "best_step": 200,
        "best_loss": 1.5202,
    }


def test_a_log_gets_one_plain_line_for_each_event(clock: Clock) -> None:
    out = io.StringIO()
    with Display(stream=out) as display:
        for line in metrics_lines():
            clock.now += 0.1 if line["kind"] == "step" else 0
            display.show(line)
            display.tick(line["step"])
    printed = out.getvalue().splitlines()
    assert "".join(printed).isprintable()  # no escape sequence, no other control character
    kinds = [row.split()[0] for row in printed]
    for kind, count in {
        "plan": 1,
        "eval": 5,
        "sample": 3,
        "checkpoint": 3,
        "warning": 1,
        "end": 1,
    }.items():
        assert kinds.count(kind) == count
    assert 15 <= kinds.count("step") <= 22  # 200 steps in 20 seconds: one a second
    assert "val loss 4.5000" in printed[1]
    assert printed[-1].split() == [
        "end",
        "200/200",
        "finished",
        "best",
        "loss",
        "1.5202",
        "at",
        "step",
        "200",
    ]


def test_a_long_log_stays_short(clock: Clock) -> None:
    out = io.StringIO()
    with Display(100_000, stream=out) as display:
        for step in range(100_000):  # a day
            clock.now += 0.864
            display.show({"kind": "step", "step": step, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0})
    assert 300 < out.getvalue().count("\n") < 1000


def test_null_numbers_are_shown_and_poison_nothing() -> None:
    assert "loss nan" in format_line(
        {"kind": "step", "step": 1, "loss": math.nan, "lr": 1.0, "grad_norm": 1.0}, 9
    )
    view = View()
    for line in metrics_lines():
        view.update(line)
    view.update({"kind": "eval", "step": 201, "loss": None, "bpb": None})
    assert view.best is not None
    assert view.best == pytest.approx((200, 1.5202), abs=1e-4)
    assert all(math.isfinite(loss) for _, loss in view.train)
    falling = View()
    for step in range(50):
        falling.update({"kind": "step", "step": step, "loss": 4 - step / 25 + (-1) ** step / 5})
    assert (
        abs(falling.train[-1][1] - (4 - 49 / 25)) < 0.05
    )  # noise of 0.2 is smoothed, and the fall not lagged behind


def test_a_loss_measured_again_on_the_whole_split_counts() -> None:
    view = View()
    for step, loss in ((0, 4.0), (50, 2.0), (100, 2.1), (50, 2.2)):
        view.update({"kind": "eval", "step": step, "loss": loss, "bpb": loss})
    assert view.validation == [(0, 4.0), (50, 2.2), (100, 2.1)]
    view.update(
        {"kind": "end", "step": 100, "status": "finished", "best_step": 50, "best_loss": 2.2}
    )
    assert view.best == (50, 2.2)


def panel_rows(view: View, width: int, height: int) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=True
    )
    console.print(build_panel(view, width, height))
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return printed.splitlines()


@pytest.mark.parametrize("width", [14, 25, 40, 80, 100])
@pytest.mark.parametrize("height", [6, 10, 15, 23, 32])
def test_the_panel_fits_and_foreign_text_is_only_text(width: int, height: int) -> None:
    view = View("title [/red] \x1b[31m"[:9])
    for count, line in enumerate(metrics_lines()):
        view.update(line)
        if count % 40 == 0 or line["kind"] == "end":
            shown = panel_rows(view, width, height)
            assert len(shown) <= height
            assert {cell_len(row) for row in shown} == {width}
            assert "".join(shown).isprintable()


def test_the_panel_shows_what_matters_at_80_by_24() -> None:
    view = View("tiny on shakespeare")
    for line in metrics_lines("[/red]"):
        if line["kind"] == "end":
            break
        view.update(line)
    shown = "\n".join(panel_rows(view, 80, 23))
    for words in (
        "tiny on shakespeare",
        "100%",
        "step 200 of 200",
        "val loss",
        "1.520 at 200",
        "18,000",
        "[/red][/red]",
    ):
        assert words in shown
    assert any("⠀" < character <= "⣿" for character in shown)  # the curves


def test_the_panel_keeps_its_height_from_sample_to_sample() -> None:
    view, heights = View(), set()
    for text in ("short", "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\nk\nl"):
        view.update({"kind": "sample", "step": 1, "prompt": "", "text": text})
        heights.add(len(panel_rows(view, 80, 23)))
    assert len(heights) == 1


def test_time_goes_on_between_lines(clock: Clock) -> None:
    view = View()
    view.update(
        {"kind": "step", "step": 1, "loss": 1.0, "timing": {"elapsed_s": 10.0, "remaining_s": 60.0}}
    )
    clock.now += 5
    view.update({"kind": "checkpoint", "step": 1, "timing": {"elapsed_s": 15.0}})
    clock.now += 5
    assert (view.elapsed_s(), view.remaining_s()) == (20.0, 50.0)
    view.update({"kind": "end", "step": 1, "status": "finished"})
    assert (view.elapsed_s(), view.remaining_s()) == (15.0, None)


def test_live_redraws_a_few_times_a_second_and_prints_warnings_above(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "TERM", "xterm-256color"
    )  # where the tests run it may be "dumb", on which nothing is redrawn
    out = Terminal()
    with Display(STEPS, "a run", stream=out, live=True) as display:
        for line in metrics_lines():
            display.show(line)
        n_drawn = out.getvalue().count("of 200")
        for step in range(1000):  # one second
            clock.now += 0.001
            display.tick(step)
        drawn = out.getvalue().count("of 200") - n_drawn
    text = out.getvalue()
    assert 3 <= drawn <= 8
    assert "nonfinite: [/red][bold]␛[2J" in text
    assert "\x1b[2J" not in text
    assert "\x1b]0;" not in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text[-20:]  # the cursor is back


def test_the_past_of_a_resumed_run_is_drawn_and_not_printed() -> None:
    out = io.StringIO()
    past = [line for line in metrics_lines() if line["step"] <= 100]
    display = Display(STEPS, stream=out)
    display.show_earlier(past)
    assert not out.getvalue()
    assert [step for step, _ in display.view.validation] == [0, 50, 100]
    display.show({"kind": "end", "step": 100, "status": "interrupted"})
    display.show({"kind": "resume", "step": 60, "from": "checkpoints/000060"})
    assert [step for step, _ in display.view.validation] == [0, 50]
    assert display.view.train[-1][0] == 60
    assert (display.view.best, display.view.ended) == (display.view.validation[-1], "")


class Gone(io.StringIO):
    """A stream that nobody reads after a few writes.

    A pipe into `head`, or a terminal that was closed.
    """

    encoding = "utf-8"

    def __init__(self, problem: OSError, after: int, terminal: bool) -> None:
        super().__init__()
        self.problem, self.writes_left, self.terminal = problem, after, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.writes_left -= 1
        if self.writes_left < 0:
            raise self.problem
        return super().write(text)


@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("problem", "live"), [(BrokenPipeError(32, "broken pipe"), False), (OSError(5, "gone"), True)]
)
def test_the_run_goes_on_when_nobody_reads_any_more(
    problem: OSError, live: bool, after: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Gone(problem, after, live)
    monkeypatch.setattr(sys, "stderr", out)
    with Display(STEPS, stream=out, live=live) as display:
        for line in metrics_lines():
            clock.now += 1
            display.show(line)
            display.tick(line["step"])
    assert display.view.validation[-1][0] == STEPS  # it saw all
    assert out.writes_left == -1 or live, "it went on writing"
    assert sys.stderr is out  # and not what draws above the panel


def test_live_only_where_a_terminal_can_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert can_draw(Terminal())
    assert not can_draw(io.StringIO())
    latin = Terminal()
    latin.encoding = "latin-1"
    assert not can_draw(latin)
    monkeypatch.setenv("TERM", "dumb")
    assert not can_draw(Terminal())


def test_rich_is_not_imported_for_a_log() -> None:
    code = (
        "import sys; from glasslm.training.display import Display\n"
        "with Display(9, live=False) as d: d.show({'kind': 'step', 'step': 1, 'loss': 1.0})\n"
        "assert not any(name.split('.')[0] in ('rich', 'matplotlib') for name in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("step           1/9  loss 1.0000")


def test_braille_dots_are_where_unicode_says() -> None:
    corners = {(0.0, 1.0): "1", (1.0, 1.0): "4", (0.0, 0.0): "7", (1.0, 0.0): "8"}
    for point, dot in corners.items():
        ((cell,),) = braille_cells([point], 1, 1, (0.0, 1.0), (0.0, 1.0))
        assert unicodedata.name(chr(0x2800 | cell)) == f"BRAILLE PATTERN DOTS-{dot}"


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.floats(-2, 2)),
        min_size=1,
        max_size=30,
        unique_by=lambda p: p[0],
    )
)
def test_a_curve_is_joined_and_passes_through_its_points(points: list[tuple[int, float]]) -> None:
    points.sort()
    cells = braille_cells([(float(x), y) for x, y in points], 40, 8, (0.0, 50.0), (-2.0, 2.0))
    dots = drawn_dots(cells)
    for x, y in points:
        assert (round(x / 50 * 79), round((2 - y) / 4 * 31)) in dots
    columns = sorted({x for x, _ in dots})
    assert columns == list(range(columns[0], columns[-1] + 1))


def drawn_dots(cells: list[list[int]]) -> set[tuple[int, int]]:
    numbers = {
        1: (0, 0),
        2: (0, 1),
        3: (0, 2),
        4: (1, 0),
        5: (1, 1),
        6: (1, 2),
        7: (0, 3),
        8: (1, 3),
    }  # Unicode's
    return {
        (2 * x + dx, 4 * y + dy)
        for y, row in enumerate(cells)
        for x, cell in enumerate(row)
        for number, (dx, dy) in numbers.items()
        if cell >> (number - 1) & 1
    }


def test_the_steep_beginning_does_not_flatten_the_curve() -> None:
    low, high = loss_range(
        [(step, 1.5 + 3 * math.exp(-step / 10)) for step in range(1000)] + [(5, math.nan)]
    )
    assert 1.4 < low < 1.5 < high < 1.6
    assert loss_range([(0, math.nan)]) == (0.0, 1.0)


@given(st.text())
def test_harmless_leaves_nothing_that_steers(text: str) -> None:
    safe = escape_control_chars(text)
    assert all(
        unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in safe.replace("\n", "")
    )
    assert not any(
        unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "RLI", "LRI", "FSI")
        for c in safe
    )
    assert escape_control_chars(safe) == safe
    assert "\n" not in to_one_line(text)
    safe.encode("utf-8")


def test_ordinary_text_is_left_alone() -> None:
    for text in (
        "To be,\n  or not\n",
        "naïve 漢字 \U0001f469\u200d\U0001f680",
        "हिन्दी",
        "a\u00a0b",
    ):
        assert escape_control_chars(text) == text


PLAN = TrainingPlan(
    preset="tiny",
    corpus="shakespeare",
    run_dir=Path("runs", "a"),
    parameters={"total": 795392, "non_embedding": 787072, "active": 795392, "trained": 795392},
    vocab_size=65,
    train_tokens=1003854,
    val_tokens=111540,
    max_steps=1000,
    tokens_per_step=2048,
    epochs=2.0401,
    flops=9.9e12,
    memory_bytes=120_000_000,
    seconds=110,
    engine="numpy",
    device="cpu",
    precision="fp32",
    threads=2,
    processes=1,
    reasons=["a CPU", HOSTILE],
)


def test_a_plan_shows_what_it_has() -> None:
    text = format_plan(PLAN)
    assert text.split("\n")[:6] == [
        "glasslm  tiny on shakespeare",
        "  model     795,392 parameters (787,072 without embeddings), vocabulary of 65",
        "  data      1,003,854 training tokens, 111,540 validation tokens",
        "  training  1,000 steps of 2,048 tokens, 2,048,000 in all, 2.04 epochs",
        "  expected  about 1m 50s, 120 MB of memory",
        "  compute   9.9e+12 FLOPs, numpy engine, cpu, fp32, 2 threads",
    ]
    assert text.replace("\n", "").isprintable()
    assert all(row.strip() for row in text.split("\n"))


def test_a_plan_shows_processes_and_parameters_only_where_they_differ() -> None:
    parameters = {**PLAN.parameters, "trained": 8192}
    text = format_plan(
        dataclasses.replace(
            PLAN, threads=None, processes=4, device="cuda", parameters=parameters, reasons=[]
        )
    )
    assert "8,192 trained" in text
    assert "active" not in text
    assert text.endswith(f"numpy engine, cuda, fp32, 4 processes\n  run       {PLAN.run_dir}")


def test_the_summary_says_how_good_and_what_next() -> None:
    best = {
        "step": 900,
        "loss": 1.58731,
        "perplexity": 4.8906,
        "bpb": 2.29,
        "tokens": 10,
        "whole": True,
    }
    text = summary_text(
        "runs/my run",
        "finished",
        best,
        {"step": 90, "text": HOSTILE},
        "runs/my run/report.html",
        112,
    )
    assert "1.5873" in text
    assert "step 900" in text
    assert 'glasslm generate "runs/my run"' in text
    assert "resume" not in text
    assert "resume" in summary_text("runs/a", "interrupted")
    commands = summary_text("runs/a", "diverged").split("try next:\n")[1].split("\n")
    assert all(command.startswith("  glasslm ") for command in commands)
    assert text.replace("\n", "").isprintable()


def test_words_for_numbers() -> None:
    assert [format_duration(s) for s in (0, 59.4, 59.6, 3599.9, 7500)] == [
        "0s",
        "59s",
        "1m 00s",
        "1h 00m",
        "2h 05m",
    ]
    assert [format_bytes(n) for n in (0, 999, 1000, 210e6, 5e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "210 MB",
        "5 TB",
    ]
    assert [format_number(x, ".1f") for x in (1.25, None, math.nan, math.inf)] == [
        "1.2",
        "-",
        "nan",
        "nan",
    ]
