"""`glasslm diagnose --cookbook`: sentences follow from the numbers, and all can be drawn."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import ComputeConfig, DataConfig
from glasslm.data.dataset import Dataset
from glasslm.errors import InputError
from glasslm.lab.diagnosis import cookbook, cookbook_figures, experiments
from glasslm.lab.diagnosis.checklist import build_checklist
from glasslm.lab.diagnosis.experiments import (
    ALL_TRICKS,
    DEPTHS,
    INIT_SCHEMES,
    NO_TRICKS,
    NO_WARMUP,
    RATES,
    TRICKS,
    CookbookResults,
    describe_outcome,
    judge_trials,
)
from glasslm.lab.diagnosis.gradient_trials import GradientSnapshot, Recipe, Trial, run_trial
from glasslm.report import figures
from small_runs import ignore_message, write_text

NUMPY = ComputeConfig(engine="numpy", threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        text_file=(str(write_text(tmp_path_factory.mktemp("text") / "small.txt", 300)),)
    )


# -- what is sentences -----------------------------------------------------------------------------


def trial(
    val_loss: float, losses: tuple[float, ...] = (4.0, 3.0), first: float = 1.0, last: float = 1.0
) -> Trial:
    looks = [
        GradientSnapshot(step, np.array([first, 1, 1, last]), np.ones(64, int), 0.1, 0.0, 0.5, 0.02)
        for step in (0, 100)
    ]
    return Trial(list(losses), val_loss, looks)


def results_with(changes: dict[Recipe, list[float]]) -> CookbookResults:
    """All recipes came to 2.0, 2.1 and 2.2, but those of `changes`."""
    losses_by_recipe = {
        recipe: changes.get(recipe, [2.0, 2.1, 2.2])
        for recipe in experiments.all_recipes().values()
    }
    results = CookbookResults("a text", 65, 3.3, 100, 3)
    results.trials = {
        recipe: [trial(loss) for loss in losses] for recipe, losses in losses_by_recipe.items()
    }
    return results


def trials_of(*losses: float) -> list[Trial]:
    return [trial(loss) for loss in losses]


def test_losses_in_words() -> None:
    assert describe_outcome(trials_of(2.0, 2.5)) == "2.250 (2.000 to 2.500)"
    assert describe_outcome(trials_of(2.0)) == "2.000"
    assert describe_outcome([trial(math.inf, (4.0,))] * 2) == "diverged in 2 of 2, at step 1"
    assert (
        describe_outcome([trial(math.inf, (4.0, math.nan)), trial(3.0)])
        == "3.000; diverged in 1 of 2, at step 2"
    )


def test_differences_in_words() -> None:
    """As the statistics of a study has them: three seeds that agree are no proof yet."""
    base = trials_of(2.0, 2.1, 2.2)

    def words(*losses: float, among: int = 1) -> str:
        others = {str(number): (base, base) for number in range(1, among)}
        return judge_trials({"it": (trials_of(*losses), base)} | others)["it"].words

    assert words(2.5, 2.7, 2.9) == "worse by 0.6 nats"
    assert (
        words(1.9, 1.9, 1.9)
        == "not distinguishable (0.326 nats would be seen in 4 of 5 studies with n = 3)"
    )
    assert words(2.001, 2.2, 2.5).startswith("not distinguishable")  # worse in every seed
    assert words(1.49, 1.6, 1.71) == "better by 0.5 nats"
    assert words(2.5, 2.7, 2.9, among=6).startswith("not distinguishable")
    assert words(2.5, 2.7, 2.9, among=6).endswith("among 6 comparisons)")
    assert words(2.0, 2.1, 2.2) == "identical in all 3 pairs"
    assert words(math.inf, math.inf, 2.9) == "diverged in 2 of 3"
    gone = trials_of(math.inf)
    assert (
        judge_trials({"it": (gone, gone)})["it"].words
        == "diverged in 1 of 1 (the baseline in 1 of 1)"
    )
    assert (
        judge_trials({"it": (trials_of(2.0), gone)})["it"].words
        == "not tested: the baseline diverged in 1 of 1"
    )


def test_tricks_are_ranked_by_what_they_cost() -> None:
    bad, worse, gone = (
        TRICKS["no clipping"],
        TRICKS["no normalization"],
        TRICKS["start with deviation 1"],
    )
    losses = {
        bad: [2.1, 2.2, 2.301],
        worse: [2.9, 3.0, 3.101],
        gone: [math.inf] * 3,
        NO_TRICKS: [math.inf] * 3,
    }
    results = results_with(
        losses | {TRICKS["constant rate"]: [2.001, 2.4, 2.6]}
    )  # in every seed, but by how much?
    first, hurts, harmless = experiments.describe_tricks(results)
    assert "With all tricks: 2.100" in first
    assert "With none: diverged in 3 of 3" in first
    order = [
        hurts.index(name) for name in ("start with deviation 1", "no normalization", "no clipping")
    ]
    assert order == sorted(order)
    assert "warmup" not in hurts
    assert "start with deviation 1 (diverged in 3 of 3)" in hurts
    assert "no normalization (worse by 0.9 nats)" in hurts
    assert harmless.startswith("Not shown to hurt: constant rate (not distinguishable (")
    assert "among 6 comparisons" in harmless
    assert "no warmup (identical in all 3 pairs)" in harmless
    assert results.worst_recipe == ("no normalization", worse)
    assert results.mostly_fails(gone)
    assert not results.mostly_fails(bad)
    everything = {
        recipe: [2.9, 3.0, 3.101] for name, recipe in TRICKS.items() if name != "all tricks"
    }
    assert not any(
        "Not shown" in sentence
        for sentence in experiments.describe_tricks(results_with(everything))
    )


def test_what_learns_nothing_hurts_whatever_a_test_of_means_sees() -> None:
    """Losses of three seeds may lie so far apart that their mean says little."""
    wild = TRICKS["start with deviation 1"]
    results = results_with({wild: [3.3, 9.0, 60.0]})
    assert (
        results.judge_recipes(experiments.TRICK_FAMILY)["start with deviation 1"].kind
        == "not distinguishable"
    )
    hurts = experiments.describe_tricks(results)[1]
    assert hurts.startswith(
        "What hurts, the worst first: start with deviation 1 (not distinguishable"
    )
    assert hurts.endswith("; fails in 3 of 3).")
    here = {look: cell for _, look, _, cell in build_checklist(results)}
    assert here["Small first weights, smaller into the stream"].endswith("; fails in 3 of 3")


def test_starts_that_fail_are_named() -> None:
    good, bare = INIT_SCHEMES["he"]
    sentences = " ".join(
        experiments.describe_inits(results_with({good: [2.9, 2.9, 2.9], bare: [3.25, 3.25, 2.0]}))
    )
    assert "between 2.100 (scaled) and 2.900 (he)" in sentences
    assert "0 of 5 initializations fail with all other tricks." in sentences
    assert "1 of 5 initializations fail with no other trick: he." in sentences


def test_rates_are_judged_by_the_best_one() -> None:
    others = {recipe: [2.9, 3.001, 3.1] for rate, recipe in RATES.items() if rate not in (1.0, 3.0)}
    others |= {RATES[0.3]: [2.25] * 3, RATES[3.0]: [1.9, 2.1, 2.2], RATES[100.0]: [3.4, 3.5, 3.7]}
    first, ten, hundred = experiments.describe_rates(results_with(others))
    assert first == "The best rate is x3 (0.009); within 0.1 nats of it: x1 and x3."
    assert ten == "x10 against x1: worse by 0.9 nats."
    assert hundred.endswith("nats; fails in 3 of 3.")
    assert (
        "edge of the tested range"
        in experiments.describe_rates(results_with({RATES[100.0]: [1.0] * 3}))[0]
    )


def test_warmup_is_judged_at_each_rate() -> None:
    sentences = experiments.describe_warmup(
        results_with({NO_WARMUP[10.0]: [2.5, 2.6, 2.701], NO_WARMUP[100.0]: [1.0, 1.1, 1.201]})
    )
    assert sentences[2].startswith("Without warmup at x10: worse by 0.5 nats")
    assert "better" in sentences[-1]
    assert "identical" in sentences[0]


def test_depths_at_which_post_norm_fails_are_named() -> None:
    assert (
        experiments.describe_depth(results_with({}))[0]
        == "Post-norm did not fail here, up to 16 blocks."
    )
    failing = {DEPTHS[8][1]: [3.3, 3.3, 2.0], DEPTHS[16][1]: [3.3, math.inf, 3.3]}
    post, pre, ratios = experiments.describe_depth(results_with(failing))
    assert (
        post == "Post-norm fails here at 8 blocks in 2 of 3 seeds and at 16 blocks in 3 of 3 seeds."
    )
    assert pre == "Pre-norm did not fail here, up to 16 blocks."
    assert "pre 1, post 1" in ratios
    sentences = experiments.describe_depth(results_with({DEPTHS[2][0]: [3.3, 2.0, 2.0]}))
    assert sentences[1] == "Pre-norm fails here at 2 blocks in 1 of 3 seeds."


def test_a_recipe_fails_where_most_seeds_do() -> None:
    recipe = RATES[30.0]
    assert not results_with({recipe: [3.3, 2.0, 2.0]}).mostly_fails(recipe)
    assert results_with({recipe: [3.21, 3.19, 3.21]}).mostly_fails(
        recipe
    )  # 3.2 is a tenth below the guess by frequencies


def test_gradients_of_the_first_block_over_the_last() -> None:
    results = results_with({})
    results.trials[ALL_TRICKS] = [trial(2.0, first=6.0, last=2.0)] * 3
    assert (
        "all tricks: the first block's gradient over the last's is 3 at step 0, 3 at step 100."
        in (experiments.describe_gradients(results))
    )


def test_float16_is_told_with_and_without_torch() -> None:
    results = results_with({})
    sentences = experiments.describe_float16(results)
    assert "10.00% of the residual stream's gradients underflow" in sentences[0]
    assert "50.0% and 2.00%" in sentences[0]
    assert "needs PyTorch" in sentences[-1]
    results.float16_trials = dict(
        zip(experiments.FLOAT16, (trials_of(2.0, 2.1), trials_of(2.0, 2.1), trials_of(2.5, 2.601)))
    )
    scaled, unscaled = experiments.describe_float16(results)[2:]
    assert "identical in all 2 pairs" in scaled
    assert "worse by 0.5 nats" in unscaled


def test_the_checklist_tells_what_each_was_worth_here() -> None:
    rows = build_checklist(
        results_with(
            {TRICKS["no normalization"]: [2.9, 3.0, 3.101], NO_WARMUP[10.0]: [1.0, 1.1, 1.201]}
        )
    )
    here = {look: cell for _, look, _, cell in rows}
    assert [row[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    assert here["A norm in each sublayer"] == "without: worse by 0.9 nats"
    assert here["Warmup"] == "without, at x10: better by 1 nats"
    assert here["The first loss is ln V"].startswith("4.000, and ln V is 4.174")


# -- the whole -------------------------------------------------------------------------------------


def test_every_recipe_is_tried_once() -> None:
    every = experiments.all_recipes()
    needed = {*TRICKS.values(), *RATES.values(), *NO_WARMUP.values()}
    needed |= {recipe for pair in (*INIT_SCHEMES.values(), *DEPTHS.values()) for recipe in pair}
    assert len(set(every.values())) == len(every)
    assert set(every.values()) == needed


@pytest.fixture(scope="module")
def results(
    data: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CookbookResults, list[str]]:
    messages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cookbook, "is_torch_installed", lambda: False)
        patch.setattr(cookbook, "run_trial", _quickly)
        return cookbook.run_cookbook(
            data, NUMPY, tmp_path_factory.mktemp("out"), messages.append, steps=2, seeds=1
        ), messages


def _quickly(dataset: Dataset, compute: ComputeConfig, recipe: Recipe, *how: Any) -> Trial:
    """Every model with a single block, which takes no time."""
    return run_trial(dataset, compute, dataclasses.replace(recipe, n_layers=1), *how)


def test_the_page_has_every_experiment(results: tuple[CookbookResults, list[str]]) -> None:
    results, messages = results
    assert results.page is not None
    assert results.page.name == "cookbook.html"
    html, markdown = (
        results.page.with_suffix(end).read_text(encoding="utf-8") for end in (".html", ".md")
    )
    text = cookbook.format_text(results)
    for section in cookbook.build_sections(results):
        assert section.title in html
        assert section.title in markdown
        assert section.title in text
        assert all(sentence in text for sentence in section.text)
    names = {path.stem for path in (results.page.parent / "figures").iterdir()}
    assert names == {
        f"cookbook-{name}"
        for name in ("tricks", "starts", "rates", "depth", "gradients", "float16")
    }
    assert len(messages) == 1 + len(results.trials)
    assert all("left" in line for line in messages[1:])
    assert all(len(trials) == 1 for trials in results.trials.values())
    assert results.cpu_s > 0


def test_the_facts_are_plain() -> None:
    facts = cookbook.json_facts(results_with({NO_TRICKS: [math.inf, 3.0, math.inf]}))
    losses = facts["recipes"]
    assert isinstance(losses, dict)
    assert losses["no trick"] == [None, 3.0, None]
    assert losses["all tricks"] == [2.0, 2.1, 2.2]
    assert len(json.dumps(facts, allow_nan=False)) > 100


@pytest.mark.parametrize("everything", [math.inf, 2.0])
def test_whatever_came_can_be_told_and_drawn(everything: float) -> None:
    losses = {recipe: [everything] * 3 for recipe in experiments.all_recipes().values()}
    results = results_with(losses)
    if everything == math.inf:
        results.trials = {recipe: [Trial([math.nan], math.inf, [])] * 3 for recipe in losses}
        for trials in results.trials.values():
            trials[0] = Trial(
                [math.nan],
                math.inf,
                [GradientSnapshot(0, np.full(4, np.nan), np.zeros(64, int), 0.0, 0.0, 0.0, 0.0)],
            )
    assert ("failed" in cookbook.format_text(results).partition("The learning rate")[2]) == (
        everything == math.inf
    )
    assert figures.png(cookbook_figures.draw_sheet(results, figures.PRINT_PALETTE)).startswith(
        b"\x89PNG"
    )


def test_a_text_without_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(InputError, match="more text"):
        cookbook.run_cookbook(
            DataConfig(text_file=(str(tmp_path / "short.txt"),)), NUMPY, tmp_path, ignore_message
        )


def test_interrupted_it_ends_and_writes_nothing(data: DataConfig, tmp_path: Path) -> None:
    def stop(message: str) -> None:
        if message.startswith("1 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cookbook.run_cookbook(data, NUMPY, tmp_path / "out", stop, steps=1, seeds=1)
    assert not (tmp_path / "out").exists()
