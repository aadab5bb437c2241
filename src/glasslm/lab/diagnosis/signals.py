"""What can be seen in a model that stands still: each signal measured through `inspect`, and judged.

Measures give arrays, judges make findings of them. Thresholds come from clean runs of the presets, their shapes cut
down, with every feed-forward and both norm positions; a comment beside each says what was seen there. L layers, H
heads, B rows, T positions, F inner width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.inspection import GRADIENT, feedforwards, forward_names
from glasslm.engines.protocol import Batch, Engine
from glasslm.model.parameters import ParameterTable
from glasslm.report.findings import SEVERITY, Finding, Verdict

Array = NDArray[Any]


@dataclass(frozen=True)
class Reading:
    """One look at a model on one batch, small enough to be kept for several checkpoints."""

    step: int
    loss: float  # nats per token
    loss_apart: (
        float  # the same, had the logit of the token just read been like the others at its place
    )
    stream: Array  # (L + 1,) rms of the residual stream as it enters the first block and after each block
    added: Array  # (L, 2) rms of what attention and feed-forward add to it
    stream_gradient: Array  # (L + 1,) L2 norm of the gradient at the same places
    gradients: dict[str, float]  # L2 norm by trained weight
    entropy: Array  # (L, H) of attention, divided by that of looking everywhere alike
    score: Array  # (L, H) the largest attention logit
    logit_mean: float
    logit_std: float
    logit_max: float
    log_z: float  # mean over positions of the logarithm of softmax's sum


def read(engine: Engine, batch: Batch, c: ModelConfig, rows: ParameterTable, step: int) -> Reading:
    """Look once, forward and backward, at the weights that the engine holds."""
    blocks = [f"blocks.{i}" for i in range(c.n_layers)]
    streams = ["embedding", *blocks]
    weights = [name for name, row in rows.items() if row.trained]
    names = [name for name in forward_names(c) if not name.endswith("preactivation")]
    seen = engine.inspect(batch, [*names, *(GRADIENT + name for name in (*streams, *weights))])
    attention = [
        _attention(seen[f"{block}.attention.scores"], seen[f"{block}.attention.weights"])
        for block in blocks
    ]
    logits = np.asarray(seen["logits"], np.float64)
    apart = logits.copy()
    np.put_along_axis(apart, batch.tokens[..., None], logits.mean(-1, keepdims=True), -1)
    return Reading(
        step=step,
        loss=_loss(logits, batch.targets),
        loss_apart=_loss(apart, batch.targets),
        stream=np.array([rms(seen[name]) for name in streams]),
        added=np.array(
            [
                [rms(seen[f"{block}.{part}"]) for part in ("attention", "feedforward")]
                for block in blocks
            ]
        ),
        stream_gradient=np.array([norm(seen[GRADIENT + name]) for name in streams]),
        gradients={name: norm(seen[GRADIENT + name]) for name in weights},
        entropy=np.array([entropy for entropy, _ in attention]),
        score=np.array([score for _, score in attention]),
        logit_mean=float(logits.mean()),
        logit_std=float((logits - logits.mean(-1, keepdims=True)).std()),
        logit_max=float(np.abs(logits).max()),
        log_z=float(np.logaddexp.reduce(logits, -1).mean()),
    )


def _loss(logits: Array, targets: Array) -> float:
    """Nats per target of (B, T, V)."""
    hit = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return float((np.logaddexp.reduce(logits, -1) - hit)[targets >= 0].mean())


def _attention(scores: Array, weights: Array) -> tuple[Array, Array]:
    """(H,) mean entropy as a share of the largest possible one, and (H,) the largest logit; of (B, H, T, T)."""
    p = np.asarray(weights, np.float64)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    visible = np.isfinite(scores).sum(-1)
    share = entropy / np.log(np.maximum(visible, 2))
    several = (visible > 1).sum((0, 2))
    return (share * (visible > 1)).sum((0, 2)) / np.maximum(several, 1), scores.max((0, 2, 3))


def rms(x: Array) -> float:
    return math.sqrt(float(np.square(x, dtype=np.float64).mean()))


def norm(x: Array) -> float:
    return math.sqrt(float(np.square(x, dtype=np.float64).sum()))


def worse(first: Finding, second: Finding) -> Finding:
    """Of two findings about one signal the worse, the second one where they are alike."""
    return first if SEVERITY[first.verdict] > SEVERITY[second.verdict] else second


def graded(value: float, watch: float, bad: float) -> Verdict:
    """A value that should be small. What is not a number is bad."""
    return "ok" if value <= watch else "watch" if value <= bad else "bad"


def some(names: Sequence[str]) -> str:
    """The first three of them, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- before the first step --------------------------------------------------------------------------------------------


