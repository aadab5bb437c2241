"""Judges the measurements of a model: each function returns the finding of one signal.

The thresholds come from clean runs of the presets with smaller sizes, with every feed-forward and
both norm positions. A comment at a threshold gives the range of the clean runs. L layers, H heads,
B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.protocol import Batch, Engine
from glasslm.lab.diagnosis.measurements import (
    Measurement,
    UnitStatistics,
    block_gradient_norms,
    opening_threshold,
)
from glasslm.model.parameters import ParameterTable
from glasslm.report.findings import SEVERITY, Finding, Verdict

Array = NDArray[Any]

# Each pair is the largest value that is ok, and the largest that is not bad. Growth of the stream
# through depth. Clean models start at 1 to 6. They train to 30 (muon) or, at adamw's highest sound
# rates, 360; at rates x30, to 6e4.
INITIAL_GROWTH_LIMITS, GROWTH_LIMITS = (20.0, 100.0), (1000.0, 10000.0)
SHRINKAGE_LIMITS = (10.0, 100.0)
GRADIENT_RATIO_LIMITS = (50.0, 1000.0)  # clean models: 1 to 2 at first, up to 15 later
LOGIT_STD_LIMITS = (1.2, 2.5)  # of the first logits; clean models: 0.15 to 0.6
DEAD_SHARE_LIMITS = (0.2, 0.6)
SCORE_LIMITS = (50.0, 100.0)
LOG_Z_LIMITS, LOGIT_LIMITS = (30.0, 100.0), (100.0, 1000.0)

MIN_LOGIT_STD = 0.02
MIN_ADDED_SHARE = 1e-3  # of the stream, that a block must add
MAX_LEAK = 1e-3  # of the logits' deviation; rounding is 1e-6 in float32
# The original transformer has 6 post-norm layers on each side, with a warmup of 4,000 steps.
MIN_DEEP_LAYERS = 12


def grade(value: float, watch_above: float, bad_above: float) -> Verdict:
    """The verdict on a value that should be small; NaN is bad."""
    return "ok" if value <= watch_above else "watch" if value <= bad_above else "bad"


def worse_finding(first: Finding, second: Finding) -> Finding:
    """The worse of two findings of one signal; the second if they are equal."""
    return first if SEVERITY[first.verdict] > SEVERITY[second.verdict] else second


def _worse(first: Verdict, second: Verdict) -> Verdict:
    return max(first, second, key=SEVERITY.__getitem__)


def shorten_list(names: Sequence[str]) -> str:
    """The first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- before the first step -------------------------------------------------------------------------


def judge_initial_loss(
    first: Measurement, vocab_size: int, c: ModelConfig, head_std: float
) -> Finding:
    """Judge the loss of the first weights against that of a uniform guess, ln V.

    Two properties of sound first weights are allowed for. Logits with standard deviation s cost s^2
    / 2 more, and s^2 = D std^2 after a norm: nanoGPT's model starts .11 above ln V, and twice that
    is allowed. A tied head gives the token that it reads a higher logit, so the judged loss leaves
    that logit out.
    """
    uniform = math.log(vocab_size)
    judged = first.loss_without_copy if c.tie_embeddings else first.loss
    evidence = f"{first.loss:.3f} before training; ln {vocab_size} = {uniform:.3f}"
    if c.tie_embeddings and abs(first.loss - judged) > 0.05:
        evidence += (
            f"; {first.loss - judged:+.3f} because a tied head repeats the token that it reads"
        )
    excess = abs(judged - uniform) - c.d_model * head_std**2
    verdict = grade(excess, 0.05, 0.5)
    if verdict == "ok":
        return Finding(
            "initial loss", verdict, evidence, "the untrained model guesses uniformly, as it should"
        )
    if judged < uniform:
        return Finding(
            "initial loss",
            verdict,
            evidence,
            "an untrained model cannot predict that well: it sees the targets, or it is trained",
            "Look at causality and targets below, and check that the weights are untrained.",
        )
    return Finding(
        "initial loss",
        verdict,
        evidence,
        "the first logits are too large: the model is sure of a random guess",
        "Start with smaller weights (a deviation of .02, less for matrices that write into the "
        "residual stream), and normalize before the head.",
    )


