"""Answers about text: BPE's first merges, compression, top-k against top-p, what order is without positions, families.

V vocabulary, T positions, B texts, n tokens of a context.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glasslm.course.capstone.about_attention import entropy
from glasslm.course.capstone.questions import BYTES, Answer, Question, plural
from glasslm.course.capstone.run_context import (
    CONFIGURATION,
    METRICS,
    TOKENIZER,
    Look,
    Specimen,
    named,
)
from glasslm.data import tokenizers
from glasslm.data.baselines import baselines
from glasslm.data.tokenizers import SubwordTokenizer
from glasslm.inference.sampling import Sampling, probabilities
from glasslm.report.data_checks import text_of
from glasslm.report.figures import Palette, dress, finish
from glasslm.report.page import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

MERGES = 8  # shown
SAMPLE, EXCERPT = (
    200_000,
    60,
)  # bytes of the training text that merges are counted in; characters that are cut up
PACKED = 2_000_000  # bytes of the validation text that gzip packs, at most
TOP_K, TOP_P = 10, 0.9
CONTEXT, NAMED = 12, 4  # tokens that are shown of a context, and likeliest ones after it


# -- BPE --------------------------------------------------------------------------------------------------------------


def bpe(question: Question, of: Specimen) -> Answer:
    """The rule, and its first merges on this run's own text, with what each of them saves."""
    said = (
        "Begin with the 256 bytes. Count every pair of neighbours in the text, join the commonest one into a new token "
        "wherever it stands, and count again (arXiv:1508.07909; on bytes, as GPT-2 does, which joins nothing across "
        f"the ends of words). Each merge is one token more, so that it takes {question.number:,.0f} here."
    )
    answer = Answer(question, (said,), sources=(TOKENIZER,))
    own, text = _own(of), _sample(of)
    if not text and own is None:
        return answer.without(
            "The merges of its text cannot be shown: the cache no longer has the training text."
        )
    tokenizer = own or tokenizers.train_bpe([text], BYTES + MERGES)
    whose = (
        f"The first merges of this run's own tokenizer, of {len(own.merges):,}"
        if own
        else f"This run's tokenizer ({of.run.tokenizer.kind}) has no such merges, so these were made for the answer"
    )
    if not tokenizer.merges:
        return answer.without(
            "No pair of its training text stands there twice, so that nothing is joined."
        )
    if not text:
        listed = tuple(
            (str(i), *_joined(pair)) for i, pair in enumerate(tokenizer.merges[:MERGES], 1)
        )
        counts = "The cache no longer has the training text to count them in."
        return Answer(
            question,
            (said, f"{whose}. {counts}"),
            ("merge", "joins", "token"),
            listed,
            (),
            (TOKENIZER,),
        )
    lengths = [
        len(_with_merges(tokenizer, i).encode(text))
        for i in range(min(MERGES, len(tokenizer.merges)) + 1)
    ]
    size = len(text.encode())
    rows = tuple(
        (
            str(i),
            *_joined(pair),
            f"{lengths[i - 1] - lengths[i]:,}",
            f"{lengths[i]:,}",
            f"{size / lengths[i]:.3f}",
        )
        for i, pair in enumerate(tokenizer.merges[: len(lengths) - 1], 1)
    )
    told = [
        f"{whose}, counted in the first {size:,} bytes of its training text, which are {lengths[0]:,} tokens before."
    ]
    opening, last = text[:EXCERPT], _with_merges(tokenizer, len(rows))
    cut = " ".join(named(last.token_bytes[token]) for token in last.encode(opening))
    told += [f"How they cut its beginning: {cut}"]
    if own:
        told += [
            f"All {len(own.merges):,} merges together: {size / len(own.encode(text)):.3f} bytes a token."
        ]
    header = ("merge", "joins", "token", "pairs joined", "tokens left", "bytes a token")
    sources = (*answer.sources, ("the text's hash", "run.json"))
    return Answer(question, (said, *told), header, rows, (), sources)


def _own(of: Specimen) -> SubwordTokenizer | None:
    """The run's tokenizer if it is byte-level BPE."""
    tokenizer = of.run.tokenizer
    return (
        tokenizer
        if isinstance(tokenizer, SubwordTokenizer) and tokenizer.kind in ("bpe", "gpt2")
        else None
    )