def initial_loss(first: Reading, vocab_size: int, c: ModelConfig, head_std: float) -> Finding:
    """The loss of the first weights, which know nothing, against that of a uniform guess.

    Two things of a sound start are allowed for. Logits of deviation s cost s^2 / 2 more, and s^2 = D std^2 after a norm
    (nanoGPT's model starts .11 above ln V, twice that is allowed). And a tied head repeats the token that it reads:
    that logit is left out of what is judged.
    """
    uniform, judged = math.log(vocab_size), first.loss_apart if c.tie_embeddings else first.loss
    seen = f"{first.loss:.3f} before training; ln {vocab_size} = {uniform:.3f}"
    if c.tie_embeddings and abs(first.loss - judged) > 0.05:
        seen += f"; {first.loss - judged:+.3f} because a tied head repeats what it reads"
    over = abs(judged - uniform) - c.d_model * head_std**2
    verdict = graded(over, 0.05, 0.5)
    if verdict == "ok":
        return Finding(
            "initial loss", verdict, seen, "an untrained model guesses uniformly, as it should"
        )
    if judged < uniform:
        return Finding("initial loss", verdict, seen, "an untrained model cannot know that much: it sees the answer",
                       "Look at causality and targets below; see that the weights are untrained.")  # fmt: skip
    return Finding("initial loss", verdict, seen, "its first logits are too large: it is sure of what it cannot know",
                   "Start with smaller weights (a deviation of .02, and less where matrices write into the stream); "
                   "normalise before the head.")  # fmt: skip


def initialisation(first: Reading) -> Finding:
    """The first signals as a whole. Clean models: logits' deviation .15 to .6."""
    s = first.logit_std
    shares = first.added.mean(0)
    seen = (f"rms of embeddings {first.stream[0]:.3g}, of what attention adds {shares[0]:.3g}, the feed-forward "
            f"{shares[1]:.3g}; deviation of the logits {s:.3g}")  # fmt: skip
    verdict: Verdict = graded(s, 1.2, 2.5) if s > 0.02 else "watch" if s > 0 else "bad"
    if verdict == "ok":
        return Finding("initialisation", verdict, seen, "the first signals have ordinary sizes")
    means = (
        "the first weights are too large" if not s <= 0.02 else "hardly anything reaches the logits"
    )
    advice = "Start from the table's deviations (glasslm's own first weights), and look at the norms' gains."
    return Finding("initialisation", verdict, seen, means, advice)


def causality(engine: Engine, batch: Batch, vocab_size: int) -> Finding:
    """Change tokens from some position on, another one in each row: no logits before it may move."""
    B, T = batch.tokens.shape
    cuts = 1 + np.arange(B) * (T - 1) // B
    later = np.arange(T) >= cuts[:, None]
    other = np.where(
        later, (batch.tokens + 1 + np.arange(T) % max(vocab_size - 1, 1)) % vocab_size, batch.tokens
    )
    before = engine.inspect(batch, ["logits"])["logits"]
    after = engine.inspect(batch._replace(tokens=other), ["logits"])["logits"]
    moved = np.abs(after - before).max(-1)  # (B, T)
    size = float(before.std()) or 1.0
    leak = float(moved[~later].max(initial=0.0)) / size
    seen = f"other tokens later on moved earlier logits by {leak:.1e} of their deviation"
    if not leak <= 1e-3:  # rounding: 1e-6 in float32, where products of another shape are formed
        return Finding("causality", "bad", seen, "the model sees the tokens it has to predict",
                       "Look for a missing or shifted causal mask.")  # fmt: skip
    return Finding("causality", "ok", seen, "no position sees what comes after it")


