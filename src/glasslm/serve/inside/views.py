"""The views of the page: what each one computes of a checkpoint and a text.

A view returns arrays for `binary.encode_arrays` and facts for its header. docs/howto/look.md lists
them. Letters: T positions, L layers, H heads, P places or parts, C candidates.
"""

from __future__ import annotations

import numpy as np

from glasslm.inference.head_scores import SCORE_NAMES
from glasslm.inference.microscope import attention, contributions, lens, reading, writing
from glasslm.inference.sampling import Sampling
from glasslm.serve.inside.binary import to_pixels
from glasslm.serve.inside.effects import EFFECTS
from glasslm.serve.inside.query import Query
from glasslm.serve.inside.source import describe_source
from glasslm.serve.inside.subject import Arrays, Facts, Subject, View, f4, i4

MAX_WRITTEN_TOKENS = 64  # at once


def read(subject: Subject) -> tuple[Arrays, Facts]:
    """Surprise, rank, entropy and the likeliest tokens of every position."""
    result = reading.read_text(subject.recorded)
    arrays = {
        "nats": f4(result.nats),
        "rank": i4(result.rank),
        "entropy": f4(result.entropy),
        "top_ids": i4(result.top_ids),
        "top_logprobs": f4(result.top_logprobs),
    }
    return arrays, {"bits_per_byte": result.bits_per_byte, "bytes": result.n_bytes}


def distribution(subject: Subject) -> tuple[Arrays, Facts]:
    """The candidates after t, before and after the filters of sampling."""
    result = reading.next_token_distribution(
        subject.recorded, subject.position(), read_sampling(subject.query)
    )
    arrays = {"ids": i4(result.ids), "before": f4(result.before), "after": f4(result.after)}
    return arrays, {"others": result.others}


def read_sampling(query: Query) -> Sampling:
    """The settings of sampling in a query; all filters are off unless they are given."""
    return Sampling(
        temperature=query.number("temperature", 0, 100, 1.0),
        top_k=query.integer("top_k", 0, 1 << 30, 0),
        top_p=query.number("top_p", 0, 1, 1.0),
        min_p=query.number("min_p", 0, 1, 0.0),
        seed=query.integer("seed", 0, 2**63, 42),
    )


def write(subject: Subject) -> tuple[Arrays, Facts]:
    """What the model writes after t and the tokens `then`, at most `count` tokens."""
    query, tokenizer = subject.query, subject.loaded.model.tokenizer
    then = query.integers("then", 0, tokenizer.vocab_size - 1)
    ids = [*subject.recorded.ids[: subject.position() + 1].tolist(), *then]
    count = query.integer("count", 1, MAX_WRITTEN_TOKENS, 16)
    # Each choice of the first token has random numbers of its own, as samples of one prompt have.
    sampling, sample = read_sampling(query), then[0] if then else 0
    result = writing.write_on(subject.loaded.model, ids, count, sampling, sample, subject.check)
    arrays = {
        "ids": i4(result.ids),
        "logprobs": f4(result.logprobs),
        "top_ids": i4(result.top_ids),
        "top_logprobs": f4(result.top_logprobs),
    }
    return arrays, {"is_finished": result.is_finished}


def attention_row(subject: Subject) -> tuple[Arrays, Facts]:
    """Where every head looks from t."""
    return {"weights": f4(attention.attention_from(subject.recorded, subject.position()))}, {}


def thumbnails(subject: Subject) -> tuple[Arrays, Facts]:
    """A small picture of every head."""
    pixels, scale = to_pixels(attention.attention_thumbnails(subject.recorded), axes=(2, 3))
    return {"weights": pixels, "scale": scale}, {}


def head(subject: Subject) -> tuple[Arrays, Facts]:
    """All weights of one head."""
    weights = subject.recorded.weights(subject.layer())[subject.head()]
    return {"weights": weights.astype(np.float16)}, {}


def averages(subject: Subject) -> tuple[Arrays, Facts]:
    """The mean of the heads of each layer, then of all heads."""
    pixels, scale = to_pixels(attention.attention_averages(subject.recorded), axes=(1, 2))
    return {"weights": pixels, "scale": scale}, {}


def scores(subject: Subject) -> tuple[Arrays, Facts]:
    """What each head does, measured on this text and on a random text that is repeated."""
    n_tokens, repeated = subject.loaded.repeated_scores
    arrays = {"text": f4(attention.score_heads(subject.recorded)), "repeated": f4(repeated)}
    return arrays, {"kinds": list(SCORE_NAMES), "repeated_tokens": n_tokens}


def lens_all(subject: Subject) -> tuple[Arrays, Facts]:
    """The first choice at every place and position, and the probability of the text's token."""
    result = lens.read_lens(subject.recorded)
    arrays = {
        "top_ids": i4(result.top_ids),
        "top_logprobs": f4(result.top_logprobs),
        "target_logprobs": f4(result.target_logprobs),
    }
    return arrays, {"places": result.places}


def lens_at(subject: Subject) -> tuple[Arrays, Facts]:
    """The likeliest tokens at every place after t; the probabilities of `ids` or the candidates."""
    asked = subject.query.integers("ids", 0, subject.loaded.model.tokenizer.vocab_size - 1)
    asked = asked or subject.candidates(subject.position()).tolist()
    result = lens.read_lens_at(subject.recorded, subject.position(), asked)
    arrays = {
        "ids": i4(result.ids),
        "logprobs": f4(result.logprobs),
        "asked_logprobs": f4(result.asked_logprobs),
    }
    return arrays, {"places": result.places, "asked": asked}


def why(subject: Subject) -> tuple[Arrays, Facts]:
    """The contribution of every part to the logits of the candidates after t."""
    t = subject.position()
    candidates = subject.candidates(t)
    result = contributions.contributions(subject.recorded, subject.loaded.weights, t, candidates)
    sums = result.shares.sum(0)
    arrays = {
        "ids": i4(candidates),
        "shares": f4(result.shares),
        "logits": f4(result.logits),
        "sums": f4(sums),
        "logprobs": f4(reading.logprobs_of(subject.recorded, t, candidates)),
    }
    return arrays, {"parts": result.parts, "gap": float(np.abs(sums - result.logits).max())}


def why_source(subject: Subject) -> tuple[Arrays, Facts]:
    """What a head read at each position to push `candidate` above `rival`, after t."""
    pair = np.array([subject.token("candidate"), subject.token("rival")])
    shares = contributions.contributions_by_source(
        subject.recorded,
        subject.loaded.weights,
        subject.position(),
        subject.layer(),
        subject.head(),
        pair,
    )
    return {"shares": f4(shares[0] - shares[1])}, {}


def source(subject: Subject) -> tuple[Arrays, Facts]:
    """The lines that computed the values of a name, and Python that repeats them."""
    query = subject.query
    t = query.integer("t", -1, subject.recorded.length - 1, default=-1)
    name = query.text("name")
    at = subject.loaded.name
    return {}, describe_source(subject.recorded, name, at, None if t < 0 else t)


VIEWS: dict[str, View] = {
    "read": read,
    "distribution": distribution,
    "write": write,
    "attention": attention_row,
    "thumbnails": thumbnails,
    "head": head,
    "averages": averages,
    "scores": scores,
    "lens": lens_all,
    "lens-at": lens_at,
    "why": why,
    "why-source": why_source,
    "source": source,
    **EFFECTS,
}
