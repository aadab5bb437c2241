"""The curves that a report embeds, and the colours and cells of its pages."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from glasslm.report import curves, figures, page
from glasslm.report.curves import Curve, Panel
from glasslm.report.page import Section
from glasslm.runs.history import History
from html_pages import Page


def test_embedded_curves_keep_their_ends_extremes_and_gaps() -> None:
    values = np.sin(np.arange(50_000) / 900.0)
    values[[31_234, 31_235]] = 9.0, -9.0
    values[40_000] = np.nan
    curve = Curve("</script><b>", np.arange(50_000.0), values, "train")
    text = curves.panels_json([Panel("a", "b", [curve])])
    assert "<" not in text
    (panel,) = json.loads(text)
    (data,) = panel["curves"]
    assert data["label"] == "</script><b>"
    assert len(data["x"]) == len(data["y"]) <= curves.MAX_EMBEDDED_POINTS
    assert data["x"] == sorted(set(data["x"]))
    assert [data["x"][0], data["x"][-1]] == [0, 49_999]
    assert {(31_234, 9.0), (31_235, -9.0)} <= set(zip(data["x"], data["y"]))
    short = Curve("c", np.arange(3.0), np.array([1.0, np.inf, 2.0]), "train")
    (panel,) = json.loads(curves.panels_json([Panel("a", "b", [short])]))
    assert panel["curves"][0]["y"] == [1.0, None, 2.0]


def test_the_panels_of_a_run_are_its_history() -> None:
    history = History(
        steps=[10, 20], train_losses=[3.0, 2.0], lrs=[0.1, 0.2], grad_norms=[4.0, None],
        eval_steps=[0, 20, 20], val_losses=[4.0, 2.6, 2.5], best_step=20, best_val_loss=2.5,
        status="finished",
    )  # fmt: skip
    train, validation, rate, norm = curves.training_panels(history, grad_clip=1.0)
    assert list(train.curves[0].values) == [3.0, 2.0]
    assert [list(c.values) for c in validation.curves[1:]] == [[4.0, 2.5], [2.5]]
    assert list(rate.curves[0].values) == [0.1, 0.2]
    assert [c.label for c in norm.curves][-1] == "clipping threshold"
    figure = curves.draw_panels([train, validation, rate, norm], figures.PRINT_PALETTE)
    drawn = [line.get_ydata() for axes in figure.axes for line in axes.lines]
    assert len(drawn) == sum(len(p.curves) for p in (train, validation, rate, norm))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((number, "number") for number in ("2.46", "-0.031", "1,003,854", "43%", "1.2e-05", "-")),
        *((interval, "number") for interval in ("2.46 to 2.92", "2.1-2.4", "2.46/92", "84.5 M")),
        *((words, "") for words in ("baseline", "a short sentence, 12 words", "n_layers=4")),
        ("86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86", "long"),
        ("/home/somebody/texts/a-book.txt", "long"),
    ],
)
def test_a_number_and_a_word_are_never_broken_and_a_path_may_be(text: str, expected: str) -> None:
    assert page.cell_class(text) == expected


def test_backticks_become_code_and_markup_stays_text(tmp_path: Path) -> None:
    sentence = "run `glasslm diagnose RUN --replay 3`, not `<b>` | x"
    path = page.write(tmp_path, "x", "t", sentence, [Section("s", [sentence], (), [[sentence]])])
    parsed = Page(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in parsed.tags].count("code") == 3
    assert "b" not in {tag for tag, _ in parsed.tags}
    assert parsed.text.count("run glasslm diagnose RUN --replay 3, not `<b>` | x") == 3
    markdown = (tmp_path / "x.md").read_text(encoding="utf-8")
    assert markdown.count("run `glasslm diagnose RUN --replay 3`, not \\`\\<b\\>\\` \\| x") == 3


def relative_luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one: str, other: str) -> float:
    low, high = sorted([relative_luminance(one), relative_luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_on_light_and_on_dark_pages() -> None:
    """At least 4.5, the level AA of WCAG 2; also on the eight colours of the surprise."""
    css = Path(page.TEMPLATES, "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for text in ("ink", "soft", "good", "amber", "wrong"):
            for ground in ("paper", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["train"], colours["card"]) >= 4.5  # prompts, and the reset button
        warm = np.array([int(n) for n in re.findall(r"--warm: (\d+) (\d+) (\d+)", block)[0]])
        paper = np.array([int(colours["card"][i : i + 2], 16) for i in (1, 3, 5)])
        for level, share in re.findall(
            r"\.h(\d) \{ background: rgb\(var\(--warm\) / (\.\d+)\)", css
        ):
            mixed = "#" + "".join(
                f"{round(c):02x}" for c in float(share) * warm + (1 - float(share)) * paper
            )
            ink = colours["hot-ink"] if int(level) >= 6 else colours["ink"]
            assert contrast(ink, mixed) >= 4.5, (level, mixed)