def _sample(of: Specimen) -> str:
    if of.dataset is None:
        return ""
    begins = of.dataset.train.tokens[:SAMPLE]
    return text_of(begins, of.dataset.tokenizer, SAMPLE).decode(
        "utf-8", "ignore"
    )  # its last character may be cut


def _joined(pair: tuple[bytes, bytes]) -> tuple[str, str]:
    return f"{named(pair[0])} + {named(pair[1])}", named(pair[0] + pair[1])


def _with_merges(tokenizer: SubwordTokenizer, count: int) -> SubwordTokenizer:
    """The same tokenizer as it was after its first merges."""
    described = json.loads(tokenizer.to_json())
    described["model"]["merges"] = described["model"]["merges"][:count]
    return SubwordTokenizer(json.dumps(described))


# -- compression ------------------------------------------------------------------------------------------------------


def compression(question: Question, of: Specimen) -> Answer:
    """Bytes a token, bits a byte, and how small the validation text would be in each way."""
    data, V, best = of.run.record.get("data", {}), of.vocab_size, of.best
    bits = question.number or 0.0
    said = (
        "A tokenizer writes the same text in fewer signs, of a larger alphabet; a model then spends few bits on what "
        f"it expects: -log2 p for a token of probability p. Knowing nothing, all {V:,} are alike: log2 {V:,} = "
        f"{bits:.4f} bits a token."
    )
    answer = Answer(question, (said,), sources=(CONFIGURATION,))
    if not data.get("val_bytes") or not data.get("val_tokens"):
        return answer.without("run.json does not say how long its text is.")
    size, per_token = data["val_bytes"], data["val_bytes"] / data["val_tokens"]
    told = [f"This tokenizer takes {per_token:.3f} bytes of the validation text into a token, so that a byte costs "
            f"{bits / per_token:.3f} bits without a model."]  # fmt: skip
    found = [("as it is", 8.0), (f"by tokens, all {V:,} alike", bits / per_token)]
    if of.dataset is not None and size:
        text = text_of(of.dataset.val.tokens, of.dataset.tokenizer, PACKED)
        by = baselines(text)
        found += [
            ("by single bytes, as often as they are", by["unigram_bpb"]),
            ("gzip", by["gzip_bpb"]),
        ]
    sources = [CONFIGURATION]
    if best is not None and best.get("bpb") is not None:
        found += [(f"by this model, at step {best['step']:,}", float(best["bpb"]))]
        told += [f"The model spends {best['loss'] / math.log(2):.4f} bits a token ({best['loss']:.4f} nats), that is "
                 f"{best['bpb']:.4f} bits a byte: an arithmetic coder that asks it would write the text in "
                 f"{best['bpb'] / 8:.1%} of its size, the weights not counted."]  # fmt: skip
        sources += [METRICS]
    else:
        told += ["No finite validation loss was recorded, so what the model saves is not known."]
    rows = tuple((name, f"{bpb:.4f}", f"{bpb * size / 8:,.0f}") for name, bpb in found)
    header = ("the validation text", "bits a byte", "bytes")
    return Answer(question, (said, *told), header, rows, (), tuple(sources))


# -- top-k and top-p --------------------------------------------------------------------------------------------------


def sampling(question: Question, of: Specimen) -> Answer:
    """How many tokens each keeps after the surest and the least sure place of the excerpt."""
    said = (
        "Top-p. Top-k (arXiv:1805.04833) keeps k tokens everywhere; top-p (arXiv:1904.09751) keeps the likeliest ones "
        "that together have the probability p, so one where the model is sure and many where it is not. A fixed k is "
        "too many in the first case, which lets nonsense in, and may be too few in the second, which makes dull text."
    )
    answer = Answer(question, (said,))
    if of.look is None:
        return answer.without(of.missing)
    look = of.look
    plain = Sampling(temperature=1.0)
    uncertain = entropy(probabilities(look.logits, plain))
    first = min(CONTEXT, len(look.tokens)) - 1  # what is shown should have a context
    places = {
        "sure": first + int(uncertain[first:].argmin()),
        "unsure": first + int(uncertain[first:].argmax()),
    }
    kept = {kind: _kept(look.logits[place]) for kind, place in places.items()}
    names = (
        f"top-k {TOP_K} keeps",
        "with the probability",
        f"top-p {TOP_P} keeps",
        "with the probability",
    )
    rows = (
        ("after", *(_context(look, place) for place in places.values())),
        ("the likeliest", *(_likeliest(look, place) for place in places.values())),
        ("entropy", *(f"{uncertain[place] / math.log(2):.2f} bits" for place in places.values())),
        *((name, *both) for name, *both in zip(names, kept["sure"], kept["unsure"])),
    )
    header = ("", "where it is surest", "where it is least sure")
    told = (
        f"In {len(look.tokens)} tokens of the validation text, at temperature 1: top-p {TOP_P} keeps {kept['sure'][2]} "
        f"of {of.vocab_size:,} where this model is surest and {kept['unsure'][2]} where it is least sure; top-k "
        f"{TOP_K} keeps {kept['sure'][0]} and {kept['unsure'][0]}, with {kept['sure'][1]} and {kept['unsure'][1]} of "
        "the probability."
    )
    curves = {
        kind: np.sort(probabilities(look.logits[place], plain))[::-1]
        for kind, place in places.items()
    }
    label = (
        "The sum of the probabilities, the likeliest first, where the model is surest and where it is least sure; "
        f"dashed: top-k {TOP_K}, dotted: top-p {TOP_P}"
    )
    picture = Picture("top-k-top-p", label, lambda colours: cumulative(curves, colours))
    return Answer(question, (said, told), header, rows, (picture,), of.model_files)