def targets(batch: Batch) -> Finding:
    """Whether targets are the next tokens."""
    asked = batch.targets[:, :-1] >= 0
    right = (batch.targets == np.roll(batch.tokens, -1, 1))[:, :-1][asked]
    same = (batch.targets == batch.tokens)[:, :-1][asked]
    share = float(right.mean()) if len(right) else 1.0
    seen = f"{share:.1%} of the targets are the tokens that follow"
    if share < 1:
        means = (
            "the model learns to copy its input"
            if len(same) and same.all()
            else "it learns another text"
        )
        return Finding(
            "targets",
            "bad",
            seen,
            means,
            "targets[t] must be tokens[t + 1]: look how batches are cut.",
        )
    return Finding("targets", "ok", seen, "each position predicts the next token")


# -- through depth ----------------------------------------------------------------------------------------------------


def depth(reading: Reading, c: ModelConfig) -> Finding:
    """Growth of the residual stream with depth, and whether the blocks add to it at all."""
    signal, at = "signal through depth", f"at step {reading.step:,}"
    begin = 0 if c.norm_position == "pre" else 1
    stream = reading.stream[begin:]
    grown = float(stream[-1] / max(stream[0], 1e-30))
    into = np.maximum(reading.stream[:-1], 1e-30)
    added = float((reading.added.max(1) / into).min())
    seen = f"rms {stream[0]:.3g} to {stream[-1]:.3g} over {c.n_layers} blocks {at}"
    if added < 1e-3 or not np.isfinite(stream).all():
        weakest = int((reading.added.max(1) / into).argmin())
        return Finding(signal, "bad", f"{seen}; block {weakest} adds {added:.1g} of what it gets",
                       "a block does nothing: its gains or weights are zero, or the stream drowns it",
                       "Look at the norms' gains and at the matrices that write into the stream.")  # fmt: skip
    limits = GROWTH_AT_FIRST if reading.step == 0 else GROWTH
    verdict = max(
        graded(grown, *limits), graded(1 / max(grown, 1e-30), 10, 100), key=SEVERITY.__getitem__
    )
    if verdict == "ok":
        return Finding(
            signal, verdict, seen, "the signal keeps a size that the next block can read"
        )
    means = (
        "the signal explodes through depth" if grown > 1 else "the signal vanishes through depth"
    )
    return Finding(signal, verdict, seen, means,
                   "Normalise what each sublayer reads (--norm-position pre), and start matrices that write into the "
                   "stream at .02 / sqrt(2 layers).")  # fmt: skip


# Clean models start at 1 to 6, and train to 30 (muon) or, at adamw's highest sound rates, 360; at rates x30, 6e4.
GROWTH_AT_FIRST, GROWTH = (20.0, 100.0), (1000.0, 10000.0)


def block_gradients(reading: Reading, c: ModelConfig) -> Array:
    """(L,) L2 norm of the gradient of each block's weights."""
    return np.array([
        math.sqrt(sum(g * g for name, g in reading.gradients.items() if name.startswith(f"blocks.{i}.")))
        for i in range(c.n_layers)
    ])  # fmt: skip


