"""Measures for some kinds of text: Python that parses, invented names, answers of a task.

The model generates a fixed number of texts from a fixed seed. A proportion of
generated texts is compared with the same proportion of natural text, so nothing is measured if the
tokens of the run's text are not in the cache.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glasslm.data.dataset import Dataset
from glasslm.data.name_list import is_name_list
from glasslm.errors import DivergedError
from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import Model
from glasslm.report import generated_names, python_syntax, task_answers
from glasslm.report.data_checks import MAX_SEARCHED_BYTES, MAX_VALIDATION_BYTES, decode_bytes
from glasslm.runs.run_folder import Run
from glasslm.text import format_bytes

Kind = Literal["python", "names", "task"]
Row = tuple[str, str, str]  # label, of the model's texts, of natural texts

QUESTIONS: dict[Kind, str] = {
    "python": "Does the model write valid Python?",
    "names": "Which names does the model invent?",
    "task": "Does the model solve the task?",
}
TEMPERATURE, SEED = 0.8, 42  # the defaults of `glasslm generate`
PYTHON_TEXTS = 20
PYTHON_TEXT_BYTES = 300  # about; equal for all tokenizers, so that runs can be compared
NAMES, MAX_NAME_TOKENS = 200, 40
MAX_BATCH_ROWS = 25  # texts generated at once
MAX_CACHED_TOKENS = 1 << 15  # of the KV cache: about 100 MB
MAX_KIND_TOKENS = 64 << 10  # of the training text, to detect a list of names

TOO_SLOW = (
    "The model generates too slowly for a report. `glasslm evaluate` on this run has no time limit."
)
TOO_SHORT = "The validation text is too short for a comparison."


@dataclass(frozen=True)
class Domain:
    """The content of a section; rows and facts are empty where nothing was measured."""

    kind: Kind
    question: str
    missing: str = ""  # the reason why nothing was measured
    method: str = ""
    header: Row = ("", "", "")
    rows: tuple[Row, ...] = ()
    remark: str = ""
    examples: tuple[str, ...] = ()  # invented names
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # of measuring

    @property
    def facts(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"kind": self.kind} | ({"missing": self.missing} if self.missing else self.measured)


def domain_kind(run: Run, dataset: Dataset | None) -> Kind | None:
    """The kind of the run's text; None for other texts.

    Python is the corpus of that name, and a text with more than half of its bytes in .py files.
    Names are detected from the tokens in the cache.
    """
    if run.config.data.task:
        return "task"
    if run.config.data.chat is not None:
        return None
    if run.config.data.corpus == "python":
        return "python"
    files = run.record.get("data", {}).get("files", [])
    python_bytes = sum(file["bytes"] for file in files if file["path"].endswith(".py"))
    if 2 * python_bytes > sum(file["bytes"] for file in files):
        return "python"
    if dataset:
        text = _decode(dataset.train.tokens[:MAX_KIND_TOKENS], dataset, MAX_SEARCHED_BYTES)
        if is_name_list(text):
            return "names"
    return None


def measure_domain(
    run: Run, dataset: Dataset | None, model: Model, seconds: float
) -> Domain | None:
    """The measure for the kind of the run's text, within about `seconds`; None for other kinds."""
    kind = domain_kind(run, dataset)
    if kind is None:
        return None
    start = time.monotonic()
    if dataset is None:
        return Domain(
            kind,
            QUESTIONS[kind],
            "The run's tokens are not in the cache, so there is no natural text for a comparison. "
            "`glasslm evaluate` on this run prepares them again.",
        )
    measure = {"python": _measure_python, "names": _measure_names, "task": _measure_task}[kind]
    try:
        domain = measure(dataset, model, start + seconds)
    except DivergedError as error:  # a model with logits that are not finite cannot generate
        return Domain(kind, QUESTIONS[kind], str(error))
    return replace(domain, seconds=time.monotonic() - start)


