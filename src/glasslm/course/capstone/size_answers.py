"""Answers about sizes: the KV cache, Chinchilla's tokens, what tying saves, the shapes of a forward pass.

V vocabulary, D width, L layers, H heads, K key-value heads, Q head size, F inner width, B texts,
T positions.
"""

from __future__ import annotations

import dataclasses
import math

from glasslm.config.schema import ModelConfig
from glasslm.course.capstone.questions import Answer, Question, plural, shape, size_of
from glasslm.course.capstone.run_context import CONFIGURATION, METRICS, Specimen
from glasslm.engines.memory_estimate import PRECISION_BYTES, cache_bytes, cache_numbers
from glasslm.lab.scaling.plan import plan
from glasslm.model import flops
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.text import size

FAR = 1_000  # tokens, for which courses ask
GPT2_VOCABULARY = 50_257


def kv_cache(question: Question, of: Specimen) -> Answer:
    """What is kept, its factors, and bytes by length and precision."""
    c, T = of.config, of.config.block_size
    numbers = cache_numbers(c, 1, T)
    factors = " x ".join(f"{many:,} ({name})" for name, many in numbers.items() if name != "texts")
    each = cache_bytes(c, 1, 1, PRECISION_BYTES["fp32"])
    total = of.rows.total
    held = math.ceil(total * PRECISION_BYTES["fp32"] / each)
    text = [
        "The keys and the values of every token that was read, of every layer, so that a new token computes only its "
        f"own and looks at the others'. Here {factors} = {math.prod(numbers.values()):,} numbers; in float32, of 4 "
        f"bytes, {question.number:,.0f} bytes. Courses write 2 L n d numbers: so many where every head keeps its own.",
        f"A token more takes {each:,} bytes. "
        + (
            f"But attention sees the newest {c.window} only, and the model rolls: its cache never grows beyond them."
            if c.rolling
            else f"With {held:,} tokens the cache of one text would be as large as the {total:,} weights themselves."
        ),
    ]
    if c.n_kv_heads < c.n_heads:
        text += [f"{c.n_heads} heads share the keys and values of {c.n_kv_heads} (arXiv:2305.13245), which takes "
                 f"{c.n_kv_heads / c.n_heads:.3g} of the memory of one for each."]  # fmt: skip
    rows = []
    for n, remark in sorted(
        {1: "", T: "its context", FAR: f"{'beyond' if T < FAR else 'within'} its context"}.items()
    ):
        what = f"{n:,}" + (f", {remark}" if remark and n != 1 else "")
        rows += [(what, f"{math.prod(cache_numbers(c, 1, n).values()):,}", *_by_precision(c, n))]
    if c.n_kv_heads < c.n_heads:
        every = dataclasses.replace(c, n_kv_heads=c.n_heads)
        rows += [(f"{T:,}, if each head kept its own", f"{math.prod(cache_numbers(every, 1, T).values()):,}",
                  *_by_precision(every, T))]  # fmt: skip
    header = ("tokens", "numbers", "bytes in float32", "bytes in float16")
    return Answer(question, tuple(text), header, tuple(rows), sources=(CONFIGURATION,))


def _by_precision(c: ModelConfig, n: int) -> tuple[str, ...]:
    return tuple(f"{cache_bytes(c, 1, n, PRECISION_BYTES[which]):,}" for which in ("fp32", "fp16"))


# -- Chinchilla -------------------------------------------------------------------------------------------------------


def chinchilla(question: Question, of: Specimen) -> Answer:
    """The rule for this size, what this run saw, its compute by rule and counted, and what follows."""
    counted, data = of.rows.counts(), of.run.record.get("data", {})
    N = counted["total"]
    wanted = question.number or 0.0
    text = [
        f"About 20 tokens for each parameter: 20 x {N:,} = {wanted:,.0f} tokens. Hoffmann et al. (arXiv:2203.15556) "
        "found that for the least loss at a given compute, parameters and tokens should grow alike; their optima lie "
        "near 20 tokens a parameter. C = 6 N D is the compute of D tokens (arXiv:2001.08361, section 2.1).",
    ]
    D = max(
        (line.get("tokens") or 0 for line in of.run.metrics() if line["kind"] == "step"), default=0
    )
    answer = Answer(question, tuple(text), sources=(CONFIGURATION, METRICS))
    if not D:
        return dataclasses.replace(answer, sources=(CONFIGURATION,)).without(
            "This run has not logged a step yet."
        )
    C = flops.course_flops(counted["active"], D)
    exact = flops.flops_per_token(of.config, of.vocab_size) * D
    best = plan(C).rule
    unique = data.get("train_tokens")
    passes = f", {D / unique:.3g} times its text of {unique:,}" if unique else ""
    computing = (
        f", with the {counted['active']:,} that compute a token" if of.config.n_experts else ""
    )
    rows = [
        ("tokens by the rule", f"{wanted:,.0f}"),
        ("tokens that this run trained on", f"{D:,}{passes}"),
        ("tokens a parameter", f"{D / N:.3g}"),
        ("C = 6 N D", f"{C:.3g} FLOPs{computing}"),
        ("counted exactly", f"{exact:.3g} FLOPs: every product that is computed, those of attention included"),
        ("the same C by the rule", f"{best.N:,.0f} parameters on {best.D:,.0f} tokens"),
    ]  # fmt: skip
    told = [_verdict(D, wanted, best.N), *_doubts(of, wanted, unique)]
    return dataclasses.replace(answer, text=(*text, *told), rows=tuple(rows))


