"""The checkpoint questions of a capstone about one model, and the form of their answers.

A question depends on the configuration and the vocabulary size only, so that it can be asked before
training. A number that it asks for follows from the same two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.engines.memory_estimate import PRECISION_BYTES, cache_bytes
from glasslm.lab.scaling.plan import TOKENS_PER_PARAMETER
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.report.page import Picture, Section
from glasslm.text import plural

Source = tuple[str, str]  # label of a file, and its path in the run's folder

ORDER = (
    # The first eight are those of a course.
    "attention", "sqrt-dk", "causal-mask", "kv-cache", "chinchilla", "bpe", "families", "heads",
    "tying", "positions", "sampling", "compression", "forward-pass",
)  # fmt: skip
BYTE_TOKENS = 256  # the first vocabulary of byte-level BPE
COURSE_VOCABULARY = 512  # the BPE vocabulary of a course


@dataclass(frozen=True)
class Question:
    """A question; `number` is the right answer if it asks for a number, counted in `unit`."""

    name: str
    title: str
    prompt: str
    number: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer as a page shows it, and the files of the run's folder that its numbers come from.

    The first paragraph answers the question, with the number that it asks for. The other paragraphs
    describe this model.
    """

    question: Question
    text: tuple[str, ...]
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    pictures: tuple[Picture, ...] = ()
    sources: tuple[Source, ...] = ()

    @property
    def number(self) -> float | None:
        """The right number, if the question asks for one."""
        return self.question.number

    @property
    def section(self) -> Section:
        """The answer as a part of a page; its first paragraph is the question."""
        text = (self.question.prompt, *self.text)
        return Section(self.question.title, text, self.header, self.rows, self.pictures)

    def with_reason(self, reason: str) -> Answer:
        """This answer with the reason why it has no measurements."""
        return replace(self, text=(*self.text, reason))

    def with_measurement(
        self,
        paragraph: str,
        sources: Sequence[Source],
        header: Sequence[str] = (),
        rows: Sequence[tuple[str, ...]] = (),
        pictures: Sequence[Picture] = (),
    ) -> Answer:
        """This answer with a measurement of the model, and the files that it comes from."""
        return Answer(
            self.question,
            (*self.text, paragraph),
            tuple(header),
            tuple(rows),
            tuple(pictures),
            (*self.sources, *sources),
        )


def list_questions(config: RunConfig, vocab_size: int) -> list[Question]:
    """All questions, in order, about the model of a run with this configuration."""
    config = config.resolve()
    questions = [
        *_attention_questions(config.model),
        *_size_questions(config, vocab_size),
        *_text_questions(config, vocab_size),
    ]
    return sorted(questions, key=lambda question: ORDER.index(question.name))


def _attention_questions(c: ModelConfig) -> list[Question]:
    H, T, L, Q = c.n_heads, c.block_size, c.n_layers, c.head_size
    kv_heads = f" and {c.n_kv_heads} key and value heads" if c.n_kv_heads < H else ""
    return [
        Question(
            "attention",
            "The attention equation, term by term",
            "What does each term of softmax(q kᵀ / sqrt(d_k)) v do? How many attention weights "
            f"does this model compute for {T:,} tokens, in its {plural(L, 'layer')} of "
            f"{plural(H, 'head')}, the masked ones included?",
            L * H * T * T,
            "weights",
        ),
        Question(
            "sqrt-dk",
            "Why the scores are divided by sqrt(d_k)",
            f"Why is q . k divided by sqrt(d_k)? The heads of this model have d_k = {Q}. If all "
            "entries of q and k were independent, with mean 0 and variance 1, what would be the "
            "variance of q . k?",
            Q,
        ),
        Question(
            "causal-mask",
            "The causal mask",
            f"What is the causal mask for? How many of the {T:,} x {T:,} scores of a head does it "
            "hide in this model?",
            T * (T - 1) // 2,
            "scores",
        ),
        Question(
            "heads",
            "Multi-head attention in pseudocode",
            "Write multi-head attention in pseudocode, with the shape of each line. How many "
            "weights do its four matrices (q, k, v and output) have in one block of this model, of "
            f"width {c.d_model} with {plural(H, 'head')}{kv_heads}?",
            2 * c.d_model * (c.d_model + c.n_kv_heads * Q),
            "weights",
        ),
        Question(
            "positions",
            "Without positions",
            "What would attention know about the order of the tokens without an encoding of their "
            "positions? What does a model with a causal mask still know about it?",
        ),
    ]