def gradients(reading: Reading, c: ModelConfig, rows: ParameterTable) -> Finding:
    """Gradients that vanish or explode through depth, or do not arrive."""
    signal, norms = "gradients by layer", block_gradients(reading, c)
    cut = [name for name, g in reading.gradients.items() if g == 0 and rows[name].active == 1]
    cut = [
        name for name in cut if not (reading.step == 0 and name.endswith("lora_a"))
    ]  # whose B is zero at first
    seen = f"norm {norms[0]:.2g} in the first block, {norms[-1]:.2g} in the last, at step {reading.step:,}"
    if cut:
        return Finding(signal, "bad", f"none at {some(cut)}, step {reading.step:,}", "cut off from the loss, or frozen",
                       "Look for dead units below, a detached tensor, or a product with zero.")  # fmt: skip
    ratio = float(norms.max() / max(norms.min(), 1e-300)) if np.isfinite(norms).all() else math.inf
    verdict = graded(ratio, *RATIO)
    if verdict == "ok":
        return Finding(signal, verdict, seen, "every layer gets a gradient of a like size")
    means = (
        "gradients vanish on their way down"
        if norms[0] < norms[-1]
        else "gradients explode on their way down"
    )
    return Finding(signal, verdict, f"{seen}, a ratio of {ratio:.3g}", means,
                   "Use --norm-position pre; fewer layers; a smaller start; look at dead units below.")  # fmt: skip


RATIO = (50.0, 1000.0)  # clean models: 1 to 2 at first, up to 15 later


def norm_position(c: ModelConfig, reading: Reading) -> Finding:
    """Post-norm at depth, which needs care whatever its first gradients look like (Xiong, arXiv:2002.04745)."""
    signal = "norm position"
    seen = f"{c.norm_position}-norm, {c.n_layers} layers; gradient of the stream {reading.stream_gradient[0]:.2g} at the "
    seen += f"embedding, {reading.stream_gradient[-1]:.2g} at the end"
    if c.norm_position == "post" and c.n_layers >= DEEP:
        return Finding(signal, "watch", seen, "no path without a norm leads down: deep post-norm models train with a "
                       "long warmup and a low rate, or not at all",
                       "Use --norm-position pre; or a low --lr and --warmup-steps of thousands.")  # fmt: skip
    return Finding(
        signal,
        "ok",
        seen,
        "the stream has a way down" if c.norm_position == "pre" else "few enough layers",
    )


DEEP = (
    12  # the original transformer has 6 post-norm layers on each side, with a warmup of 4,000 steps
)


# -- parts ------------------------------------------------------------------------------------------------------------

OPENS = {
    "relu": 0.0,
    "relu2": 0.0,
    "gelu": -3.0,
    "geglu": -3.0,
    "swiglu": -3.0,
}  # below, nothing comes through


@dataclass(frozen=True)
class Units:
    """What a layer's units, or an expert's, read over the probe."""

    highest: Array  # (F,)
    std: Array  # (F,)
    scale: float  # rms over all

    def dead(self, opens: float) -> float:
        """The share of units that never open."""
        return float((self.highest <= opens).mean())

    @property
    def constant(self) -> float:
        """The share of units that read the same whatever the text."""
        return float((self.std <= 1e-3 * self.scale).mean())


def units(engine: Engine, batches: Iterable[Batch], c: ModelConfig) -> tuple[dict[str, Units], int]:
    """The units of every feed-forward (or expert), and over how many tokens.

    It ends as soon as all of them were seen to open: there is nothing more to learn then.
    """
    mlps = [mlp for i in range(c.n_layers) for mlp in feedforwards(c, i)]
    found: dict[str, list[Array]] = {}
    tokens = 0
    for batch in batches:
        tokens += batch.tokens.size
        for mlp, x in zip(
            mlps, engine.inspect(batch, [f"{mlp}.preactivation" for mlp in mlps]).values()
        ):
            x = x.reshape(-1, x.shape[-1])
            if not len(x):
                continue
            part = [
                x.max(0),
                np.full(1, float(len(x))),
                x.sum(0, dtype=np.float64),
                np.square(x, dtype=np.float64).sum(0),
            ]
            old = found.get(mlp)
            found[mlp] = (
                part
                if old is None
                else [np.maximum(old[0], part[0]), *(a + b for a, b in zip(old[1:], part[1:]))]
            )
        if all((highest > OPENS[c.feedforward]).all() for highest, *_ in found.values()):
            break
    result = {}
    for mlp, (highest, n, total, squares) in found.items():
        variance = np.maximum(squares / n - (total / n) ** 2, 0.0)
        result[mlp] = Units(highest, np.sqrt(variance), math.sqrt(float((squares / n).mean())))
    return result, tokens