def generate_texts(
    model: Model, prompt: str, count: int, max_tokens: int, stop: str, deadline: float
) -> list[str | None]:
    """`count` continuations of `prompt`; None for one that did not reach `stop`.

    Each has up to `max_tokens` tokens. There are fewer if the deadline (time.monotonic) comes
    first: batches that are not finished by then are left out, whatever the lengths of their texts.
    """
    rows = max(1, min(MAX_BATCH_ROWS, MAX_CACHED_TOKENS // model.config.model.block_size))
    results: list[str | None] = []
    for first in range(0, count, rows):
        texts = [""] * min(rows, count - first)
        ended = [not stop] * len(texts)
        sampling = Sampling(temperature=TEMPERATURE, seed=SEED + first)
        for piece in model.pieces(
            [prompt], max_tokens, sampling=sampling, samples=len(texts), stop=stop or ()
        ):
            texts[piece.sample] += piece.text
            ended[piece.sample] |= piece.finish == "stop"
            if time.monotonic() > deadline:
                return results
        results += [text if end else None for text, end in zip(texts, ended)]
    return results


def _measure_python(dataset: Dataset, model: Model, deadline: float) -> Domain:
    question = QUESTIONS["python"]
    val = _decode(dataset.val.tokens, dataset, MAX_VALIDATION_BYTES)
    if not val:
        return Domain("python", question, TOO_SHORT)
    prompt = python_syntax.find_separator(val, PYTHON_TEXTS)
    tokens = math.ceil(PYTHON_TEXT_BYTES * len(dataset.val.tokens) / dataset.val.bytes)
    generated = generate_texts(model, prompt, PYTHON_TEXTS, tokens, "", deadline)
    texts = [text or "" for text in generated]
    if not texts:
        return Domain("python", question, TOO_SLOW)
    natural_texts = python_syntax.cut_pieces(val, prompt, list(map(len, texts)))
    if not natural_texts:
        return Domain("python", question, TOO_SHORT)
    checks, natural = python_syntax.check_texts(texts), python_syntax.check_texts(natural_texts)
    outcomes: tuple[tuple[str, python_syntax.Outcome], ...] = (
        ("parses, up to the cut", "parses"),
        ("broken: a syntax error before the cut", "broken"),
        ("unfinished: no complete statement", "unfinished"),
    )
    rows = [
        (label, str(checks.proportion(outcome)), str(natural.proportion(outcome)))
        for label, outcome in outcomes
    ]
    rows += [
        (
            "lines from the start that parse (mean)",
            f"{checks.lines:.1f}",
            f"{natural.lines:.1f}",
        )
    ]
    errors = "; ".join(f"{error} ({count})" for error, count in checks.errors)
    blank = prompt.count("\n") - 1
    after = f"{blank} blank line{'s' if blank > 1 else ''}" if blank else "a line break"
    return Domain(
        "python",
        question,
        method=f"{len(texts)} texts of {tokens} tokens after {after} at temperature {TEMPERATURE}, "
        f"seed {SEED}, and {len(natural_texts)} pieces of the validation text of the same lengths, "
        f"also after {after}. Each is parsed with ast.parse, without its last line and without "
        "incomplete lines at its end. 95% intervals are in parentheses.",
        header=("", "generated", "natural text"),
        rows=tuple(rows),
        remark=f"The most frequent errors: {errors}." if errors else "",
        measured=_settings(len(texts), tokens)
        | checks.facts
        | {"natural": {"texts": len(natural_texts)} | natural.facts},
    )


def _measure_names(dataset: Dataset, model: Model, deadline: float) -> Domain:
    question = QUESTIONS["names"]
    generated = generate_texts(model, "\n", NAMES, MAX_NAME_TOKENS, "\n", deadline)
    statistics = generated_names.compare_names(
        generated,
        _decode(dataset.train.tokens, dataset, MAX_SEARCHED_BYTES),
        _decode(dataset.val.tokens, dataset, MAX_VALIDATION_BYTES),
    )
    if not generated:
        return Domain("names", question, TOO_SLOW)
    if not statistics.natural_known.total:
        return Domain("names", question, TOO_SHORT)
    rows = (
        ("in the training text", str(statistics.known), str(statistics.natural_known)),
        ("only in the validation text", str(statistics.unseen), "-"),
        ("invented: in neither", str(statistics.invented), "-"),
        ("not a name: empty, or without an end", str(statistics.nothing), "-"),
        (
            "distinct, of all names",
            str(statistics.distinct),
            str(statistics.natural_distinct),
        ),
        (
            "well formed, of those not in the training text",
            str(statistics.well_formed),
            str(statistics.natural_well_formed),
        ),
    )
    return Domain(
        "names",
        question,
        method=f"{len(generated)} names at temperature {TEMPERATURE}, seed {SEED}, and the "
        f"{statistics.natural_known.total:,} names of the validation text. A name is well formed "
        "if all its trigrams, start and end included, occur in names of the training text. 95% "
        "intervals are in parentheses." + _extent(dataset),
        header=("", "generated", "validation text"),
        rows=rows,
        examples=statistics.examples,
        measured=_settings(len(generated), MAX_NAME_TOKENS) | statistics.facts,
    )


def _measure_task(dataset: Dataset, model: Model, deadline: float) -> Domain:
    groups = task_answers.measure_answers(dataset, model, deadline)
    if not groups:
        return Domain("task", QUESTIONS["task"], task_answers.TOO_SLOW)
    task = task_answers.task_of(model)
    frequent = task_answers.measure_most_frequent(dataset)
    return Domain(
        "task",
        QUESTIONS["task"],
        method=f"The answer is {task.rule}. An answer is right if greedy decoding writes all of "
        "it. No question of the training text occurs among those that are held out or longer. "
        "N-grams of bytes, counted in the training text, answer in the same way; their order is "
        f"the best of 8 for each row. The most frequent answer of the training text would be right "
        f"in {frequent}. 95% intervals are in parentheses.",
        header=("examples", "model", "n-grams"),
        rows=tuple((group.label, str(group.model), str(group.ngrams)) for group in groups),
        remark=task.phenomenon,
        measured={
            "most_frequent_answer": frequent.facts,
            "groups": [
                {"examples": group.label, "model": group.model.facts, "ngrams": group.ngrams.facts}
                for group in groups
            ],
        },
    )


def _settings(texts: int, tokens: int) -> dict[str, Any]:
    return {"texts": texts, "tokens": tokens, "temperature": TEMPERATURE, "seed": SEED}


def _extent(dataset: Dataset) -> str:
    if dataset.train.bytes <= MAX_SEARCHED_BYTES:
        return ""
    searched = format_bytes(MAX_SEARCHED_BYTES)
    return f" Names were searched in the first {searched} of the training text."


def _decode(tokens: Any, dataset: Dataset, max_bytes: int) -> str:
    return decode_bytes(tokens, dataset.tokenizer, max_bytes).decode("utf-8", "ignore")
