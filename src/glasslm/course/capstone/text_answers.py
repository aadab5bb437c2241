"""Answers about text: BPE's first merges, compression, top-k against top-p, model families.

V vocabulary, T positions, B texts, n tokens of a context.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glasslm.course.capstone.questions import BYTE_TOKENS, Answer, Question
from glasslm.course.capstone.run_context import (
    CONFIGURATION,
    METRICS,
    TOKENIZER,
    ExcerptActivations,
    RunContext,
    bytes_label,
)
from glasslm.data import tokenizers
from glasslm.data.baselines import explain_baseline_text, simple_baselines
from glasslm.data.tokenizers import SubwordTokenizer
from glasslm.inference.sampling import Sampling, probabilities
from glasslm.lab.diagnosis.measurements import entropy
from glasslm.report.data_checks import decode_bytes
from glasslm.report.figures import Palette, add_legend, style_axes
from glasslm.report.page import Picture
from glasslm.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

SHOWN_MERGES = 8
MERGE_SAMPLE_BYTES = 200_000  # of the training text, in which merges are counted
EXCERPT_CHARS = 60  # of the text that is shown as tokens
MAX_PACKED_BYTES = 2_000_000  # of the validation text, for gzip
TOP_K, TOP_P = 10, 0.9
SHOWN_CONTEXT_TOKENS = 12
SHOWN_LIKELIEST_TOKENS = 4


# -- BPE -------------------------------------------------------------------------------------------


def explain_bpe(question: Question, context: RunContext) -> Answer:
    """The rule of BPE, and its first merges on this run's own text with the saving of each."""
    rule = (
        "Begin with the 256 bytes. Count every pair of neighbours in the text, join the commonest "
        "pair into a new token wherever it occurs, and count again (arXiv:1508.07909; on bytes as "
        "in GPT-2, which joins nothing across the ends of words). Each merge adds one token, so "
        f"{question.number:,.0f} merges are needed here."
    )
    answer = Answer(question, (rule,), sources=(TOKENIZER,))
    own, text = _bpe_tokenizer(context), _training_sample(context)
    if not text and own is None:
        return answer.with_reason(
            "The merges of its text cannot be shown: the cache no longer has the training text."
        )
    tokenizer = own or tokenizers.train_bpe([text], BYTE_TOKENS + SHOWN_MERGES)
    origin = (
        f"The first merges of this run's own tokenizer, of {len(own.merges):,}"
        if own
        else f"This run's tokenizer ({context.run.tokenizer.kind}) has no such merges, so these "
        "were computed for this answer"
    )
    if not tokenizer.merges:
        return answer.with_reason(
            "No pair occurs twice in its training text, so there is nothing to join."
        )
    if not text:
        rows = tuple(
            (str(i), *_show_merge(pair))
            for i, pair in enumerate(tokenizer.merges[:SHOWN_MERGES], 1)
        )
        paragraph = f"{origin}. The cache no longer has the training text to count them in."
        header = ("merge", "joins", "token")
        return Answer(question, (rule, paragraph), header, rows, (), (TOKENIZER,))
    return _count_merges(answer, tokenizer, text, origin, is_own=own is not None)


def _count_merges(
    answer: Answer, tokenizer: SubwordTokenizer, text: str, origin: str, is_own: bool
) -> Answer:
    """The answer with the first merges and the number of tokens of the text after each."""
    merges = tokenizer.merges[:SHOWN_MERGES]
    lengths = [len(_keep_merges(tokenizer, i).encode(text)) for i in range(len(merges) + 1)]
    size = len(text.encode())
    rows = tuple(
        (
            str(i),
            *_show_merge(pair),
            f"{lengths[i - 1] - lengths[i]:,}",
            f"{lengths[i]:,}",
            f"{size / lengths[i]:.3f}",
        )
        for i, pair in enumerate(merges, 1)
    )
    shortened = _keep_merges(tokenizer, len(rows))
    excerpt_tokens = shortened.encode(text[:EXCERPT_CHARS])
    excerpt = " ".join(bytes_label(shortened.token_bytes[token]) for token in excerpt_tokens)
    paragraphs = [
        f"{origin}, counted in the first {size:,} bytes of its training text, which are "
        f"{lengths[0]:,} tokens before the merges.",
        f"The beginning of the text after these merges: {excerpt}",
    ]
    if is_own:
        bytes_per_token = size / len(tokenizer.encode(text))
        paragraphs += [
            f"All {len(tokenizer.merges):,} merges together give {bytes_per_token:.3f} bytes per "
            "token."
        ]
    header = ("merge", "joins", "token", "pairs joined", "tokens left", "bytes per token")
    sources = (*answer.sources, ("the text's hash", "run.json"))
    return Answer(answer.question, (*answer.text, *paragraphs), header, rows, (), sources)