def dead_units(found: Mapping[str, Units], tokens: int, c: ModelConfig, step: int) -> Finding:
    """Units of the feed-forward that never let anything through, or say nothing about the text."""
    opens, over = OPENS[c.feedforward], f"over {tokens:,} tokens at step {step:,}"
    dead = {mlp: unit.dead(opens) for mlp, unit in found.items()}
    constant = {mlp: unit.constant for mlp, unit in found.items()}
    worst = max(dead, key=dead.__getitem__)
    still = max(constant, key=constant.__getitem__)
    if dead[worst] >= constant[still] or not constant[still] > DEAD[0]:
        seen = (
            f"at most {dead[worst]:.1%} of a layer's units never above {opens:g} ({worst}) {over}"
        )
        verdict = graded(dead[worst], *DEAD)
        means = (
            "units open for some text"
            if verdict == "ok"
            else "dead units: nothing goes through them, nor back"
        )
    else:
        seen, verdict = (
            f"{constant[still]:.1%} of the units of {still} constant {over}",
            graded(constant[still], *DEAD),
        )
        means = "saturated units: they say the same whatever the text"
    advice = (
        "Lower --lr or lengthen --warmup-steps; start biases at 0; --feedforward gelu or swiglu."
    )
    return Finding("dead units", verdict, seen, means, "" if verdict == "ok" else advice)


DEAD = (0.2, 0.6)


def attention_entropy(reading: Reading, vocab_size: int) -> Finding:
    """Heads that look at a single token: a few are what training makes of them, most of them are a collapse."""
    signal, e = "attention entropy", reading.entropy
    collapsed = float((e < 0.05).mean())
    seen = (f"{e.min():.2f} to {e.max():.2f} of the largest possible, median {np.median(e):.2f}, "
            f"at step {reading.step:,}")  # fmt: skip
    if not np.isfinite(e).all() or collapsed > 0.5:
        high = not reading.loss < 0.5 * math.log(vocab_size)
        return Finding(signal, "bad" if high else "watch", f"{seen}; {collapsed:.0%} of the heads below .05",
                       "attention has collapsed onto single tokens; it goes with instability (Zhai, arXiv:2303.06296)",
                       "Use --qk-norm, lower --lr, lengthen --warmup-steps.")  # fmt: skip
    return Finding(
        signal, "ok", seen, "heads look around (1 is everywhere alike, as before training)"
    )


def attention_logits(readings: Sequence[Reading]) -> Finding:
    """The largest q . k / sqrt(head size), which grows before a divergence."""
    signal, largest = "attention logits", [float(r.score.max()) for r in readings]
    seen = ", ".join(f"{x:.3g} at step {r.step:,}" for x, r in zip(largest, readings))
    verdict = graded(largest[-1], 50, 100)
    if verdict == "ok":
        return Finding(signal, verdict, f"at most {seen}", "softmax keeps a choice")
    return Finding(signal, verdict, f"at most {seen}", "softmax has no choice left, and its gradient vanishes",
                   "Use --qk-norm, lower --lr, lengthen --warmup-steps.")  # fmt: skip


def output_logits(readings: Sequence[Reading]) -> Finding:
    """Size and drift of the logits: softmax does not see a constant added to all of them, so nothing holds it."""
    last = readings[-1]
    drift = ", ".join(f"{r.log_z:+.1f} at step {r.step:,}" for r in readings)
    seen = f"mean {last.logit_mean:.2g}, largest {last.logit_max:.3g}; log Z {drift}"
    verdict = max(
        graded(abs(last.log_z), *LOG_Z), graded(last.logit_max, *LOGIT), key=SEVERITY.__getitem__
    )
    if verdict == "ok":
        return Finding("output logits", verdict, seen, "logits stay where numbers are exact")
    return Finding("output logits", verdict, seen, "logits grow out of the range where numbers are exact",
                   "Use --z-loss 1e-4; lower --lr.")  # fmt: skip


LOG_Z, LOGIT = (30.0, 100.0), (100.0, 1000.0)
