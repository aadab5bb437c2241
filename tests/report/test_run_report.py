"""A run in any state has a report that fetches nothing and escapes foreign text."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from glasslm import cli, files
from glasslm.config.conversion import to_dict, with_flags
from glasslm.config.presets import tiny
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.dataset import prepare_dataset
from glasslm.data.sources import corpora
from glasslm.data.tokenizers import ByteTokenizer
from glasslm.engines.factory import make_engine
from glasslm.inference import trained_model
from glasslm.model import parameters
from glasslm.report import figures, report_tables, run_report, samples, token_losses
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.runs.history import best_eval
from glasslm.runs.record import build_record
from html_pages import Page

HOSTILE = (
    "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=x> "
    "\x1b[31m\x00 `````\n# h | & \u202e"
)
TEXT = (
    "The quick brown fox jumps over the lazy dog.\nTo be, or not to be.\n"
    "A rose by any other name: a rose.\n" * 40
)


def page(path: Path) -> Page:
    html = path.read_text(encoding="utf-8")
    found = Page(html)
    found.require_own_scripts()
    assert not {"iframe", "link", "img", "object", "base"} & {tag for tag, _ in found.tags}
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value is not None
                assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import", html)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)
    return found


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "fox <b>.txt").write_text(TEXT, encoding="utf-8")
    flags: dict[str, Any] = {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 1,
        "block_size": 16,
        "max_steps": 20,
    }
    return with_flags(tiny(), flags | {"text_file": (str(tmp_path / "fox <b>.txt"),)}).resolve()


@pytest.fixture
def run_dir(tmp_path: Path, config: RunConfig) -> Path:
    """A run without checkpoints and metrics."""
    return new_run(tmp_path / "a run <i>", config)


def new_run(path: Path, config: RunConfig) -> Path:
    dataset = prepare_dataset(config.data, corpora.find_source(config.data, print), print)
    tokenizer = dataset.tokenizer
    record = {
        **build_record(config, tokenizer, dataset.facts, {}, preset="tiny", command=""),
        "glasslm": "0.1.0", "created": "2026-01-02T03:04:05+00:00", "command": HOSTILE, "seed": 42,
        "config": to_dict(config), "engine": "numpy", "device": "cpu", "precision": "fp32",
        "data": dataset.facts,
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                      "sha256": tokenizer.sha256},
        "machine": {"platform": "Linux", "cpu": HOSTILE, "cores": 2}, "git": None,
    }  # fmt: skip
    run_folder.create_run(path, record, tokenizer.to_json())
    return path


def with_metrics(run_dir: Path, *lines: dict[str, Any]) -> Path:
    with metrics.MetricsLog(run_dir / "metrics.jsonl") as log:
        for line in lines:
            log.write(line)
    return run_dir


def with_checkpoints(run_dir: Path, config: RunConfig, *steps: int) -> None:
    """Checkpoints with the initial weights; the last counts as the best."""
    record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    vocab_size = record["tokenizer"]["vocab_size"]
    engine = make_engine(config, vocab_size, ComputeConfig(threads=1))
    engine.load(
        parameters.initial_weights(parameters.parameter_table(config.model, vocab_size), 42)
    )
    identity = checkpoint.RunIdentity(
        run_folder.config_sha256(record["config"]),
        record["tokenizer"]["sha256"],
        record["data"]["sha256"],
    )
    for step in steps:
        position = checkpoint.TrainingPosition(step, step, step, 0, checkpoint.Best(steps[-1], 1.0))
        checkpoint.save(
            run_dir,
            engine.state(),
            position,
            identity,
            keep=9,
        )


def step(n: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": n,
        "loss": loss,
        "lr": 0.01 / n,
        "grad_norm": loss,
        "clipped": False,
        "tokens": n * 256,
        "epoch": n / 10,
        "timing": {"elapsed_s": n / 2, "tokens_per_s": 512.0},
    } | more


def evaluation(n: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {
        "kind": "eval",
        "step": n,
        "split": "val",
        "loss": loss,
        "perplexity": loss and np.exp(loss),
        "bpb": loss and loss / np.log(2),
        "tokens": 303,
        "bytes": 303,
        "whole": True,
        "best": False,
    } | more


WHOLE_RUN = (
    {"kind": "plan", "step": 0, "max_steps": 20},
    evaluation(0, 3.25),
    {
        "kind": "sample",
        "step": 0,
        "prompt": HOSTILE,
        "text": HOSTILE,
        "temperature": 0.8,
        "seed": 42,
    },
    *(step(n, 3.2 - n / 10) for n in range(1, 11)),
    evaluation(10, 2.34567),
    {"kind": "warning", "step": 10, "code": HOSTILE, "message": HOSTILE},
    *(step(n, 3.2 - n / 10) for n in range(11, 21)),
    evaluation(20, 2.5, whole=False, tokens=99),
    {
        "kind": "sample",
        "step": 20,
        "prompt": "The",
        "text": " quick end",
        "temperature": 0.8,
        "seed": 42,
    },
    {"kind": "end", "step": 20, "status": "finished", "best_step": 10, "best_loss": 2.34567},
)


def test_a_whole_run(run_dir: Path, config: RunConfig) -> None:
    lines = [line | {"prompt": ""} if line["kind"] == "sample" else line for line in WHOLE_RUN]
    with_checkpoints(with_metrics(run_dir, *lines), config, 0, 20)
    started = time.monotonic()
    path = run_report.write(run_dir)
    assert time.monotonic() - started < run_report.MODEL_BUDGET_S + 5
    assert path == run_dir / "report.html"
    found = page(path)
    numbers = [
        "2.3457",
        "step 10",
        f"{np.exp(2.34567):.2f}",
        f"{2.34567 / np.log(2):.3f}",
        "303 tokens",
        "10s",
        "5,120",
    ]
    texts = [
        "quick end",
        "(sample)",
        "a run <i>",
        "fox <b>.txt",
        "temperature 1.5",
        "To be, or not",
        "did all its steps",
    ]
    for words in [*numbers, *texts, "glasslm generate", "<script>alert(1)</script>", "␛[31m␀"]:
        assert words in found.text, words
    svg = [tag for tag, _ in found.tags if tag == "svg"]
    assert len(svg) == 1
    cards = [attributes for tag, attributes in found.tags if attributes.get("class") == "card"]
    assert (
        len(cards) == 2 + 3 * len(samples.TEMPERATURES) + 2
    )  # while training, prompt x temperature, checkpoints
    assert "was never trained" in found.text
    assert (
        len(
            [
                1
                for tag, attributes in found.tags
                if tag == "span" and "expected" in (attributes.get("title") or "")
            ]
        )
        > 100
    )


@pytest.mark.usefixtures("no_figures")
def test_the_numbers_are_those_of_the_metrics(run_dir: Path) -> None:
    rows = report_tables.evaluation_rows(
        WHOLE_RUN, best_eval(WHOLE_RUN, run_folder.Run(with_metrics(run_dir, *WHOLE_RUN)).history)
    )
    shown = [(row[0], row[2], row[-1]) for row in rows]
    assert shown == [("0", "3.2500", ""), ("10", "2.3457", "best"), ("20", "2.5000", "")]
    html = run_report.write(run_dir).read_text(encoding="utf-8")
    for _, loss, _ in shown:
        assert f"<td>{loss}</td>" in html


def test_the_figure_has_all_that_was_logged(run_dir: Path) -> None:
    run_report.write(with_metrics(run_dir, *WHOLE_RUN))
    pixels = image.imread(io.BytesIO((run_dir / "figures" / "training.png").read_bytes()))
    assert pixels.shape[0] > 700
    assert pixels.shape[1] > 1200
    for colour, part in (
        ("train", (0, 0)),
        ("validation", (0, 1)),
        ("third", (1, 0)),
        ("third", (1, 1)),
    ):
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        quarter = pixels[part[0] * height :, part[1] * width :][:height, :width, :3]
        wanted = [
            int(getattr(figures.PRINT_PALETTE, colour)[i : i + 2], 16) / 255 for i in (1, 3, 5)
        ]
        assert (np.abs(quarter - wanted).max(axis=2) < 0.02).sum() > 200, (colour, part)


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (
            WHOLE_RUN[0],
            {"kind": "end", "step": 0, "status": "interrupted", "best_step": None,
             "best_loss": None},
        ),
        (evaluation(0, None),),
        (
            evaluation(0, 3.0), step(1, None), step(2, None), evaluation(2, None),
            {"kind": "end", "step": 2, "status": "diverged", "best_step": 0, "best_loss": 3.0,
             "timing": {}},
        ),
        (step(1, 3.0, timing={}, grad_norm=None), step(2, None)),
        (evaluation(0, 0.0, bpb=0.0, perplexity=1.0), step(1, 0.0)),
    ],
)  # fmt: skip
def test_every_unlucky_run_has_a_report(run_dir: Path, lines: tuple[dict[str, Any], ...]) -> None:
    found = page(run_report.write(with_metrics(run_dir, *lines)))
    assert "There are no samples: " in found.text
    assert (run_dir / "figures" / "training.png").stat().st_size > 10_000
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "(figures/training.png)" in text
    resumable = not lines or lines[-1].get("status") != "diverged"
    assert ("glasslm resume" in found.text) == resumable


def test_a_damaged_checkpoint_only_costs_its_sample(
    run_dir: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with_checkpoints(with_metrics(run_dir, *WHOLE_RUN), config, 0, 10, 20)
    weights = run_dir / "checkpoints" / "000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = samples.sample_checkpoints(run_dir, "The", 0.7, time.monotonic() + 60)
    assert [sample.step for sample in found] == [0, 20]


@pytest.mark.usefixtures("no_figures")
def test_markdown_keeps_foreign_text_in_its_fence(run_dir: Path) -> None:
    run_report.write(with_metrics(run_dir, *WHOLE_RUN))
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert "``````text\n</pre><script>" in text  # a fence of six, for the five within
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert re.search(r"(?<!\\)<\w", outside) is None
    for row in outside.splitlines():
        if row.startswith("| "):
            assert row.endswith(" |")


def test_surprise_is_the_engines_own_loss(run_dir: Path, config: RunConfig) -> None:
    with_checkpoints(run_dir, config, 0)
    model = trained_model.load_model(run_dir, threads=1)
    ids = model.tokenizer.encode(TEXT)[:60]
    pieces = token_losses.measure_surprise(model, ids, time.monotonic() + 60)
    assert "".join(piece.text for piece in pieces) == TEXT[:60]
    width = config.model.block_size
    for at in (
        1,
        width,
        width + 1,
        40,
        59,
    ):  # with all before it in the first window, then with half a window or more
        context = at if at <= width else width // 2 + 1 + (at - width - 1) % (width - width // 2)
        window = ids[None, at - context : at + 1].astype(np.int64)
        expected = model.engine.losses(window[:, :-1], window[:, 1:])[0, -1]
        assert pieces[at].nats == pytest.approx(expected, rel=1e-4)
        assert len(pieces[at].expected) == 3
        assert pieces[at].expected[0][1] >= np.exp(-pieces[at].nats) - 1e-6
    assert token_losses.measure_surprise(model, ids, time.monotonic() - 1)[1:] == []


def test_a_special_token_has_its_own_surprise() -> None:
    tokenizer = ByteTokenizer(["<e>"])
    logits = np.arange(257.0)  # the special token is the likeliest
    engine = SimpleNamespace(
        new_cache=lambda rows, width: SimpleNamespace(clear=lambda row: None),
        logits=lambda window, *_, every: np.broadcast_to(logits, (*window.shape, 257)),
    )
    config = SimpleNamespace(model=SimpleNamespace(block_size=8))
    model: Any = SimpleNamespace(tokenizer=tokenizer, engine=engine, config=config)
    ids = tokenizer.encode("a<e>é<e>b")
    ids = np.delete(ids, 3)  # the second byte of é
    pieces = token_losses.measure_surprise(model, ids, time.monotonic() + 60)
    assert [piece.text for piece in pieces] == ["a", "<e>", "\ufffd", "<e>", "b"]
    nats = np.log(np.exp(logits - 256).sum()) + 256 - logits[ids]
    assert [piece.nats for piece in pieces] == pytest.approx([0, *nats[1:]])
    assert [piece.expected[0][0] for piece in pieces[1:]] == ["<e>"] * 4


def test_half_of_the_surprise() -> None:
    assert (
        token_losses.half_surprise_share(
            [token_losses.Piece("a", nats, ()) for nats in (1, 6, 1, 2)]
        )
        == 0.25
    )
    assert token_losses.half_surprise_share([token_losses.Piece("a", 1.0, ())] * 10) == 0.5


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.floats(-9, 9) | st.just(float("nan"))),
        unique_by=lambda p: p[0],
    ),
    st.floats(0, 200),
    st.floats(0, 50),
)
def test_means_around_a_step(points: list[tuple[int, float]], before: float, after: float) -> None:
    points.sort()
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    means = figures.windowed_mean(steps, values, before, after)
    for here, mean in zip(steps, means):
        near = values[(steps >= here - before) & (steps <= here + after)]
        near = near[np.isfinite(near)]
        expected = near.mean() if len(near) else np.nan
        assert mean == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_the_configuration_marks_what_is_not_the_presets(config: RunConfig) -> None:
    changed = {
        name: usual
        for _, rows in report_tables.configuration_parts(config, "tiny")
        for name, _, usual in rows
        if usual is not None
    }
    assert {"d_model": "128", "n_heads": "4", "n_layers": "4"}.items() <= changed.items()
    assert "lr" not in changed


def test_parameters_by_part_add_up(config: RunConfig) -> None:
    parts = report_tables.parameter_rows(config.model, 65)
    assert (
        sum(count for _, count, _, _ in parts) == parameters.parameter_table(config.model, 65).total
    )
    assert sum(share for _, _, share, _ in parts) == pytest.approx(1)


def test_time_adds_up_over_resumes() -> None:
    part = [step(2, 1.0), step(4, 1.0)]
    assert (
        report_tables.elapsed_s(
            [*part, {"kind": "resume", "step": 4}, *part, {"kind": "resume", "step": 4}]
        )
        == 4.0
    )


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_a_run_that_cannot_be_written_is_said_in_one_line(
    reason: int, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> Any:
        raise OSError(reason, os.strerror(reason), str(path))

    monkeypatch.setattr(files, "_open", refused)
    assert cli.main(["report", str(run_dir)]) == 2
    out, err = capsys.readouterr()
    assert f"{run_dir} cannot be written" in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_the_command_prints_the_path(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"
    assert cli.main(["report", str(run_dir / "nowhere")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_a_copied_passage_stays_text(tmp_path: Path, config: RunConfig) -> None:
    passage = "<script>alert(2)</script> & `````\n# not a heading | and so on and on"
    letters = "".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 20_000))
    text = letters[:9_000] + passage + letters[9_000:]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="\n")
    run = new_run(
        tmp_path / "run", with_flags(config, {"text_file": (str(tmp_path / "text.txt"),)})
    )
    wrote = {
        "kind": "sample",
        "step": 20,
        "prompt": "",
        "text": "x" + passage,
        "temperature": 0.8,
        "seed": 42,
    }
    found = page(run_report.write(with_metrics(run, evaluation(20, 9.0), wrote)))
    assert found.text.count("<script>alert(2)</script>") == 2  # as it was written, and in its place
    assert f"from byte {text.index(passage):,} of the training text" in found.text
    assert (
        found.text.count("The model recites")
        == found.text.count("needs fewer bits. Train longer")
        == 2
    )  # above, and in the table
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert f"in its context, at byte {text.index(passage):,}" in markdown
    assert markdown.count(f"``````text\n{passage}\n``````") == 1


@pytest.mark.usefixtures("no_figures")
def test_without_its_tokens_a_report_says_so(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "new cache"))
    found = page(run_report.write(with_metrics(run_dir, *WHOLE_RUN)))
    assert "not in the cache" in found.text
    assert "not in the cache" in (run_dir / "report.md").read_text(encoding="utf-8")
