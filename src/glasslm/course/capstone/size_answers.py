"""Answers about sizes: KV cache, Chinchilla's tokens, tied embeddings, shapes of a forward pass.

V vocabulary, D width, L layers, H heads, K key-value heads, Q head size, F inner width, B texts,
T positions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import assert_never

from glasslm.config.schema import ModelConfig
from glasslm.course.capstone.questions import (
    Answer,
    Question,
    count_parameters,
    format_shape,
)
from glasslm.course.capstone.run_context import CONFIGURATION, METRICS, RunContext
from glasslm.engines.memory_estimate import PRECISION_BYTES, cache_bytes, cache_numbers
from glasslm.lab.scaling.plan import plan_compute
from glasslm.model import flops
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.runs.metrics import step_lines
from glasslm.text import format_bytes, plural

COURSE_LENGTH = 1_000  # tokens; the cache size that courses ask for
GPT2_VOCABULARY = 50_257


def explain_kv_cache(question: Question, context: RunContext) -> Answer:
    """What the cache stores, and its bytes by length and precision."""
    c, T = context.config, context.config.block_size
    numbers = cache_numbers(c, 1, T)
    factors = " x ".join(
        f"{count:,} ({name})" for name, count in numbers.items() if name != "texts"
    )
    token_bytes = cache_bytes(c, 1, 1, PRECISION_BYTES["fp32"])
    total = context.table.total
    break_even = math.ceil(total * PRECISION_BYTES["fp32"] / token_bytes)
    text = [
        "It stores the keys and values of all tokens so far, in every layer, so that a new token "
        f"computes only its own. Here {factors} = {math.prod(numbers.values()):,} numbers; with 4 "
        f"bytes each in float32, {question.number:,.0f} bytes. Courses write 2 L n d numbers, "
        "which holds if every head has its own keys and values.",
        f"One more token takes {token_bytes:,} bytes. "
        + (
            f"But attention reads only the newest {c.window} tokens, and the cache of this model "
            "never stores more."
            if c.has_rolling_cache
            else f"With {break_even:,} tokens the cache of one text would be as large as all "
            f"{total:,} weights."
        ),
    ]
    if c.n_kv_heads < c.n_heads:
        text += [
            f"{c.n_heads} heads share the keys and values of {c.n_kv_heads} (arXiv:2305.13245), "
            f"which takes {c.n_kv_heads / c.n_heads:.3g} of the memory of separate ones."
        ]
    course_length = f"{'beyond' if T < COURSE_LENGTH else 'within'} its context"
    rows = []
    for n, remark in sorted({1: "", T: "its context", COURSE_LENGTH: course_length}.items()):
        label = f"{n:,}" + (f", {remark}" if remark and n != 1 else "")
        rows += [_cache_row(label, c, n)]
    if c.n_kv_heads < c.n_heads:
        separate = dataclasses.replace(c, n_kv_heads=c.n_heads)
        rows += [_cache_row(f"{T:,}, with separate keys for each head", separate, T)]
    header = ("tokens", "numbers", "bytes in float32", "bytes in float16")
    return Answer(question, tuple(text), header, tuple(rows), sources=(CONFIGURATION,))


def _cache_row(label: str, c: ModelConfig, n: int) -> tuple[str, ...]:
    """The numbers and bytes of the cache of one text of n tokens."""
    sizes = (cache_bytes(c, 1, n, PRECISION_BYTES[name]) for name in ("fp32", "fp16"))
    numbers = math.prod(cache_numbers(c, 1, n).values())
    return (label, f"{numbers:,}", *(f"{size:,}" for size in sizes))


# -- Chinchilla ------------------------------------------------------------------------------------


def explain_chinchilla(question: Question, context: RunContext) -> Answer:
    """The rule for this model, the tokens and compute of this run, and the conclusion."""
    counts, data = context.table.counts(), context.run.record.get("data", {})
    N = counts["total"]
    rule_tokens = question.number or 0.0
    text = [
        f"About 20 tokens for each parameter: 20 x {N:,} = {rule_tokens:,.0f} tokens. Hoffmann et "
        "al. (arXiv:2203.15556) found that parameters and tokens should grow in proportion for the "
        "lowest loss at a given compute; their optima are near 20 tokens per parameter. C = 6 N D "
        "is the compute of D tokens (arXiv:2001.08361, section 2.1).",
    ]
    D = max((line.get("tokens") or 0 for line in step_lines(context.run.metrics())), default=0)
    answer = Answer(question, tuple(text), sources=(CONFIGURATION, METRICS))
    if not D:
        answer = dataclasses.replace(answer, sources=(CONFIGURATION,))
        return answer.with_reason("This run has not logged a step yet.")
    C = flops.course_flops(counts["active"], D)
    counted_flops = flops.flops_per_token(context.config, context.vocab_size) * D
    best = plan_compute(C).rule
    text_tokens = data.get("train_tokens")
    passes = f", {D / text_tokens:.3g} times its text of {text_tokens:,}" if text_tokens else ""
    active = (
        f", with the {counts['active']:,} parameters that compute a token"
        if context.config.n_experts
        else ""
    )
    rows = [
        ("tokens by the rule", f"{rule_tokens:,.0f}"),
        ("tokens that this run trained on", f"{D:,}{passes}"),
        ("tokens per parameter", f"{D / N:.3g}"),
        ("C = 6 N D", f"{C:.3g} FLOPs{active}"),
        (
            "counted exactly",
            f"{counted_flops:.3g} FLOPs: all products, those of attention included",
        ),
        ("the same C by the rule", f"{best.N:,.0f} parameters on {best.D:,.0f} tokens"),
    ]
    conclusion = [
        _compare_with_rule(D, rule_tokens, best.N),
        _describe_limits(context, rule_tokens, text_tokens),
    ]
    return dataclasses.replace(answer, text=(*text, *conclusion), rows=tuple(rows))


def _compare_with_rule(D: float, rule_tokens: float, best_N: float) -> str:
    """A sentence about the tokens of the run, D, and those of the rule."""
    ratio = D / rule_tokens
    if 0.8 <= ratio <= 1.25:
        return f"This run trained on {ratio:.0%} of that: size and tokens follow the rule."
    if ratio < 1:
        return (
            f"This run trained on {ratio:.1%} of that: by the rule its model is too large for its "
            f"compute, and one of {best_N:,.0f} parameters on more tokens would reach a lower loss."
        )
    return (
        f"This run trained on {ratio:.3g} times that: by the rule a model of {best_N:,.0f} "
        "parameters on fewer tokens would reach a lower loss for the same compute. The smaller "
        "model is cheaper to use."
    )


def _describe_limits(context: RunContext, rule_tokens: float, text_tokens: int | None) -> str:
    """The limits of the rule for this run."""
    limits = (
        "The rule comes from models of 70 million parameters and more. The scaling study measures "
        "what holds at this size."
    )
    if text_tokens and rule_tokens > text_tokens:
        limits += (
            f" The text has {text_tokens:,} tokens: {rule_tokens / text_tokens:.3g} passes over it "
            "give less information than as many new tokens."
        )
    if context.run.config.train.init_from:
        limits += " The weights came from another run, whose tokens are not counted here."
    return limits


# -- tying -----------------------------------------------------------------------------------------


def explain_tying(question: Question, context: RunContext) -> Answer:
    """The parameters with one matrix and with two, at this vocabulary and at GPT-2's."""
    c, V, D = context.config, context.vocab_size, context.config.d_model
    (tied, untied), (large_tied, large_untied) = (
        _count_tied_and_untied(c, V),
        _count_tied_and_untied(c, GPT2_VOCABULARY),
    )
    verb = "ties them" if c.tie_embeddings else "does not tie them"
    text = (
        "One matrix both looks tokens up and scores them, so that similar tokens are similar as "
        "inputs and as outputs (arXiv:1608.05859). This saves V x d = "
        f"{V:,} x {D} = {question.number:,.0f} parameters, {(untied - tied) / untied:.1%} of the "
        f"{untied:,} that this model has untied; it {verb}.",
        "Its gradient is the sum of two: one for the rows of the input tokens, and one for all "
        "rows, because every token is scored at every position. With GPT-2's "
        f"{GPT2_VOCABULARY:,} tokens tying would save "
        f"{(large_untied - large_tied) / large_untied:.1%}: the saving depends on the vocabulary.",
    )
    rows = [
        (f"{v:,}", f"{one:,}", f"{two:,}", f"{two - one:,}", f"{(two - one) / two:.1%}")
        for v, one, two in ((V, tied, untied), (GPT2_VOCABULARY, large_tied, large_untied))
    ]
    header = ("vocabulary", "parameters, tied", "untied", "saved", "share of the untied")
    return Answer(question, text, header, tuple(rows), sources=(CONFIGURATION,))