def judge_initialization(first: Measurement) -> Finding:
    """Judge the sizes of the first signals by the standard deviation of the logits."""
    std = first.logit_std
    added = first.added_rms.mean(0)
    evidence = (
        f"rms of embeddings {first.stream_rms[0]:.3g}, of attention's output {added[0]:.3g}, of "
        f"the feed-forward's {added[1]:.3g}; deviation of the logits {std:.3g}"
    )
    verdict: Verdict = (
        grade(std, *LOGIT_STD_LIMITS) if std > MIN_LOGIT_STD else "watch" if std > 0 else "bad"
    )
    if verdict == "ok":
        return Finding("initialization", verdict, evidence, "the first signals have ordinary sizes")
    meaning = (
        "the first weights are too large"
        if not std <= MIN_LOGIT_STD
        else "hardly any signal reaches the logits"
    )
    advice = (
        "Start from the standard deviations of glasslm's own first weights, and check the gains "
        "of the norms."
    )
    return Finding("initialization", verdict, evidence, meaning, advice)


def judge_causality(engine: Engine, batch: Batch, vocab_size: int) -> Finding:
    """Change the tokens from some position on, and judge whether earlier logits change.

    The position differs between rows.
    """
    B, T = batch.tokens.shape
    cuts = 1 + np.arange(B) * (T - 1) // B
    later = np.arange(T) >= cuts[:, None]
    changed = np.where(
        later, (batch.tokens + 1 + np.arange(T) % max(vocab_size - 1, 1)) % vocab_size, batch.tokens
    )
    before = engine.inspect(batch, ["logits"])["logits"]
    after = engine.inspect(batch._replace(tokens=changed), ["logits"])["logits"]
    change = np.abs(after - before).max(-1)  # (B, T)
    std = float(before.std()) or 1.0
    leak = float(change[~later].max(initial=0.0)) / std
    evidence = f"changed later tokens moved earlier logits by {leak:.1e} of their deviation"
    if not leak <= MAX_LEAK:
        return Finding(
            "causality",
            "bad",
            evidence,
            "the model sees the tokens that it has to predict",
            "Look for a missing or shifted causal mask.",
        )
    return Finding("causality", "ok", evidence, "no position sees later tokens")


def judge_targets(batch: Batch) -> Finding:
    """Judge whether the targets are the next tokens."""
    is_target = batch.targets[:, :-1] >= 0
    right = (batch.targets == np.roll(batch.tokens, -1, 1))[:, :-1][is_target]
    same = (batch.targets == batch.tokens)[:, :-1][is_target]
    share = float(right.mean()) if len(right) else 1.0
    evidence = f"{share:.1%} of the targets are the next tokens"
    if share < 1:
        meaning = (
            "the model learns to copy its input"
            if len(same) and same.all()
            else "the model learns to predict another text"
        )
        return Finding(
            "targets",
            "bad",
            evidence,
            meaning,
            "targets[t] must be tokens[t + 1]: check how batches are cut.",
        )
    return Finding("targets", "ok", evidence, "each position predicts the next token")


# -- through depth ---------------------------------------------------------------------------------


