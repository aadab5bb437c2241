"""Answers about attention: the equation on a real row, the division by sqrt(d_k), the mask, all heads in pseudocode.

L layers, H query heads, K key-value heads, Q head size (the d_k of the equation), T positions, D width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.course.capstone.questions import Answer, Question, plural, shape
from glasslm.course.capstone.run_context import CONFIGURATION, Look, Specimen
from glasslm.model.parameters import ParameterTable
from glasslm.report.figures import Palette
from glasslm.report.page import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

SHOWN = 10  # tokens of the row and of the map of weights that are shown
SURE = 0.99  # a weight above which a row looks at one token only


def equation(question: Question, of: Specimen) -> Answer:
    """The terms in words and shapes, and one row of one head with its numbers."""
    c = of.config
    H, K, T, Q = c.n_heads, c.n_kv_heads, c.block_size, c.head_size
    place = {
        "rope": ", q and k being turned by their places (rope)",
        "alibi": ", less a slope times the distance (ALiBi)",
    }
    shared = f" {H // K} heads that ask share one that offers (arXiv:2305.13245)." if K < H else ""
    text = (
        "Attention(q, k, v) = softmax(q kᵀ / sqrt(d_k)) v (arXiv:1706.03762, equation 1): each token asks, it and "
        "those before it offer, and what it takes is the mean of their values, weighted by how well question and offer "
        f"match. Here that is {plural(c.n_layers, 'layer')} x {plural(H, 'head')} x {T:,} x {T:,} = "
        f"{question.number:,.0f} weights.",
        f"q = x Wqᵀ, {shape(H, T, Q)}: what each token looks for, in each head. k = x Wkᵀ, {shape(K, T, Q)}: by what "
        f"it is found. v = x Wvᵀ, {shape(K, T, Q)}: what it gives when it is.{shared}",
        f"q kᵀ, {shape(H, T, T)}: how well each pair matches{place.get(c.position, '')}. The division by sqrt({Q}) = "
        f"{math.sqrt(Q):.4g} keeps these numbers where softmax still learns; the mask makes the scores of later tokens "
        "-inf; softmax makes each row positive weights with the sum 1; their product with v mixes the values.",
    )
    answer = Answer(question, text, sources=(CONFIGURATION,))
    return _row(answer, of.look, of) if of.look else answer.without(of.missing)


def _row(answer: Answer, look: Look, of: Specimen) -> Answer:
    query = min(SHOWN, len(look.tokens)) - 1
    layer, head = telling(look, query)
    seen = np.flatnonzero(np.isfinite(look.scores[layer, head, query]))
    scores = look.scores[layer, head, query, seen].astype(np.float64)
    biased = scores + bias(of.config, head, query, seen)
    alibi = of.config.position == "alibi"
    e = np.exp(biased - biased.max())
    weights = e / e.sum()
    largest = int(weights.argmax())
    asks, found = look.named(look.tokens[query]), look.named(look.tokens[seen[largest]])
    told = (
        f"One row, of block {layer}, head {head}, in the validation text: the token {asks} at position {query} asks. "
        f"Its weights are e^(score - the largest score), divided by their sum {e.sum():.4g}; the largest, "
        f"{weights[largest]:.3f}, is on {found} at position {seen[largest]}."
    )
    rows = tuple(
        (str(j), look.named(look.tokens[j]), f"{score * math.sqrt(of.config.head_size):.4g}", f"{score:.4g}",
         *([f"{shifted:.4g}"] if alibi else []), f"{power:.4f}", f"{weight:.4f}")
        for j, score, shifted, power, weight in zip(seen, scores, biased, e, weights)
    )  # fmt: skip
    header = ("position", "token", "q . k", "q . k / sqrt(d_k)", *(["less the distance"] if alibi else []),
              "e^(score - largest)", "weight")  # fmt: skip
    return Answer(
        answer.question, (*answer.text, told), header, rows, (), (*answer.sources, *of.model_files)
    )


def telling(look: Look, query: int) -> tuple[int, int]:
    """The layer and the head with most to see in this query's row: neither even nor all on one token."""
    halfway = np.abs(entropy(look.weights[:, :, query]) - math.log(query + 1) / 2)
    layer, head = np.unravel_index(int(halfway.argmin()), halfway.shape)
    return int(layer), int(head)