def _count_tied_and_untied(c: ModelConfig, V: int) -> tuple[int, int]:
    """Parameters with and without tying, for a vocabulary of V."""
    tied, untied = (
        parameter_table(dataclasses.replace(c, tie_embeddings=is_tied), V).total
        for is_tied in (True, False)
    )
    return tied, untied


# -- the forward pass ------------------------------------------------------------------------------

Stage = tuple[str, str, str, int]  # name, what it computes, shape of the result, parameters


def explain_forward_pass(question: Question, context: RunContext) -> Answer:
    """All stages with formula, shape and parameters, which sum up to those of the model."""
    c, V = context.config, context.vocab_size
    B, T = context.run.config.train.batch_size, c.block_size
    stages = _list_stages(context, B, T)
    stream = format_shape(B, T, c.d_model)
    total = sum(parameters for *_, parameters in stages)
    text = (
        f"From tokens {format_shape(B, T)} to logits {format_shape(B, T, V)}, which are "
        f"{question.number:,.0f} numbers. Between them is the residual stream, {stream}, to which "
        "each sublayer adds.",
        f"The table shows {plural(c.n_layers, 'block')}. The parameters of the stages sum up to "
        f"the {total:,} of the model"
        + (", of which one matrix is used twice." if c.tie_embeddings else "."),
        f"The logits of a batch are {format_bytes(question.number * 4 if question.number else 0)} "
        "in float32.",
    )
    rows = [(*words, f"{parameters:,}" if parameters else "") for *words, parameters in stages]
    return Answer(
        question,
        text,
        ("stage", "computes", "shape", "parameters"),
        (*map(tuple, rows), ("all", "", "", f"{total:,}")),
        sources=(CONFIGURATION,),
    )