def judge_depth(measurement: Measurement, c: ModelConfig) -> Finding:
    """Judge the growth of the residual stream with depth, and whether every block adds to it."""
    signal, when = "signal through depth", f"at step {measurement.step:,}"
    # With post-norm every block's output is normalized, but the embedding is not.
    stream = measurement.stream_rms[0 if c.norm_position == "pre" else 1 :]
    growth = float(stream[-1] / max(stream[0], 1e-30))
    block_inputs = np.maximum(measurement.stream_rms[:-1], 1e-30)
    added_shares = measurement.added_rms.max(1) / block_inputs
    least = float(added_shares.min())
    # In a sandwich a norm follows and gives every output but zero another size.
    is_idle = least == 0 if c.norm_position == "sandwich" else least < MIN_ADDED_SHARE
    evidence = f"rms {stream[0]:.3g} to {stream[-1]:.3g} over {c.n_layers} blocks {when}"
    if is_idle or not np.isfinite(stream).all():
        evidence += f"; block {int(added_shares.argmin())} adds {least:.1g} of its input"
        return Finding(
            signal,
            "bad",
            evidence,
            "a block has no effect: its gains or weights are zero, or the stream is far larger",
            "Check the gains of the norms and the matrices that write into the stream.",
        )
    limits = INITIAL_GROWTH_LIMITS if measurement.step == 0 else GROWTH_LIMITS
    verdict = _worse(grade(growth, *limits), grade(1 / max(growth, 1e-30), *SHRINKAGE_LIMITS))
    if verdict == "ok":
        return Finding(
            signal, verdict, evidence, "the signal keeps a size that the next block can use"
        )
    meaning = (
        "the signal explodes through depth" if growth > 1 else "the signal vanishes through depth"
    )
    return Finding(
        signal,
        verdict,
        evidence,
        meaning,
        "Normalize the input of each sublayer (--norm-position pre), and start the matrices that "
        "write into the stream at .02 / sqrt(2 layers).",
    )


def judge_gradients(measurement: Measurement, c: ModelConfig, table: ParameterTable) -> Finding:
    """Judge whether gradients vanish or explode through depth, or are exactly zero."""
    signal, norms = "gradients by layer", block_gradient_norms(measurement, c)
    step = measurement.step
    zero = [
        name
        for name, norm in measurement.gradient_norms.items()
        if norm == 0
        and table[name].active == 1
        # An adapter's B is zero at first, so its A has no gradient.
        and not (step == 0 and name.endswith("lora_a"))
    ]
    if zero:
        return Finding(
            signal,
            "bad",
            f"none at {shorten_list(zero)}, step {step:,}",
            "these weights are cut off from the loss, or frozen",
            "Look for dead units below, a detached tensor, or a product with zero.",
        )
    evidence = (
        f"norm {norms[0]:.2g} in the first block, {norms[-1]:.2g} in the last, at step {step:,}"
    )
    ratio = float(norms.max() / max(norms.min(), 1e-300)) if np.isfinite(norms).all() else math.inf
    verdict = grade(ratio, *GRADIENT_RATIO_LIMITS)
    if verdict == "ok":
        return Finding(signal, verdict, evidence, "the gradients of all layers have a similar size")
    change = "vanish" if norms[0] < norms[-1] else "explode"
    return Finding(
        signal,
        verdict,
        f"{evidence}, a ratio of {ratio:.3g}",
        f"gradients {change} on their way down",
        "Use --norm-position pre, fewer layers or smaller first weights; look at dead units below.",
    )


def judge_norm_position(c: ModelConfig, first: Measurement) -> Finding:
    """Judge post-norm in a deep model, whatever its gradients are (Xiong, arXiv:2002.04745)."""
    signal, gradient = "norm position", first.stream_gradient
    evidence = (
        f"{c.norm_position}-norm, {c.n_layers} layers; gradient of the stream {gradient[0]:.2g} "
        f"at the embedding, {gradient[-1]:.2g} at the end"
    )
    if c.norm_position == "post" and c.n_layers >= MIN_DEEP_LAYERS:
        return Finding(
            signal,
            "watch",
            evidence,
            "every path down passes a norm: deep post-norm models need a long warmup and a low "
            "rate, or do not train",
            "Use --norm-position pre; or a low --lr and --warmup-steps of thousands.",
        )
    meaning = (
        "the gradient has a path down without a norm"
        if c.norm_position == "pre"
        else "post-norm trains with so few layers"
    )
    return Finding(signal, "ok", evidence, meaning)


# -- parts of the model ----------------------------------------------------------------------------


