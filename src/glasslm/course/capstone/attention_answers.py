"""Answers about attention: the equation, the division by sqrt(d_k), the causal mask, pseudocode.

L layers, H query heads, K key-value heads, Q head size (the d_k of the equation), T positions,
D width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig, Position
from glasslm.course.capstone.questions import Answer, Question, format_shape
from glasslm.course.capstone.run_context import CONFIGURATION, ExcerptActivations, RunContext
from glasslm.engines.positions import alibi_slopes
from glasslm.lab.diagnosis.measurements import entropy
from glasslm.model.parameters import ParameterTable
from glasslm.report.figures import Palette
from glasslm.report.page import Picture
from glasslm.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

MAX_SHOWN_TOKENS = 10  # in the example row and in the map of weights
CONCENTRATED_WEIGHT = 0.99  # above it a row counts as attending to one token only


def explain_equation(question: Question, context: RunContext) -> Answer:
    """The terms of the attention equation with their shapes, and one row of one head."""
    c = context.config
    H, K, T, Q = c.n_heads, c.n_kv_heads, c.block_size, c.head_size
    position_term: dict[Position, str] = {
        "none": "",
        "learned": "",
        "sinusoidal": "",
        "rope": ", with q and k rotated by their positions (RoPE)",
        "alibi": ", less a slope times the distance (ALiBi)",
    }
    shared = f" {H // K} query heads share one key-value head (arXiv:2305.13245)." if K < H else ""
    text = (
        "Attention(q, k, v) = softmax(q kᵀ / sqrt(d_k)) v (arXiv:1706.03762, equation 1): each "
        "token has a query, it and the tokens before it have keys and values, and its output is "
        "the mean of their values, weighted by how well its query matches their keys. Here that "
        f"is {plural(c.n_layers, 'layer')} x {plural(H, 'head')} x {T:,} x {T:,} = "
        f"{question.number:,.0f} weights.",
        f"q = x Wqᵀ, {format_shape(H, T, Q)}: what each token looks for, in each head. k = x Wkᵀ, "
        f"{format_shape(K, T, Q)}: what queries are matched with. v = x Wvᵀ, "
        f"{format_shape(K, T, Q)}: what a token contributes to the output.{shared}",
        f"q kᵀ, {format_shape(H, T, T)}: how well each pair "
        f"matches{position_term[c.position]}. The division by sqrt({Q}) = "
        f"{math.sqrt(Q):.4g} keeps these scores in the range where softmax has a useful gradient. "
        "The mask sets the scores of later tokens to -inf. Softmax turns each row into positive "
        "weights with the sum 1. Their product with v mixes the values.",
    )
    answer = Answer(question, text, sources=(CONFIGURATION,))
    if context.activations is None:
        return answer.with_reason(context.missing)
    return _add_example_row(answer, context.activations, context)


def _add_example_row(
    answer: Answer, activations: ExcerptActivations, context: RunContext
) -> Answer:
    """The answer with one row of one head: scores, exponentials and weights."""
    query = min(MAX_SHOWN_TOKENS, len(activations.tokens)) - 1
    layer, head = most_informative_head(activations, query)
    keys = np.flatnonzero(np.isfinite(activations.scores[layer, head, query]))
    scores = activations.scores[layer, head, query, keys].astype(np.float64)
    alibi = context.config.position == "alibi"
    biased = scores + alibi_bias(context.config, len(activations.tokens))[head, query, keys]
    e = np.exp(biased - biased.max())
    weights = e / e.sum()
    largest = int(weights.argmax())
    query_token = activations.token_label(activations.tokens[query])
    key_token = activations.token_label(activations.tokens[keys[largest]])
    paragraph = (
        f"One row, of block {layer}, head {head}, in the validation text: the token "
        f"{query_token} at position {query} is the query. Its weights are e^(score - the largest "
        f"score), divided by their sum {e.sum():.4g}; the largest, {weights[largest]:.3f}, is on "
        f"{key_token} at position {keys[largest]}."
    )
    rows = tuple(
        (
            str(j),
            activations.token_label(activations.tokens[j]),
            f"{score * math.sqrt(context.config.head_size):.4g}",
            f"{score:.4g}",
            *([f"{shifted:.4g}"] if alibi else []),
            f"{power:.4f}",
            f"{weight:.4f}",
        )
        for j, score, shifted, power, weight in zip(keys, scores, biased, e, weights)
    )
    header = (
        "position",
        "token",
        "q . k",
        "q . k / sqrt(d_k)",
        *(["less the distance"] if alibi else []),
        "e^(score - largest)",
        "weight",
    )
    return answer.with_measurement(paragraph, context.model_files, header, rows)


def most_informative_head(activations: ExcerptActivations, query: int) -> tuple[int, int]:
    """(layer, head) whose row of this query is nearest to half of the largest entropy.

    Such a row is neither uniform nor concentrated on one token.
    """
    distances = np.abs(entropy(activations.weights[:, :, query]) - math.log(query + 1) / 2)
    layer, head = np.unravel_index(int(distances.argmin()), distances.shape)
    return int(layer), int(head)


def alibi_bias(c: ModelConfig, T: int) -> NDArray[np.float64]:
    """(H, T, T): ALiBi's bias of each score; zeros without ALiBi. arXiv:2108.12409."""
    if c.position != "alibi":
        return np.zeros((c.n_heads, T, T))
    distances = np.arange(T)[:, None] - np.arange(T)
    return -alibi_slopes(c.n_heads, np.float64)[:, None, None] * distances