def _list_stages(context: RunContext, B: int, T: int) -> list[Stage]:
    c, table, V = context.config, context.table, context.vocab_size
    stream = format_shape(B, T, c.d_model)
    has_final_norm = c.norm_position == "pre" and c.norm != "none"
    matrix = "Eᵀ, of the embedding" if c.tie_embeddings else "Wᵀ"
    embedding = "x = E[tokens]" + " x sqrt(d)" * c.scale_embeddings
    stages: list[Stage] = [
        ("tokens", "ids of tokens", format_shape(B, T), 0),
        ("embedding", embedding, stream, count_parameters(table, "embedding.")),
    ]
    match c.position:
        case "learned" | "sinusoidal":
            parameters = count_parameters(table, "position.")
            stages += [(f"{c.position} positions", "x = x + P", stream, parameters)]
        case "none" | "rope" | "alibi":  # none, or within attention
            pass
        case _:
            assert_never(c.position)
    stages += _block_stages(c, table, B, T)
    if c.n_layers > 1:
        parameters = count_parameters(table, "blocks.") - count_parameters(table, "blocks.0.")
        name = "block 1" if c.n_layers == 2 else f"blocks 1 to {c.n_layers - 1}"
        stages += [(name, "as block 0", stream, parameters)]
    if has_final_norm:
        stages += [("norm", f"n = {c.norm}(x)", stream, count_parameters(table, "norm."))]
    head = f"logits = {'n' if has_final_norm else 'x'} @ {matrix}"
    loss = "the mean of -ln softmax(logits)[the next token]"
    return [
        *stages,
        ("head", head, format_shape(B, T, V), count_parameters(table, "head.")),
        ("loss", loss, f"{format_shape(B, T)}, then one number", 0),
    ]