def _verdict(D: float, wanted: float, best_N: float) -> str:
    share = D / wanted
    if 0.8 <= share <= 1.25:
        return (
            f"This run saw {share:.0%} of that: size and tokens are in the proportion of the rule."
        )
    if share < 1:
        return (
            f"This run saw {share:.1%} of that: by the rule its model is too large for its compute, and one of "
            f"{best_N:,.0f} parameters on more tokens would reach less loss."
        )
    return (
        f"This run saw {share:.3g} times that: by the rule a model of {best_N:,.0f} parameters on fewer tokens would "
        "reach less loss for the same compute; the smaller one is cheaper to use."
    )


def _doubts(of: Specimen, wanted: float, unique: int | None) -> list[str]:
    told = (
        "The rule comes from models of 70 million parameters and more. What holds at this size is measured by the "
        "scaling study."
    )
    if unique and wanted > unique:
        told += f" And the text has {unique:,} tokens: {wanted / unique:.3g} passes over it are not that many fresh tokens."
    if of.run.config.train.init_from:
        told += " The weights came from another run, whose tokens are not counted here."
    return [told]


# -- tying ------------------------------------------------------------------------------------------------------------


def tying(question: Question, of: Specimen) -> Answer:
    """The matrix that is there once or twice, counted both ways, at this vocabulary and at GPT-2's."""
    c, V, D = of.config, of.vocab_size, of.config.d_model
    here, large = _both(c, V), _both(c, GPT2_VOCABULARY)
    does = "ties them" if c.tie_embeddings else "does not tie them"
    text = (
        "It makes one matrix both look tokens up and score them, so that similar tokens are alike on the way in and on "
        f"the way out (arXiv:1608.05859), and saves V x d = {V:,} x {D} = {question.number:,.0f} parameters. That is "
        f"{(here[1] - here[0]) / here[1]:.1%} of the {here[1]:,} that this model has untied; it {does}.",
        "Its gradient is a sum of two: the rows of the tokens that were read, and all rows, as each is scored at every "
        f"place. With GPT-2's {GPT2_VOCABULARY:,} tokens it would save {(large[1] - large[0]) / large[1]:.1%}: how "
        "much tying saves is a matter of the vocabulary.",
    )
    rows = [(f"{v:,}", *(f"{n:,}" for n in both), f"{both[1] - both[0]:,}", f"{(both[1] - both[0]) / both[1]:.1%}")
            for v, both in ((V, here), (GPT2_VOCABULARY, large))]  # fmt: skip
    header = ("vocabulary", "parameters, tied", "untied", "saved", "share of the untied")
    return Answer(question, text, header, tuple(rows), sources=(CONFIGURATION,))


def _both(c: ModelConfig, V: int) -> tuple[int, int]:
    """Parameters with and without tying."""
    tied, untied = (
        parameter_table(dataclasses.replace(c, tie_embeddings=which), V).total
        for which in (True, False)
    )
    return tied, untied


# -- the forward pass -------------------------------------------------------------------------------------------------


