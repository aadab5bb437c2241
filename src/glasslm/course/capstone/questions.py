"""The checkpoint questions of a capstone, asked of one model: what is asked, and what an answer to it is.

A question needs nothing but the configuration and the vocabulary, so that it can be asked before anything is trained;
where it asks for a number, the right one follows from the same two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.engines.memory_estimate import PRECISION_BYTES, cache_bytes
from glasslm.lab.scaling.plan import TOKENS_PER_PARAMETER
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.report.page import Picture, Section

Source = tuple[str, str]  # what it is, and its path in the run's folder

ORDER = (
    "attention", "sqrt-dk", "causal-mask", "kv-cache", "chinchilla", "bpe", "families", "heads",  # a course's eight
    "tying", "positions", "sampling", "compression", "forward-pass",
)  # fmt: skip
BYTES = 256  # tokens with which byte-level BPE begins
COURSE_VOCABULARY = 512  # to which a course trains BPE


@dataclass(frozen=True)
class Question:
    """`number` is the right answer where a number is asked for, counted in `unit`; it is not to be shown yet."""

    name: str
    title: str
    asked: str
    number: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer as a page shows it, and the files of the run's folder that its numbers come from.

    The first paragraph answers by itself, with the number that was asked for; the others say how it is here.
    """

    question: Question
    text: tuple[str, ...]
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    pictures: tuple[Picture, ...] = ()
    sources: tuple[Source, ...] = ()

    @property
    def number(self) -> float | None:
        return self.question.number

    @property
    def section(self) -> Section:
        """The question and its answer as a part of a page; links to the sources are left to the page."""
        text = (self.question.asked, *self.text)
        return Section(self.question.title, text, self.header, self.rows, self.pictures)

    def without(self, why: str) -> Answer:
        """This one, and why there is no more to it."""
        return replace(self, text=(*self.text, why))


def ask(config: RunConfig, vocab_size: int) -> list[Question]:
    """All questions, in their order, about the model that a run of this configuration trains."""
    config = config.resolved()
    every = [
        *_about_attention(config.model),
        *_about_size(config, vocab_size),
        *_about_text(config, vocab_size),
    ]
    return sorted(every, key=lambda question: ORDER.index(question.name))


def _about_attention(c: ModelConfig) -> list[Question]:
    H, T, L, Q = c.n_heads, c.block_size, c.n_layers, c.head_size
    return [
        Question(
            "attention",
            "The attention equation, term by term",
            "What does each term of softmax(q kᵀ / sqrt(d_k)) v do? And how many attention weights does this model "
            f"make of {T:,} tokens, in its {plural(L, 'layer')} of {plural(H, 'head')}, the hidden ones included?",
            L * H * T * T,
            "weights",
        ),
        Question(
            "sqrt-dk",
            "Why the scores are divided by sqrt(d_k)",
            f"Why is q . k divided by sqrt(d_k)? The heads of this model have d_k = {Q}: were all entries of q and k "
            "independent, of mean 0 and variance 1, what would be the variance of q . k?",
            Q,
        ),
        Question(
            "causal-mask",
            "The causal mask",
            f"What is the causal mask for? And how many of the {T:,} x {T:,} scores of a head does it hide here?",
            T * (T - 1) // 2,
            "scores",
        ),
        Question(
            "heads",
            "Multi-head attention in pseudocode",
            "How would you write multi-head attention down, line by line, with the shape of each line? And how many "
            "weights have its four matrices (q, k, v and output) in one block of this model, of width "
            f"{c.d_model} with {plural(H, 'head')}{f' and {c.n_kv_heads} of keys and values' * (c.n_kv_heads < H)}?",
            2 * c.d_model * (c.d_model + c.n_kv_heads * Q),
            "weights",
        ),
        Question(
            "positions",
            "Without positions",
            "What would attention know of the order of the tokens if nothing told it their positions? And what tells "
            "it after all, in a model with a causal mask?",
        ),
    ]


def _about_size(config: RunConfig, vocab_size: int) -> list[Question]:
    c, batch = config.model, config.train.batch_size
    V, D, T = vocab_size, c.d_model, c.block_size
    parameters = parameter_table(c, V).total
    heads = (
        f"{c.n_kv_heads} of {c.n_heads} heads"
        if c.n_kv_heads < c.n_heads
        else plural(c.n_heads, "head")
    )
    newest = f", of which it keeps the newest {c.window}" if c.rolling and c.window < T else ""
    return [
        Question(
            "kv-cache",
            "The KV cache",
            f"What does the KV cache store? And how many bytes does it take for {T:,} tokens{newest} in float32, where "
            f"{plural(c.n_layers, 'layer')} keep the keys and values of {heads} of size {c.head_size}?",
            cache_bytes(c, 1, T, PRECISION_BYTES["fp32"]),
            "bytes",
        ),
        Question(
            "chinchilla",
            "Chinchilla",
            f"This model has {parameters:,} parameters. On how many tokens should it be trained, by the rule of thumb "
            "that is drawn from Chinchilla?",
            TOKENS_PER_PARAMETER * parameters,
            "tokens",
        ),
        Question(
            "tying",
            "Tied embeddings",
            "What does it do to use the embedding matrix as the output head, too? And how many parameters does that "
            f"save, with {V:,} tokens and a width of {D}?",
            V * D,
            "parameters",
        ),
        Question(
            "forward-pass",
            "The forward pass, drawn",
            "Through which stages does a batch go, from tokens to logits, and in which shapes? How many numbers are "
            f"the logits of one batch here, of {plural(batch, 'text')} of {T:,} tokens and a vocabulary of {V:,}?",
            batch * T * V,
            "numbers",
        ),
    ]


def _about_text(config: RunConfig, vocab_size: int) -> list[Question]:
    target = vocab_size if config.data.tokenizer == "bpe" else COURSE_VOCABULARY
    return [
        Question(
            "bpe",
            "BPE, step by step",
            "How does byte pair encoding build its vocabulary, and which pair will it join first in your text? How "
            f"many merges take it from the {BYTES} bytes to {target:,} tokens?",
            target - BYTES,
            "merges",
        ),
        Question(
            "compression",
            "Compression",
            "What does a tokenizer save, and what does a model? How many bits does a token cost somebody who knows "
            f"nothing of the text, where the vocabulary has {vocab_size:,}?",
            math.log2(vocab_size),
            "bits",
        ),
        Question(
            "sampling",
            "Top-k against top-p",
            "Both leave out unlikely tokens before one is drawn. Which of them keeps more tokens where the model is "
            "unsure than where it is sure, and why does that matter?",
        ),
        Question(
            "families",
            "GPT, BERT and T5",
            "How do the three differ: what may a position see, what is predicted, and what is each good for? To which "
            "of them does this model belong?",
        ),
    ]


def plural(count: int, word: str) -> str:
    """
    >>> plural(1, "head"), plural(4, "head")
    ('1 head', '4 heads')
    """
    return f"{count:,} {word}{'s' * (count != 1)}"


def shape(*sizes: int) -> str:
    """
    >>> shape(16, 1000)
    '(16, 1,000)'
    """
    return f"({', '.join(f'{size:,}' for size in sizes)})"


def size_of(rows: ParameterTable, *prefixes: str) -> int:
    """The parameters of all rows whose names begin so."""
    return sum(row.size for name, row in rows.items() if name.startswith(prefixes))