def _bpe_tokenizer(context: RunContext) -> SubwordTokenizer | None:
    """The run's tokenizer if it is byte-level BPE."""
    tokenizer = context.run.tokenizer
    return (
        tokenizer
        if isinstance(tokenizer, SubwordTokenizer) and tokenizer.kind in ("bpe", "gpt2")
        else None
    )


def _training_sample(context: RunContext) -> str:
    """The beginning of the training text; empty when the cache no longer has it."""
    if context.dataset is None:
        return ""
    tokens = context.dataset.train.tokens[:MERGE_SAMPLE_BYTES]
    sample = decode_bytes(tokens, context.dataset.tokenizer, MERGE_SAMPLE_BYTES)
    return sample.decode("utf-8", "ignore")  # the last character may be incomplete


def _show_merge(pair: tuple[bytes, bytes]) -> tuple[str, str]:
    """The two cells of a merge: its pair, and the token that it makes."""
    return f"{bytes_label(pair[0])} + {bytes_label(pair[1])}", bytes_label(pair[0] + pair[1])


def _keep_merges(tokenizer: SubwordTokenizer, count: int) -> SubwordTokenizer:
    """The tokenizer with its first merges only."""
    fields = json.loads(tokenizer.to_json())
    fields["model"]["merges"] = fields["model"]["merges"][:count]
    return SubwordTokenizer(json.dumps(fields))


# -- compression -----------------------------------------------------------------------------------


def explain_compression(question: Question, context: RunContext) -> Answer:
    """Bytes per token, bits per byte, and the size of the validation text in each encoding."""
    data, V, best = context.run.record.get("data", {}), context.vocab_size, context.best
    bits = question.number or 0.0
    first = (
        "A tokenizer writes the same text in fewer symbols of a larger alphabet. A model then "
        "spends few bits on tokens that it expects: -log2 p for a token of probability p. Without "
        f"any knowledge all {V:,} tokens are equally likely: log2 {V:,} = {bits:.4f} bits per "
        "token."
    )
    answer = Answer(question, (first,), sources=(CONFIGURATION,))
    if not data.get("val_bytes") or not data.get("val_tokens"):
        return answer.with_reason("run.json does not record the length of its text.")
    size, bytes_per_token = data["val_bytes"], data["val_bytes"] / data["val_tokens"]
    paragraphs = [
        f"This tokenizer takes {bytes_per_token:.3f} bytes of the validation text into a token, so "
        f"a byte costs {bits / bytes_per_token:.3f} bits without a model."
    ]
    encodings = [
        ("as it is", 8.0),
        (f"by tokens, all {V:,} equally likely", bits / bytes_per_token),
    ]
    if context.dataset is not None and size:
        text = decode_bytes(context.dataset.val.tokens, context.dataset.tokenizer, MAX_PACKED_BYTES)
        baselines = simple_baselines(text)
        encodings += [
            ("by single bytes and their frequencies", baselines["unigram_bpb"]),
            ("gzip", baselines["gzip_bpb"]),
        ]
        paragraphs += filter(None, [explain_baseline_text(context.dataset.tokenizer)])
    sources = [CONFIGURATION]
    loss, bpb = (best["loss"], best.get("bpb")) if best is not None else (None, None)
    if best is not None and loss is not None and bpb is not None:
        encodings += [(f"by this model, at step {best['step']:,}", float(bpb))]
        paragraphs += [
            f"The model spends {loss / math.log(2):.4f} bits per token "
            f"({loss:.4f} nats), that is {bpb:.4f} bits per byte. An arithmetic "
            "coder with its probabilities would write the text in "
            f"{bpb / 8:.1%} of its size, the weights not counted."
        ]
        sources += [METRICS]
    else:
        paragraphs += ["No finite validation loss was recorded, so the model's saving is unknown."]
    rows = tuple((name, f"{rate:.4f}", f"{rate * size / 8:,.0f}") for name, rate in encodings)
    header = ("the validation text", "bits per byte", "bytes")
    return Answer(question, (first, *paragraphs), header, rows, (), tuple(sources))