def forward_pass(question: Question, of: Specimen) -> Answer:
    """Stage by stage: what it computes, the shape it gives, the parameters it has; they sum up to all."""
    c, rows, V, B, T = (
        of.config,
        of.rows,
        of.vocab_size,
        of.run.config.train.batch_size,
        of.config.block_size,
    )
    stream = shape(B, T, c.d_model)
    normed = c.norm_position == "pre" and c.norm != "none"
    head = f"logits = {'n' if normed else 'x'} @ {'Eᵀ, of the embedding' if c.tie_embeddings else 'Wᵀ'}"
    stages = [
        ("tokens", "numbers of tokens", shape(B, T), 0),
        (
            "embedding",
            "x = E[tokens]" + " x sqrt(d)" * c.scale_embeddings,
            stream,
            size_of(rows, "embedding."),
        ),
    ]
    if c.position in ("learned", "sinusoidal"):
        stages += [(f"{c.position} positions", "x = x + P", stream, size_of(rows, "position."))]
    stages += _block(c, rows, B, T)
    if c.n_layers > 1:
        others = size_of(rows, "blocks.") - size_of(rows, "blocks.0.")
        again = "block 1" if c.n_layers == 2 else f"blocks 1 to {c.n_layers - 1}"
        stages += [(again, "the same again", stream, others)]
    if normed:
        stages += [("norm", f"n = {c.norm}(x)", stream, size_of(rows, "norm."))]
    stages += [
        ("head", head, shape(B, T, V), size_of(rows, "head.")),
        (
            "loss",
            "the mean of -ln softmax(logits)[the next token]",
            f"{shape(B, T)}, then one number",
            0,
        ),
    ]
    total = sum(parameters for *_, parameters in stages)
    text = (
        f"From tokens {shape(B, T)} to logits {shape(B, T, V)}, which are {question.number:,.0f} numbers: between the "
        f"two runs the residual stream, {stream}, to which each sublayer adds.",
        f"With {plural(c.n_layers, 'block')} that is as below. The parameters of its stages sum up to the {total:,} of "
        "the model" + (", of which one matrix serves twice." if c.tie_embeddings else "."),
        f"The logits of a batch are {size(question.number * 4 if question.number else 0)} in float32.",
    )
    lines = [(*words, f"{parameters:,}" if parameters else "") for *words, parameters in stages]
    return Answer(
        question, text, ("stage", "computes", "shape", "parameters"),
        (*map(tuple, lines), ("all", "", "", f"{total:,}")), sources=(CONFIGURATION,),
    )  # fmt: skip


def _block(c: ModelConfig, rows: ParameterTable, B: int, T: int) -> list[tuple[str, str, str, int]]:
    """The stages of block 0."""
    stream, H, K, Q = shape(B, T, c.d_model), c.n_heads, c.n_kv_heads, c.head_size
    pre = c.norm_position == "pre"
    n = "n" if pre and c.norm != "none" else "x"

    def norm(which: str) -> list[tuple[str, str, str, int]]:
        computes = f"n = {c.norm}(x)" if pre else f"x = {c.norm}(x)"
        return (
            [(f"block 0: {which}", computes, stream, size_of(rows, f"blocks.0.{which}."))]
            if c.norm != "none"
            else []
        )

    into = [f"blocks.0.attention.{name}" for name in "qkv"]
    turned = {"rope": ", turned by rope"}.get(c.position, "")
    attention = [
        ("block 0: q, k, v", f"{n} @ Wᵀ, cut into heads{turned}", f"{shape(B, H, T, Q)}, 2 of {shape(B, K, T, Q)}",
         size_of(rows, *into)),
        ("block 0: weights", f"softmax(q kᵀ / sqrt({Q}), causal)", shape(B, H, T, T), 0),
        ("block 0: output", "x = x + concat(weights v) @ Wᵀ", stream, size_of(rows, "blocks.0.attention.o.")),
    ]  # fmt: skip
    feed = _feedforward(c, rows, n, B, T)
    norms = norm("attention_norm"), norm("feedforward_norm")
    if pre:
        return [*norms[0], *attention, *norms[1], *feed]
    return [*attention, *norms[0], *feed, *norms[1]]


def _feedforward(
    c: ModelConfig, rows: ParameterTable, n: str, B: int, T: int
) -> list[tuple[str, str, str, int]]:
    stream, inner, whole = shape(B, T, c.d_model), shape(B, T, c.d_ff), "blocks.0.feedforward."
    activation = {"swiglu": "silu", "geglu": "gelu"}.get(c.feedforward, c.feedforward)
    computes = f"{activation}({n} @ Wgᵀ) * ({n} @ Wuᵀ)" if c.gated else f"{activation}({n} @ Wuᵀ)"
    if not c.n_experts:
        down = size_of(rows, f"{whole}down.")
        return [
            ("block 0: feed-forward", f"u = {computes}", inner, size_of(rows, whole) - down),
            ("block 0: down", "x = x + u @ Wᵀ", stream, down),
        ]
    router = size_of(rows, f"{whole}router.")
    shared = ", and one that computes all" * c.shared_expert
    return [
        ("block 0: router", f"r = {n} @ Wᵀ", shape(B, T, c.n_experts), router),
        ("block 0: experts", f"{c.experts_per_token} of {c.n_experts} for each token{shared}: ({computes}) @ Wᵀ", inner,
         size_of(rows, whole) - router),
        ("block 0: mixture", "x = x + their sum, weighted by the gates that r gives the chosen", stream, 0),
    ]  # fmt: skip