def judge_dead_units(
    units: Mapping[str, UnitStatistics], tokens: int, c: ModelConfig, step: int
) -> Finding:
    """Judge the share of feed-forward units that are never active, or constant."""
    threshold, over = opening_threshold(c.feedforward), f"over {tokens:,} tokens at step {step:,}"
    dead = {mlp: statistics.dead_share(threshold) for mlp, statistics in units.items()}
    constant = {mlp: statistics.constant_share for mlp, statistics in units.items()}
    most_dead = max(dead, key=dead.__getitem__)
    most_constant = max(constant, key=constant.__getitem__)
    if (
        dead[most_dead] >= constant[most_constant]
        or not constant[most_constant] > DEAD_SHARE_LIMITS[0]
    ):
        verdict = grade(dead[most_dead], *DEAD_SHARE_LIMITS)
        evidence = (
            f"at most {dead[most_dead]:.1%} of a layer's units never above {threshold:g} "
            f"({most_dead}) {over}"
        )
        meaning = (
            "all layers have active units"
            if verdict == "ok"
            else "dead units: they pass on no signal and no gradient"
        )
    else:
        verdict = grade(constant[most_constant], *DEAD_SHARE_LIMITS)
        evidence = f"{constant[most_constant]:.1%} of the units of {most_constant} constant {over}"
        meaning = "saturated units: their value is the same for every token"
    advice = (
        "Lower --lr or lengthen --warmup-steps; start biases at 0; --feedforward gelu or swiglu."
    )
    return Finding("dead units", verdict, evidence, meaning, "" if verdict == "ok" else advice)


def judge_attention_entropy(measurement: Measurement, vocab_size: int) -> Finding:
    """Judge the share of heads that attend to a single token.

    Training makes a few such heads, a collapse most.
    """
    signal, entropy = "attention entropy", measurement.entropy
    collapsed = float((entropy < 0.05).mean())
    evidence = (
        f"{entropy.min():.2f} to {entropy.max():.2f} of the largest possible, median "
        f"{np.median(entropy):.2f}, at step {measurement.step:,}"
    )
    if not np.isfinite(entropy).all() or collapsed > 0.5:
        loss_is_high = not measurement.loss < 0.5 * math.log(vocab_size)
        return Finding(
            signal,
            "bad" if loss_is_high else "watch",
            f"{evidence}; {collapsed:.0%} of the heads below .05",
            "attention has collapsed onto single tokens, a sign of instability (Zhai, "
            "arXiv:2303.06296)",
            "Use --qk-norm, lower --lr, lengthen --warmup-steps.",
        )
    return Finding(
        signal, "ok", evidence, "heads attend to many tokens (1: uniformly, as before training)"
    )


def judge_attention_logits(measurements: Sequence[Measurement]) -> Finding:
    """Judge the largest q . k / sqrt(head size), which grows before training diverges."""
    signal = "attention logits"
    largest = [float(measurement.max_score.max()) for measurement in measurements]
    evidence = "at most " + ", ".join(
        f"{value:.3g} at step {measurement.step:,}"
        for value, measurement in zip(largest, measurements)
    )
    verdict = grade(largest[-1], *SCORE_LIMITS)
    if verdict == "ok":
        return Finding(signal, verdict, evidence, "the softmax can still weigh several tokens")
    return Finding(
        signal,
        verdict,
        evidence,
        "the softmax selects a single token, and its gradient vanishes",
        "Use --qk-norm, lower --lr, lengthen --warmup-steps.",
    )


def judge_output_logits(measurements: Sequence[Measurement]) -> Finding:
    """Judge size and drift of the logits.

    The softmax ignores a constant that is added to all logits, so the loss does not limit it.
    """
    last = measurements[-1]
    drift = ", ".join(f"{item.log_z:+.1f} at step {item.step:,}" for item in measurements)
    evidence = f"mean {last.logit_mean:.2g}, largest {last.logit_max:.3g}; log Z {drift}"
    verdict = _worse(grade(abs(last.log_z), *LOG_Z_LIMITS), grade(last.logit_max, *LOGIT_LIMITS))
    if verdict == "ok":
        return Finding(
            "output logits", verdict, evidence, "the logits are small enough to be exact"
        )
    return Finding(
        "output logits",
        verdict,
        evidence,
        "the logits grow beyond the range where numbers are exact",
        "Use --z-loss 1e-4; lower --lr.",
    )