# -- the division by sqrt(d_k) ---------------------------------------------------------------------


def explain_division(question: Question, context: RunContext) -> Answer:
    """The reason for the division, and this model's attention without it."""
    Q = context.config.head_size
    text = (
        "Because a sum of d_k products grows with d_k. With independent entries of mean 0 and "
        f"variance 1, q . k has the variance d_k = {Q}; divided by sqrt({Q}) = "
        f"{math.sqrt(Q):.4g} it has the variance 1 again (arXiv:1706.03762, section 3.2.1). With "
        "larger scores softmax gives nearly all weight to one token, and hardly any gradient "
        "passes back through it.",
    )
    answer = Answer(question, text, sources=(CONFIGURATION,))
    if context.activations is None:
        return answer.with_reason(context.missing)
    return _compare_without_division(answer, context.activations, context)


def _compare_without_division(
    answer: Answer, activations: ExcerptActivations, context: RunContext
) -> Answer:
    """The answer with statistics of the attention weights with and without the division."""
    from scipy.special import softmax

    c, visible = context.config, np.isfinite(activations.scores)
    # (L, H, T): in a row with one visible token the weight is 1 either way.
    several = visible.sum(-1) > 1
    if not several.any():
        return answer.with_reason(
            "No row of its attention sees more than one token, so there is nothing to compare."
        )
    raw = np.where(visible, activations.scores, 0.0).astype(np.float64) * math.sqrt(c.head_size)
    T = len(activations.tokens)
    undivided = softmax(np.where(visible, raw + alibi_bias(c, T), -np.inf), -1)
    variance = float(raw[visible].var())
    before, after = (
        _weight_statistics(p[several], visible.sum(-1)[several])
        for p in (np.asarray(activations.weights, float), undivided)
    )
    names = (
        "the largest weight of a row, mean",
        f"rows with a weight above {CONCENTRATED_WEIGHT}",
        "entropy of a row, as a share of the largest possible",
        "1 - the sum of squared weights, mean: the trace of softmax's Jacobian",
    )
    rows = [("variance of the scores", f"{variance / c.head_size:.4g}", f"{variance:.4g}")]
    rows += [
        (name, f"{divided:.4f}", f"{bare:.4f}") for name, divided, bare in zip(names, before, after)
    ]
    normed = ", which qk-norm brings to one size," if c.qk_norm else ""
    paragraph = (
        f"Measured in this model, in all heads, over {T} tokens of its validation text: q . k has "
        f"the variance {variance:.4g}, as trained q and k{normed} are neither independent nor of "
        f"variance 1. Without the division its rows would put {after[0]:.1%} of their weight on "
        f"one token on average, instead of {before[0]:.1%}. The gradient that softmax passes "
        f"back, by the trace of its Jacobian, would be {after[3]:.3f} instead of "
        f"{before[3]:.3f}. (A model trained without the division would have to learn smaller q "
        "and k.)"
    )
    header = ("over all heads", "as it is", "without the division")
    return answer.with_measurement(paragraph, context.model_files, header, rows)


