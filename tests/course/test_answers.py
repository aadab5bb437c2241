"""The numbers of the answers, compared with independent computations."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained_runs import KINDS, QUICK, TrainedRuns, column, number

from glasslm.config.schema import ComputeConfig
from glasslm.course.capstone import (
    answers,
    attention_answers,
    position_answers,
    run_context,
    text_answers,
)
from glasslm.course.capstone.questions import list_questions
from glasslm.data import tokenizers
from glasslm.engines.factory import make_engine
from glasslm.engines.numpy import attention
from glasslm.inference import trained_model
from glasslm.model.parameters import parameter_table
from glasslm.report import figures, page
from glasslm.runs import checkpoint
from glasslm.runs.run_folder import Run
from html_pages import Page
from small_runs import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TrainedRuns:
    return TrainedRuns(tmp_path_factory.mktemp("runs"))


# -- attention -------------------------------------------------------------------------------------


def test_the_row_that_is_shown_is_that_of_the_weights(runs: TrainedRuns) -> None:
    """The scores computed again from the checkpoint's weights; two heads share their keys."""
    answer = runs.answers("one layer")["attention"]
    head, query = (
        int(re.search(pattern, answer.text[-1])[1])
        for pattern in (r"head (\d)", r"position (\d+) is the query")
    )
    w = checkpoint.load(runs.run("one layer"), "best").weights()
    x = w["embedding.weight"][
        run_context.read_run(runs.run("one layer")).activations.tokens
    ].astype(float)
    n = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w["blocks.0.attention_norm.weight"]
    q, k = (n @ w[f"blocks.0.attention.{name}.weight"].T.astype(float) for name in "qk")
    scores = (
        k[: query + 1, 8 * (head // 2) : 8 * (head // 2 + 1)] @ q[query, 8 * head : 8 * (head + 1)]
    )
    np.testing.assert_allclose(list(map(float, column(answer, 2))), scores, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(
        list(map(float, column(answer, 3))), scores / math.sqrt(8), rtol=1e-3, atol=1e-7
    )
    e = np.exp(scores / math.sqrt(8))
    np.testing.assert_allclose(list(map(float, column(answer, 5))), e / e.sum(), atol=6e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_ends_in_the_weights_that_the_engine_has(kind: str, runs: TrainedRuns) -> None:
    """Also with a slope for the distance, a window, and keys of unit size."""
    answer, activations = (
        runs.answers(kind)["attention"],
        run_context.read_run(runs.run(kind)).activations,
    )
    layer, head, query = map(
        int,
        re.search(
            r"block (\d+), head (\d+),.* position (\d+) is the query", answer.text[-1]
        ).groups(),
    )
    places = [int(place) for place in column(answer, 0)]
    np.testing.assert_allclose(
        list(map(float, column(answer, -1))),
        activations.weights[layer, head, query, places],
        atol=6e-5,
    )
    assert sum(map(float, column(answer, -1))) == pytest.approx(1, abs=1e-3)


def test_without_the_division_is_what_a_model_with_larger_queries_does(runs: TrainedRuns) -> None:
    """In one layer, leaving the division out equals multiplying the queries by sqrt(d_k) = 4."""
    path = runs.run("bpe")
    shallow = dataclasses.replace(
        Run(path).config, model=dataclasses.replace(Run(path).config.model, n_layers=1)
    )
    context = dataclasses.replace(run_context.read_run(path), config=shallow.model)
    engine = make_engine(shallow, context.vocab_size, ComputeConfig(engine="numpy", threads=1))
    weights = checkpoint.load(path, "best").weights()
    matched = {name: array for name, array in weights.items() if "blocks.1." not in name}
    all_activations = []
    for factor in (8, 32):
        engine.load(
            (name, array * factor if ".q." in name else array) for name, array in matched.items()
        )
        all_activations.append(
            run_context._compute_activations(
                trained_model.Model(shallow, context.activations.model.tokenizer, engine, 8),
                context.dataset,
            )
        )
    question = next(
        question
        for question in list_questions(shallow, context.vocab_size)
        if question.name == "sqrt-dk"
    )
    answer = attention_answers.explain_division(
        question, dataclasses.replace(context, activations=all_activations[0])
    )
    larger = attention_answers.explain_division(
        question, dataclasses.replace(context, activations=all_activations[1])
    )
    assert column(answer, 2)[1:] == column(larger, 1)[1:]
    assert column(answer, 1)[1:] != column(answer, 2)[1:]
    assert number(column(answer, 2)[0]) == pytest.approx(
        16 * number(column(answer, 1)[0]), rel=1e-3
    )


def test_the_mask_is_proven_and_a_missing_one_is_seen(
    runs: TrainedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    paragraph = runs.answers("plain")["causal-mask"].text[-1]
    assert "before it move by 0.0 at most" in paragraph
    assert float(re.search(r"own place by up to (\S+)\. ", paragraph)[1]) > 1e-3

    def all_visible(T: int, dtype: Any, window: int) -> Any:
        return np.ones((T, T), dtype)

    monkeypatch.setattr(attention, "_mask", all_visible)
    broken = next(
        answer
        for answer in answers.answer_questions(runs.run("plain"))
        if answer.question.name == "causal-mask"
    )
    assert "before it move by 0.0" not in broken.text[-1]


def test_the_window_hides_what_the_mask_does_not(runs: TrainedRuns) -> None:
    answer = runs.answers("experts")["causal-mask"]
    hidden = sum(j <= i - 8 for i in range(32) for j in range(32))
    assert f"hides {hidden} more" in answer.text[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_pseudocode_names_every_weight_of_attention_with_its_shape(
    kind: str, runs: TrainedRuns
) -> None:
    path, answer = runs.run(kind), runs.answers(kind)["heads"]
    rows = {
        name: row
        for name, row in parameter_table(
            Run(path).config.model, Run(path).tokenizer.vocab_size
        ).items()
        if name.startswith(("blocks.0.attention.", "blocks.0.attention_norm."))
    }
    shapes_by_name = re.findall(r"(blocks[\w.]+) \(([\d, ]+)\)", " ".join(column(answer, 2)))
    assert {name: tuple(map(int, shape.split(", "))) for name, shape in shapes_by_name} == {
        name: row.shape for name, row in rows.items()
    }
    matrices = sum(row.size for name, row in rows.items() if re.search(r"\.[qkvo]\.weight$", name))
    assert answer.number == matrices
    activations = run_context.read_run(path).activations
    shapes = {line.split(" ")[0]: shape for line, shape, _ in answer.rows}
    assert shapes["p"] == str(activations.weights[0].shape)


# -- order -----------------------------------------------------------------------------------------


def test_without_positions_only_a_second_layer_sees_order(runs: TrainedRuns) -> None:
    contexts = np.random.default_rng(0).integers(0, 18, (6, 20))
    context = run_context.read_run(runs.run("plain"))
    effect = position_answers.measure_reversal(context.activations.model.engine, contexts)
    bare = position_answers.measure_reversal(
        position_answers.engine_without_positions(context, context.activations), contexts
    )
    one, two = (
        position_answers.measure_reversal(
            run_context.read_run(runs.run(kind)).activations.model.engine, contexts
        )
        for kind in ("one layer", "unplaced")
    )
    assert one.logit_change < 1e-5
    assert one.changed_guesses == 0
    assert min(effect.logit_change, bare.logit_change, two.logit_change) > 1e-4


def test_positions_are_switched_off_and_nothing_else(runs: TrainedRuns) -> None:
    """Against the engine of a run without positions that is given the same weights.

    Learned ones are left out.
    """
    context, tokens = run_context.read_run(runs.run("post")), np.arange(12)[None] % 18
    c = dataclasses.replace(context.run.config.model, position="none")
    bare = make_engine(
        dataclasses.replace(context.run.config, model=c),
        context.vocab_size,
        ComputeConfig(precision="fp64"),
    )
    weights = checkpoint.load(runs.run("post"), "best").weights()
    bare.load((name, array) for name, array in weights.items() if name != "position.weight")
    switched = position_answers.engine_without_positions(context, context.activations)
    np.testing.assert_allclose(
        switched.losses(tokens, tokens), bare.losses(tokens, tokens), rtol=1e-5
    )
    assert (
        np.abs(
            switched.losses(tokens, tokens)
            - context.activations.model.engine.losses(tokens, tokens)
        ).max()
        > 1e-4
    )


def test_what_is_said_of_order_fits_the_model(runs: TrainedRuns) -> None:
    assert "its one layer cannot see order" in runs.answers("one layer")["positions"].text[-1]
    assert (
        "by way of the mask alone, through 2 layers"
        in runs.answers("unplaced")["positions"].text[-1]
    )
    assert runs.answers("unplaced")["positions"].header == ("measured", "this model")
    switched = runs.answers("plain")["positions"]
    assert "positions switched off" in switched.header
    loss = float(switched.rows[-1][2])
    assert f"to {loss:.4f}" in switched.text[-1]


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_every_merge_joins_the_commonest_pair(kind: str, runs: TrainedRuns) -> None:
    """Counted once more, slowly, in words as GPT-2's pattern cuts this text."""
    answer = runs.answers(kind)["bpe"]
    training = runs.text.read_bytes()[: math.floor(0.9 * runs.text.stat().st_size)].decode()
    words = [[*map(str, word)] for word in re.findall(r" ?[a-z]+| ?[^\sa-z]+|\s+", training)]
    assert len(answer.rows) == text_answers.SHOWN_MERGES
    for _, joins, token, joined, left, _ in answer.rows:
        pairs: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        first, second = (
            part.strip("“”").replace("␣", " ").replace("↵", "\n") for part in joins.split(" + ")
        )
        assert pairs[first, second] == max(pairs.values()) == number(joined)
        assert token.strip("“”").replace("␣", " ") == first + second
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [first, second]:
                    word[i : i + 2] = [first + second]
        assert number(left) == sum(map(len, words))


def test_a_run_with_bpe_shows_its_own_merges(runs: TrainedRuns) -> None:
    own = Run(runs.run("bpe")).tokenizer
    assert isinstance(own, tokenizers.SubwordTokenizer)
    shown = [
        token.strip("“”").replace("␣", " ").encode()
        for token in column(runs.answers("bpe")["bpe"], 2)
    ]
    assert shown == [a + b for a, b in own.merges[: text_answers.SHOWN_MERGES]]
    assert "this run's own" in runs.answers("bpe")["bpe"].text[1]
    assert "has no such merges" in runs.answers("plain")["bpe"].text[1]


def test_what_is_kept_is_counted_by_hand(runs: TrainedRuns) -> None:
    answer, activations = (
        runs.answers("post")["sampling"],
        run_context.read_run(runs.run("post")).activations,
    )
    logits = activations.logits.astype(float)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bits = -(p * np.log2(p)).sum(-1)
    for which, place in ((1, 11 + bits[11:].argmin()), (2, 11 + bits[11:].argmax())):
        after, _, *cells = column(answer, which)
        down = np.sort(p[place])[::-1]
        kept_tokens = int((np.cumsum(down) < 0.9).sum()) + 1
        assert cells[0] == f"{bits[place]:.2f} bits"
        assert cells[1:] == [
            "10",
            f"{down[:10].sum():.1%}",
            str(kept_tokens),
            f"{down[:kept_tokens].sum():.1%}",
        ]
        context = activations.model.tokenizer.decode(activations.tokens[place - 11 : place + 1])
        assert after.strip("“”") == context.replace(" ", "␣").replace("\n", "↵")


def test_compression_is_that_of_the_log_and_of_gzip(runs: TrainedRuns) -> None:
    answer, history = runs.answers("bpe")["compression"], Run(runs.run("bpe")).history
    val = runs.text.read_bytes()[math.floor(0.9 * runs.text.stat().st_size) :]
    encodings = {row[0]: row[1:] for row in answer.rows}
    assert encodings["gzip"] == (
        f"{8 * len(gzip.compress(val, 9)) / len(val):.4f}",
        f"{len(gzip.compress(val, 9)):,}",
    )
    model = next(row for name, row in encodings.items() if name.startswith("by this model"))
    best = history.val_bpb[history.val_losses.index(history.best_val_loss)]
    assert model[0] == f"{best:.4f}"
    tokens = len(Run(runs.run("bpe")).tokenizer.encode(val.decode()))
    assert f"takes {len(val) / tokens:.3f} bytes" in answer.text[1]


def test_compression_names_the_special_tokens_that_only_the_model_predicts(
    runs: TrainedRuns, tmp_path: Path
) -> None:
    marked = train(runs.text, tmp_path / "marked", **QUICK, special_tokens=("<e>",)).run_dir
    context = run_context.read_run(marked)
    questions = list_questions(Run(marked).config, context.vocab_size)
    (question,) = (question for question in questions if question.name == "compression")
    answer = text_answers.explain_compression(question, context)
    assert any("without special tokens" in paragraph for paragraph in answer.text)
    assert not any("special" in part for part in runs.answers("bpe")["compression"].text)


# -- on the page -----------------------------------------------------------------------------------


def test_any_text_can_be_shown_and_drawn(tmp_path: Path) -> None:
    """Markup, mathematics, control characters, and signs that no font here has."""
    draws = np.random.default_rng(3)
    signs = [
        "<b>",
        "&amp;",
        "$x^2$",
        "你",
        "好",
        "\x1b",
        "\u202e",
        "é",
        "|",
        "`",
        "ok",
        "\u00a0",
        "𝕏",
        " ",
        "\n",
    ]
    (tmp_path / "text.txt").write_text(
        "".join(draws.choice(signs, 3000)), encoding="utf-8", newline="\n"
    )
    path = train(tmp_path / "text.txt", tmp_path / "run", **QUICK).run_dir
    all_answers = answers.answer_questions(path)
    html = page.write(
        tmp_path / "p", "i", "t", "l", [answer.section for answer in all_answers]
    ).read_text("utf-8")
    shown = Page(html)
    assert not {"b", "script"} & {tag for tag, _ in shown.tags}
    assert all(answer.question.prompt in shown.text for answer in all_answers)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)


def test_a_token_is_never_mathematics() -> None:
    """Between two dollar signs matplotlib would read TeX, and fail at this."""
    picture = attention_answers.draw_weights_map(
        np.eye(2), ["“$\\frac$”", "“a”"], figures.PRINT_PALETTE
    )
    assert figures.png(picture).startswith(b"\x89PNG")