def _block_stages(c: ModelConfig, table: ParameterTable, B: int, T: int) -> list[Stage]:
    """The stages of block 0."""
    stream, H, K, Q = format_shape(B, T, c.d_model), c.n_heads, c.n_kv_heads, c.head_size
    is_pre_norm = c.norm_position == "pre"
    n = "n" if is_pre_norm and c.norm != "none" else "x"

    def norm_stages(name: str) -> list[Stage]:
        if c.norm == "none":
            return []
        computes = f"n = {c.norm}(x)" if is_pre_norm else f"x = {c.norm}(x)"
        parameters = count_parameters(table, f"blocks.0.{name}.")
        return [(f"block 0: {name}", computes, stream, parameters)]

    input_matrices = [f"blocks.0.attention.{name}" for name in "qkv"]
    rotation = ", rotated by rope" if c.position == "rope" else ""
    attention: list[Stage] = [
        (
            "block 0: q, k, v",
            f"{n} @ Wᵀ, split into heads{rotation}",
            f"{format_shape(B, H, T, Q)}, 2 of {format_shape(B, K, T, Q)}",
            count_parameters(table, *input_matrices),
        ),
        ("block 0: weights", f"softmax(q kᵀ / sqrt({Q}), causal)", format_shape(B, H, T, T), 0),
        (
            "block 0: output",
            "x = x + concat(weights v) @ Wᵀ",
            stream,
            count_parameters(table, "blocks.0.attention.o."),
        ),
    ]
    feedforward = _feedforward_stages(c, table, n, B, T)
    attention_norm, feedforward_norm = (
        norm_stages("attention_norm"),
        norm_stages("feedforward_norm"),
    )
    if is_pre_norm:
        return [*attention_norm, *attention, *feedforward_norm, *feedforward]
    return [*attention, *attention_norm, *feedforward, *feedforward_norm]


def _feedforward_stages(
    c: ModelConfig, table: ParameterTable, n: str, B: int, T: int
) -> list[Stage]:
    """The stages of block 0's feed-forward, whose input is called n."""
    stream, inner = format_shape(B, T, c.d_model), format_shape(B, T, c.d_ff)
    prefix = "blocks.0.feedforward."
    activation = {"swiglu": "silu", "geglu": "gelu"}.get(c.feedforward, c.feedforward)
    computes = (
        f"{activation}({n} @ Wgᵀ) * ({n} @ Wuᵀ)" if c.is_gated else f"{activation}({n} @ Wuᵀ)"
    )
    if not c.n_experts:
        down = count_parameters(table, f"{prefix}down.")
        others = count_parameters(table, prefix) - down
        return [
            ("block 0: feed-forward", f"u = {computes}", inner, others),
            ("block 0: down", "x = x + u @ Wᵀ", stream, down),
        ]
    router = count_parameters(table, f"{prefix}router.")
    shared = ", and one for all tokens" * c.shared_expert
    return [
        ("block 0: router", f"r = {n} @ Wᵀ", format_shape(B, T, c.n_experts), router),
        (
            "block 0: experts",
            f"{c.experts_per_token} of {c.n_experts} for each token{shared}: ({computes}) @ Wᵀ",
            inner,
            count_parameters(table, prefix) - router,
        ),
        (
            "block 0: mixture",
            "x = x + their sum, weighted by the gates that r gives them",
            stream,
            0,
        ),
    ]