def _context(look: Look, place: int) -> str:
    tokens = look.tokens[max(0, place + 1 - CONTEXT) : place + 1]
    return named(b"".join(look.model.tokenizer.token_bytes[token] for token in tokens))


def _likeliest(look: Look, place: int) -> str:
    p = probabilities(look.logits[place], Sampling(temperature=1.0))
    return ", ".join(
        f"{look.named(token)} {p[token]:.1%}" for token in np.argsort(-p, kind="stable")[:NAMED]
    )


def _kept(logits: Array) -> tuple[str, str, str, str]:
    """How many tokens top-k and top-p keep, and what probability these had."""
    p = probabilities(logits, Sampling(temperature=1.0))
    kept = [
        probabilities(logits, Sampling(1.0, top_k=k, top_p=top)) > 0
        for k, top in ((TOP_K, 1.0), (0, TOP_P))
    ]
    k, top = ((f"{int(which.sum()):,}", f"{float(p[which].sum()):.1%}") for which in kept)
    return *k, *top


def cumulative(curves: dict[str, NDArray[np.float64]], colours: Palette) -> Figure:
    """Each distribution as what its likeliest tokens have together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    dress(axes, "What the likeliest tokens have together", "probability", colours)
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
    finish(axes, colours)
    return figure


# -- families ---------------------------------------------------------------------------------------------------------


def families(question: Question, of: Specimen) -> Answer:
    """Three models by four properties, and this one by its own numbers."""
    c, T = of.config, of.config.block_size
    visible = T * (T + 1) // 2
    text = (
        "GPT sees what comes before and predicts the next token, so it writes. BERT sees both sides and fills in what "
        "was hidden, so it reads. T5 has one of each, an encoder that reads and a decoder that writes. This model is a "
        "small GPT.",
        f"Of a text as long as its context, {T:,} tokens, GPT's mask shows {visible:,} of {T * T:,} pairs and every "
        f"token is a prediction to learn from; BERT's shows all {T * T:,}, and about {0.15 * T:.0f} tokens (15%) are "
        "predicted.",
    )
    seen = (
        f"itself and the {c.window - 1} before it"
        if 0 < c.window < T
        else "itself and those before it"
    )
    rows = (
        ("GPT (Radford et al. 2018)", "causal: a token sees itself and those before it",
         "the next token, at every place", "left to right", "writing; with a prompt, anything put as writing"),
        ("BERT (arXiv:1810.04805)", "none: all see all", "15% of the tokens, most of them masked", "both sides at once",
         "classifying, finding, comparing texts"),
        ("T5 (arXiv:1910.10683)", "encoder: none; decoder: causal, and all of the encoder",
         "the spans that were taken out", "reads both sides, writes left to right",
         "translating, summing up, answering"),
        (f"this model: {plural(c.n_layers, 'layer')}, width {c.d_model}", f"causal: a token sees {seen}",
         f"the next token, at all {T:,} places", "left to right", f"writing with {of.vocab_size:,} tokens"),
    )  # fmt: skip
    header = ("model", "attention mask", "objective", "direction", "use")
    return Answer(question, text, header, rows, (), (CONFIGURATION,))