def _weight_statistics(p: Array, visible: Array) -> tuple[float, float, float, float]:
    """Means over the rows of attention weights p (N, T), which see visible (N,) keys.

    Returns the largest weight, the share of concentrated rows, the relative entropy, and the
    trace of softmax's Jacobian.
    """
    largest = p.max(-1)
    relative_entropy = entropy(p) / np.log(visible)
    jacobian_trace = 1 - np.square(p).sum(-1)
    return (
        float(largest.mean()),
        float((largest > CONCENTRATED_WEIGHT).mean()),
        float(relative_entropy.mean()),
        float(jacobian_trace.mean()),
    )


# -- the mask --------------------------------------------------------------------------------------


def explain_mask(question: Question, context: RunContext) -> Answer:
    """What the mask hides, a measurement that it does, and a map of the visible weights."""
    c, T = context.config, context.config.block_size
    text = [
        "So that no position sees the token that it has to predict: the score of a later token "
        f"becomes -inf and its weight 0. All {T:,} predictions of a text are then trained in one "
        "pass, and generation uses the same model as training. Of "
        f"{T:,} x {T:,} = {T * T:,} scores of a head, T (T - 1) / 2 = {question.number:,.0f} are "
        "hidden.",
    ]
    if 0 < c.window < T:
        outside = (T - c.window) * (T - c.window + 1) // 2
        text += [
            f"Its window hides {outside:,} more: a token sees itself and the {c.window - 1} "
            "tokens before it."
        ]
    answer = Answer(question, tuple(text), sources=(CONFIGURATION,))
    activations = context.activations
    if activations is None:
        return answer.with_reason(context.missing)
    visible = np.isfinite(activations.scores)
    paragraph = _measure_mask(activations, context.vocab_size)
    n = min(MAX_SHOWN_TOKENS, len(activations.tokens))
    layer, head = most_informative_head(activations, n - 1)
    label = (
        f"Attention weights of block {layer}, head {head} over the first {n} tokens of the "
        "validation text: one row per query token, one column per key token; hidden weights are "
        "grey"
    )
    weights = np.where(visible, activations.weights, np.nan)[layer, head, :n, :n]
    names = [drawable_name(activations.token_label(token)) for token in activations.tokens[:n]]
    picture = Picture(
        "causal-mask", label, lambda colours: draw_weights_map(weights, names, colours)
    )
    return answer.with_measurement(paragraph, context.model_files, pictures=(picture,))


def _measure_mask(activations: ExcerptActivations, vocab_size: int) -> str:
    """A paragraph on how far another last token moves the logits of the earlier positions."""
    T, visible = len(activations.tokens), np.isfinite(activations.scores)
    changed_tokens = activations.tokens.copy()
    changed_tokens[-1] = (changed_tokens[-1] + 1) % vocab_size
    changes = np.abs(activations.compute_logits(changed_tokens) - activations.logits).max(-1)
    earlier = float(changes[:-1].max(initial=0.0))
    return (
        f"Measured on {T} tokens of the validation text: with another last token, the logits of "
        f"the {plural(T - 1, 'position')} before it move by "
        f"{earlier if earlier == 0 else f'{earlier:.1e} (rounding)'} at most, and those of its "
        f"own place by up to {changes[-1]:.3g}. The hidden weights sum to "
        f"{float(activations.weights[~visible].sum())}."
    )


def drawable_name(name: str) -> str:
    """A token's name if it is ASCII, which every font has, otherwise an empty string."""
    return name if name.strip("“”").replace("␣", "").replace("↵", "").isascii() else ""


def draw_weights_map(weights: Array, names: list[str], colours: Palette) -> Figure:
    """Draw weights (n, n) as a map with their numbers; NaN marks a hidden weight."""
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
    axes.set_xlabel("key token", color=colours.ink)
    axes.set_ylabel("query token", color=colours.ink)
    return figure


# -- all heads, in pseudocode ----------------------------------------------------------------------