# -- top-k and top-p -------------------------------------------------------------------------------


def explain_sampling(question: Question, context: RunContext) -> Answer:
    """How many tokens top-k and top-p keep where the model is surest and least sure."""
    first = (
        "Top-p. Top-k (arXiv:1805.04833) keeps k tokens everywhere. Top-p (arXiv:1904.09751) keeps "
        "the likeliest tokens that together have the probability p: one token where the model is "
        "sure, many where it is not. A fixed k is too large in the first case and admits nonsense; "
        "it may be too small in the second and makes dull text."
    )
    answer = Answer(question, (first,))
    if context.activations is None:
        return answer.with_reason(context.missing)
    activations = context.activations
    entropies = entropy(probabilities(activations.logits, Sampling(temperature=1.0)))
    start = min(SHOWN_CONTEXT_TOKENS, len(activations.tokens)) - 1  # leaves a context to show
    places = {
        "sure": start + int(entropies[start:].argmin()),
        "unsure": start + int(entropies[start:].argmax()),
    }
    sure, unsure = (_count_kept(activations.logits[place]) for place in places.values())
    names = (
        f"top-k {TOP_K} keeps",
        "with the probability",
        f"top-p {TOP_P} keeps",
        "with the probability",
    )
    rows = (
        ("after", *(_show_context(activations, place) for place in places.values())),
        ("the likeliest", *(_show_likeliest(activations, place) for place in places.values())),
        ("entropy", *(f"{entropies[place] / math.log(2):.2f} bits" for place in places.values())),
        *zip(names, sure, unsure),
    )
    header = ("", "where it is surest", "where it is least sure")
    paragraph = (
        f"In {len(activations.tokens)} tokens of the validation text, at temperature 1: top-p "
        f"{TOP_P} keeps {sure[2]} of {context.vocab_size:,} tokens where this model is surest and "
        f"{unsure[2]} where it is least sure. Top-k {TOP_K} keeps {sure[0]} and {unsure[0]}, with "
        f"{sure[1]} and {unsure[1]} of the probability."
    )
    picture = _cumulative_picture(activations, places)
    return Answer(question, (first, paragraph), header, rows, (picture,), context.model_files)


def _cumulative_picture(activations: ExcerptActivations, places: dict[str, int]) -> Picture:
    curves = {
        kind: np.sort(probabilities(activations.logits[place], Sampling(temperature=1.0)))[::-1]
        for kind, place in places.items()
    }
    label = (
        "The cumulative probability of the tokens, the likeliest first, where the model is surest "
        f"and where it is least sure; dashed: top-k {TOP_K}, dotted: top-p {TOP_P}"
    )
    return Picture("top-k-top-p", label, lambda colours: draw_cumulative(curves, colours))


def _show_context(activations: ExcerptActivations, place: int) -> str:
    """The tokens up to this place, quoted as one text."""
    tokens = activations.tokens[max(0, place + 1 - SHOWN_CONTEXT_TOKENS) : place + 1]
    token_bytes = activations.model.tokenizer.token_bytes
    return bytes_label(b"".join(token_bytes[token] for token in tokens))