def _size_questions(config: RunConfig, vocab_size: int) -> list[Question]:
    c, batch = config.model, config.train.batch_size
    V, D, T = vocab_size, c.d_model, c.block_size
    parameters = parameter_table(c, V).total
    heads = (
        f"{c.n_kv_heads} of {c.n_heads} heads"
        if c.n_kv_heads < c.n_heads
        else plural(c.n_heads, "head")
    )
    is_rolling = c.has_rolling_cache and c.window < T
    newest = f", of which it keeps the newest {c.window}" if is_rolling else ""
    return [
        Question(
            "kv-cache",
            "The KV cache",
            f"What does the KV cache store? How many bytes does it take for {T:,} tokens{newest} "
            f"in float32, if {plural(c.n_layers, 'layer')} keep the keys and values of {heads} of "
            f"size {c.head_size}?",
            cache_bytes(c, 1, T, PRECISION_BYTES["fp32"]),
            "bytes",
        ),
        Question(
            "chinchilla",
            "Chinchilla",
            f"This model has {parameters:,} parameters. On how many tokens should it be trained, "
            "by the rule of thumb from the Chinchilla paper?",
            TOKENS_PER_PARAMETER * parameters,
            "tokens",
        ),
        Question(
            "tying",
            "Tied embeddings",
            "What is the effect of using the embedding matrix as the output head as well? How many "
            f"parameters does it save, with {V:,} tokens and a width of {D}?",
            V * D,
            "parameters",
        ),
        Question(
            "forward-pass",
            "The forward pass, stage by stage",
            "Which stages does a batch pass from tokens to logits, and with which shapes? How many "
            f"numbers are the logits of one batch here, of {plural(batch, 'text')} of {T:,} tokens "
            f"and a vocabulary of {V:,}?",
            batch * T * V,
            "numbers",
        ),
    ]


def _text_questions(config: RunConfig, vocab_size: int) -> list[Question]:
    target = vocab_size if config.data.tokenizer == "bpe" else COURSE_VOCABULARY
    return [
        Question(
            "bpe",
            "BPE, step by step",
            "How does byte pair encoding build its vocabulary, and which pair does it join first "
            f"in your text? How many merges lead from the {BYTE_TOKENS} bytes to {target:,} "
            "tokens?",
            target - BYTE_TOKENS,
            "merges",
        ),
        Question(
            "compression",
            "Compression",
            "What does a tokenizer save, and what does a model save? How many bits does a token "
            f"cost without any knowledge of the text, with a vocabulary of {vocab_size:,}?",
            math.log2(vocab_size),
            "bits",
        ),
        Question(
            "sampling",
            "Top-k against top-p",
            "Both leave out unlikely tokens before one is drawn. Which of them keeps more tokens "
            "if the model is uncertain than if it is certain, and why does that matter?",
        ),
        Question(
            "families",
            "GPT, BERT and T5",
            "How do the three differ: what does a position attend to, what is predicted, and what "
            "is each used for? Which of them does this model belong to?",
        ),
    ]


def format_shape(*sizes: int) -> str:
    """The sizes in parentheses.

    >>> format_shape(16, 1000)
    '(16, 1,000)'
    """
    return f"({', '.join(f'{size:,}' for size in sizes)})"


def count_parameters(table: ParameterTable, *prefixes: str) -> int:
    """The number of parameters in the rows whose names start with one of the prefixes."""
    return sum(row.size for name, row in table.items() if name.startswith(prefixes))