def explain_heads(question: Question, context: RunContext) -> Answer:
    """The pseudocode of one attention block of this model, with shapes and weights."""
    c, last = context.config, context.config.n_layers - 1
    others = {0: "", 1: "; block 1 is like it"}.get(last, f"; blocks 1 to {last} are like it")
    text = (
        "All heads are computed side by side, as one array with an axis for the heads. The table "
        "shows this line by line. q, k, v and output of one block have "
        f"{question.number:,.0f} weights.",
        f"This is block 0 of this model over a text of {c.block_size:,} tokens{others}. i is the "
        "position of the query, j that of the key; @ is the matrix product, h one of "
        f"{plural(c.n_heads, 'head')}.",
    )
    lines = [
        (line, line_shape, _list_weights(context.table, *parts))
        for line, line_shape, *parts in pseudocode_lines(c)
    ]
    sources = [CONFIGURATION]
    if context.activations:
        sources += [("a file with these weights", context.model_files[0][1])]
    return Answer(question, text, ("line", "shape", "weights"), tuple(lines), (), tuple(sources))


def pseudocode_lines(c: ModelConfig) -> list[tuple[str, ...]]:
    """Lines of block 0's attention: code, shape, parameter-table parts."""
    H, K, T, Q, D = c.n_heads, c.n_kv_heads, c.block_size, c.head_size, c.d_model
    pre = c.norm_position == "pre" and c.norm != "none"
    normalize = "rms_norm" if c.norm == "rmsnorm" else "layer_norm"
    input_name = "n" if pre else "x"
    plus = " + b" if c.bias else ""
    lines: list[tuple[str, ...]] = [("x = the residual stream", format_shape(T, D))]
    if pre:
        lines += [(f"n = {normalize}(x)", format_shape(T, D), "attention_norm")]
    for name, count, bias in (("q", H, plus), ("k", K, ""), ("v", K, plus)):
        product = f"{input_name} @ W{name}ᵀ{_adapter_term(c, name, input_name)}{bias}"
        line = f"{name} = split({product}, {plural(count, 'head')})"
        lines += [(line, format_shape(count, T, Q), f"attention.{name}")]
    query_key_shapes = f"{format_shape(H, T, Q)}, {format_shape(K, T, Q)}"
    if c.qk_norm:
        norms = ("attention.q_norm", "attention.k_norm")
        lines += [("q, k = rms_norm(q), rms_norm(k)", query_key_shapes, *norms)]
    if c.position == "rope":
        lines += [("q, k = rope(q), rope(k)", query_key_shapes)]
    kv_head = "h" if K == H else f"h // {H // K}"
    lines += [(f"s[h] = q[h] @ k[{kv_head}]ᵀ / sqrt({Q})", format_shape(H, T, T))]
    if c.position == "alibi":
        lines += [
            (f"s[h, i, j] = s[h, i, j] - 2^(-8 (h + 1) / {H}) (i - j)", format_shape(H, T, T))
        ]
    window = f" or j <= i - {c.window}" if 0 < c.window < T else ""
    output = f"concat(m) @ Woᵀ{_adapter_term(c, 'o', 'concat(m)')}{plus}"
    lines += [
        (f"s[h, i, j] = -inf where j > i{window}", format_shape(H, T, T)),
        ("p = softmax(s) over j", format_shape(H, T, T)),
        (f"m[h] = p[h] @ v[{kv_head}]", format_shape(H, T, Q)),
        (f"y = {output}", format_shape(T, D), "attention.o"),
    ]
    if pre or c.norm == "none":
        return [*lines, ("x = x + y", format_shape(T, D))]
    return [*lines, (f"x = {normalize}(x + y)", format_shape(T, D), "attention_norm")]


def _adapter_term(c: ModelConfig, matrix: str, input_name: str) -> str:
    """The LoRA term of a matrix that is applied to this input; empty without an adapter."""
    return (
        f" + {c.lora_alpha / c.lora_rank:g} ({input_name} @ Aᵀ) @ Bᵀ"
        if c.lora_rank and matrix in c.adapted_matrices
        else ""
    )


def _list_weights(table: ParameterTable, *parts: str) -> str:
    """The parameter names of these parts of block 0, with their shapes."""
    prefixes = tuple(f"blocks.0.{part}." for part in parts)
    return ", ".join(
        f"{name} {format_shape(*row.shape)}"
        for name, row in table.items()
        if name.startswith(prefixes)
    )