def _show_likeliest(activations: ExcerptActivations, place: int) -> str:
    """The likeliest tokens after this place, with their probabilities."""
    p = probabilities(activations.logits[place], Sampling(temperature=1.0))
    likeliest = np.argsort(-p, kind="stable")[:SHOWN_LIKELIEST_TOKENS]
    return ", ".join(f"{activations.token_label(token)} {p[token]:.1%}" for token in likeliest)


def _count_kept(logits: Array) -> tuple[str, str, str, str]:
    """The number of tokens and their probability, for top-k and for top-p.

    logits: (V,).
    """
    p = probabilities(logits, Sampling(temperature=1.0))
    masks = [
        probabilities(logits, Sampling(1.0, top_k=k, top_p=top_p)) > 0
        for k, top_p in ((TOP_K, 1.0), (0, TOP_P))
    ]
    by_k, by_p = ((f"{int(mask.sum()):,}", f"{float(p[mask].sum()):.1%}") for mask in masks)
    return *by_k, *by_p


def draw_cumulative(curves: dict[str, NDArray[np.float64]], colours: Palette) -> Figure:
    """Draw the cumulative sum of each distribution (V,), which is sorted in descending order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "Cumulative probability of the likeliest tokens", "probability", colours)
    for (kind, p), hue in zip(curves.items(), (colours.train, colours.validation)):
        axes.plot(
            np.arange(1, len(p) + 1),
            np.cumsum(p),
            color=hue,
            linewidth=1.8,
            label=f"where it is {kind}",
        )
    axes.axvline(TOP_K, color=colours.ink, linestyle="--", linewidth=1, label=f"top-k {TOP_K}")
    axes.axhline(TOP_P, color=colours.ink, linestyle=":", linewidth=1.2, label=f"top-p {TOP_P}")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("tokens kept, the likeliest first", color=colours.ink)
    add_legend(axes, colours)
    return figure


# -- families --------------------------------------------------------------------------------------


def explain_families(question: Question, context: RunContext) -> Answer:
    """GPT, BERT and T5 by four properties, and this model by its own numbers."""
    T = context.config.block_size
    visible = T * (T + 1) // 2
    text = (
        "GPT sees the tokens before a position and predicts the next one, so it writes. BERT sees "
        "both sides and fills in hidden tokens, so it reads. T5 has one of each: an encoder that "
        "reads and a decoder that writes. This model is a small GPT.",
        f"Of a text as long as its context, {T:,} tokens, GPT's mask shows {visible:,} of "
        f"{T * T:,} pairs, and every token is a prediction to learn from; BERT's shows all "
        f"{T * T:,}, and about {0.15 * T:.0f} tokens (15%) are predicted.",
    )
    header = ("model", "attention mask", "objective", "direction", "use")
    return Answer(question, text, header, _family_rows(context), (), (CONFIGURATION,))


def _family_rows(context: RunContext) -> tuple[tuple[str, ...], ...]:
    c, T = context.config, context.config.block_size
    visible_tokens = (
        f"itself and the {c.window - 1} before it"
        if 0 < c.window < T
        else "itself and those before it"
    )
    return (
        (
            "GPT (Radford et al. 2018)",
            "causal: a token sees itself and those before it",
            "the next token, at every position",
            "left to right",
            "writing; with a prompt, any task that can be put as writing",
        ),
        (
            "BERT (arXiv:1810.04805)",
            "none: all see all",
            "15% of the tokens, most of them masked",
            "both sides at once",
            "classifying, finding, comparing texts",
        ),
        (
            "T5 (arXiv:1910.10683)",
            "encoder: none; decoder: causal, and all of the encoder",
            "the spans that were removed",
            "reads both sides, writes left to right",
            "translating, summarizing, answering",
        ),
        (
            f"this model: {plural(c.n_layers, 'layer')}, width {c.d_model}",
            f"causal: a token sees {visible_tokens}",
            f"the next token, at all {T:,} positions",
            "left to right",
            f"writing with {context.vocab_size:,} tokens",
        ),
    )