def bias(c: ModelConfig, head: int, query: int, keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """What ALiBi adds to the scores of these keys: minus the head's slope times the distance. arXiv:2108.12409."""
    if c.position != "alibi":
        return np.zeros(len(keys))
    return -(2.0 ** (-8 * (head + 1) / c.n_heads)) * (query - keys).astype(np.float64)


def entropy(p: Array) -> NDArray[np.float64]:
    """In nats, of the distributions along the last axis."""
    p = np.asarray(p, np.float64)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


# -- the division by sqrt(d_k) ----------------------------------------------------------------------------------------


def division(question: Question, of: Specimen) -> Answer:
    """The reason, and what this model's attention would be without it."""
    Q = of.config.head_size
    text = (
        "Because a sum of d_k products grows with d_k. With independent entries of mean 0 and variance 1, q . k has "
        f"the variance d_k = {Q}, and divided by sqrt({Q}) = {math.sqrt(Q):.4g} it has 1 again (arXiv:1706.03762, "
        "section 3.2.1). Of scores that large softmax makes nearly all or nothing: it looks at one token, and hardly "
        "any gradient comes back through it.",
    )
    answer = Answer(question, text, sources=(CONFIGURATION,))
    if of.look is None:
        return answer.without(of.missing)
    return _compared(answer, of.look, of)


def _compared(answer: Answer, look: Look, of: Specimen) -> Answer:
    c, visible = of.config, np.isfinite(look.scores)
    several = visible.sum(-1) > 1  # (L, H, T): a row that sees one token has nothing to choose
    if not several.any():
        return answer.without(
            "No row of its attention sees more than one token, so that there is nothing to compare."
        )
    raw = np.where(visible, look.scores, 0.0).astype(np.float64) * math.sqrt(c.head_size)
    T = len(look.tokens)
    added = np.stack(
        [[bias(c, head, i, np.arange(T)) for i in range(T)] for head in range(c.n_heads)]
    )
    without = softmax(np.where(visible, raw + added, -np.inf))
    variance = float(raw[visible].var())
    before, after = (
        _measures(p[several], visible.sum(-1)[several])
        for p in (np.asarray(look.weights, float), without)
    )
    names = (
        "the largest weight of a row, mean",
        f"rows with a weight above {SURE}",
        "entropy of a row, as a share of the largest possible",
        "1 - the sum of squared weights, mean: the trace of softmax's slope",
    )
    rows = [("variance of the scores", f"{variance / c.head_size:.4g}", f"{variance:.4g}")]
    rows += [
        (name, f"{as_is:.4f}", f"{bare:.4f}") for name, as_is, bare in zip(names, before, after)
    ]
    normed = ", which qk-norm brings to one size," if c.qk_norm else ""
    told = (
        f"Measured in this model, in all heads, over {T} tokens of its validation text: q . k has the variance "
        f"{variance:.4g}, as trained q and k{normed} are neither independent nor of variance 1. Without the division "
        f"its rows would put {after[0]:.1%} of their weight on one token on average, instead of {before[0]:.1%}; and "
        f"what softmax passes back, by the trace of its slope, would be {after[3]:.3f} instead of {before[3]:.3f}. "
        "(Trained without it, it would have had to learn smaller q and k.)"
    )
    header = ("over all heads", "as it is", "without the division")
    return Answer(
        answer.question,
        (*answer.text, told),
        header,
        tuple(rows),
        (),
        (*answer.sources, *of.model_files),
    )


def _measures(p: Array, visible: Array) -> tuple[float, float, float, float]:
    """Of rows (N, T) that see so many keys each: largest weight, share of sure rows, entropy, slope."""
    largest = p.max(-1)
    share = entropy(p) / np.log(visible)
    slope = 1 - np.square(p).sum(-1)
    return (
        float(largest.mean()),
        float((largest > SURE).mean()),
        float(share.mean()),
        float(slope.mean()),
    )


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along the last axis; -inf becomes 0."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# -- the mask ---------------------------------------------------------------------------------------------------------


def mask(question: Question, of: Specimen) -> Answer:
    """What it hides, a proof that it does, and a picture of what is left."""
    c, T = of.config, of.config.block_size
    text = [
        "So that no position sees what it has to predict: the score of a later token becomes -inf and its weight 0. "
        f"All {T:,} predictions of a text are then trained in one pass, and writing needs no other model than "
        f"training. Of {T:,} x {T:,} = {T * T:,} scores of a head, T (T - 1) / 2 = {question.number:,.0f} are hidden.",
    ]
    if 0 < c.window < T:
        outside = (T - c.window) * (T - c.window + 1) // 2
        text += [
            f"Its window hides {outside:,} more: a token sees itself and the {c.window - 1} before it."
        ]
    answer = Answer(question, tuple(text), sources=(CONFIGURATION,))
    look = of.look
    if look is None:
        return answer.without(of.missing)
    other = look.tokens.copy()
    other[-1] = (other[-1] + 1) % of.vocab_size
    moved = np.abs(look.again(other) - look.logits).max(-1)
    T, n, visible = len(look.tokens), min(SHOWN, len(look.tokens)), np.isfinite(look.scores)
    earlier = float(moved[:-1].max(initial=0.0))
    told = (
        f"The proof, on {T} tokens of the validation text: with another last token, the logits of "
        f"{plural(T - 1, 'place')} before it move by "
        f"{earlier if earlier == 0 else f'{earlier:.1e} (rounding)'} at most, and those of its own place by up to "
        f"{moved[-1]:.3g}. Hidden weights come to {float(look.weights[~visible].sum())} in total."
    )
    layer, head = telling(look, n - 1)
    label = (
        f"Attention weights of block {layer}, head {head} over the first {n} tokens of the validation text: a row for "
        "the token that asks, a column for the one that it looks at; what is hidden is grey"
    )
    weights = np.where(visible, look.weights, np.nan)[layer, head, :n, :n]
    names = [drawable(look.named(token)) for token in look.tokens[:n]]
    picture = Picture("causal-mask", label, lambda colours: weights_map(weights, names, colours))
    return Answer(
        question, (*answer.text, told), (), (), (picture,), (*answer.sources, *of.model_files)
    )


def drawable(name: str) -> str:
    """A token's name if every font has it, else nothing: fixed words alone are safe to draw."""
    return name if name.strip("“”").replace("␣", "").replace("↵", "").isascii() else ""


def weights_map(weights: Array, names: list[str], colours: Palette) -> Figure:
    """(n, n) weights as a map, with their numbers; NaN is hidden."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    n = len(weights)
    figure = Figure(figsize=(9, 1.4 + 0.32 * n), layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for i in range(n):
        for j in range(n):
            weight, hidden = float(weights[i, j]), bool(np.isnan(weights[i, j]))
            hue, alpha = (colours.faint, 0.25) if hidden else (colours.train, 0.85 * weight)
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=hue, alpha=alpha, linewidth=0))
            if not hidden:
                axes.text(
                    j, i, f"{weight:.2f}", ha="center", va="center", fontsize=8, color=colours.ink
                )
    labels = [f"{place} {name}".strip() for place, name in enumerate(names)]
    axes.set_xticks(range(n), labels, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(n), labels, parse_math=False)
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
    axes.tick_params(colors=colours.ink, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours.faint)
    axes.set_xlabel("the token that is looked at", color=colours.ink)
    axes.set_ylabel("the token that asks", color=colours.ink)
    return figure


# -- all heads, in pseudocode -----------------------------------------------------------------------------------------


def heads(question: Question, of: Specimen) -> Answer:
    """Attention of one block of this model, line by line."""
    c, last = of.config, of.config.n_layers - 1
    text = (
        "All heads are computed side by side, as one array with an axis for the heads: below, line by line. q, k, v "
        f"and output of one block have {question.number:,.0f} weights.",
        f"This is block 0 of this model over a text of {c.block_size:,} tokens"
        + (
            ""
            if not last
            else "; block 1 is like it"
            if last == 1
            else f"; blocks 1 to {last} are like it"
        )
        + f". i asks, j answers; @ is the matrix product, h one of {plural(c.n_heads, 'head')}.",
    )
    lines = [
        (line, of_shape, _weights(of.rows, *parts)) for line, of_shape, *parts in pseudocode(c)
    ]
    sources = (
        (CONFIGURATION, ("a file with these weights", of.model_files[0][1]))
        if of.look
        else (CONFIGURATION,)
    )
    return Answer(question, text, ("line", "shape", "weights"), tuple(lines), (), sources)


def pseudocode(c: ModelConfig) -> list[tuple[str, ...]]:
    """Lines of block 0's attention: what is computed, its shape, and the parts of the table that it uses."""
    H, K, T, Q, D = c.n_heads, c.n_kv_heads, c.block_size, c.head_size, c.d_model
    pre = c.norm_position == "pre" and c.norm != "none"
    named = "rms_norm" if c.norm == "rmsnorm" else "layer_norm"
    read = "n" if pre else "x"
    plus = " + b" if c.bias else ""
    lines: list[tuple[str, ...]] = [("x = the residual stream", shape(T, D))]
    if pre:
        lines += [(f"n = {named}(x)", shape(T, D), "attention_norm")]
    for name, many, biased in (("q", H, plus), ("k", K, ""), ("v", K, plus)):
        line = f"{name} = split({read} @ W{name}ᵀ{_adapted(c, name, read)}{biased}, {plural(many, 'head')})"
        lines += [(line, shape(many, T, Q), f"attention.{name}")]
    if c.qk_norm:
        lines += [("q, k = rms_norm(q), rms_norm(k)", f"{shape(H, T, Q)}, {shape(K, T, Q)}", "attention.q_norm",
                   "attention.k_norm")]  # fmt: skip
    if c.position == "rope":
        lines += [("q, k = rope(q), rope(k)", f"{shape(H, T, Q)}, {shape(K, T, Q)}")]
    own = "h" if K == H else f"h // {H // K}"
    lines += [(f"s[h] = q[h] @ k[{own}]ᵀ / sqrt({Q})", shape(H, T, T))]
    if c.position == "alibi":
        lines += [(f"s[h, i, j] = s[h, i, j] - 2^(-8 (h + 1) / {H}) (i - j)", shape(H, T, T))]
    window = f" or j <= i - {c.window}" if 0 < c.window < T else ""
    lines += [
        (f"s[h, i, j] = -inf where j > i{window}", shape(H, T, T)),
        ("p = softmax(s) over j", shape(H, T, T)),
        (f"m[h] = p[h] @ v[{own}]", shape(H, T, Q)),
        (f"y = concat(m) @ Woᵀ{_adapted(c, 'o', 'concat(m)')}{plus}", shape(T, D), "attention.o"),
    ]
    if pre or c.norm == "none":
        return [*lines, ("x = x + y", shape(T, D))]
    return [*lines, (f"x = {named}(x + y)", shape(T, D), "attention_norm")]


def _adapted(c: ModelConfig, name: str, read: str) -> str:
    """What an adapter adds to the product of a matrix with what it reads."""
    return (
        f" + {c.lora_alpha / c.lora_rank:g} ({read} @ Aᵀ) @ Bᵀ"
        if c.lora_rank and name in c.adapted_matrices
        else ""
    )


def _weights(rows: ParameterTable, *parts: str) -> str:
    """The names of these parts in block 0, with their shapes."""
    found = [f"{name} {shape(*row.shape)}" for name, row in rows.items()
             if name.startswith(tuple(f"blocks.0.{part}." for part in parts))]  # fmt: skip
    return ", ".join(found)
