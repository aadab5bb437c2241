"""The suite "dialogues": which held-out questions of the made-up dialogues are answered exactly?

Greedy decoding writes an answer exactly when each of its tokens is the likeliest after the right
tokens before it, so one forward pass decides and nothing is generated.
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from glasslm.data.chat import dialogues
from glasslm.data.dataset import Dataset
from glasslm.data.next_token_rows import next_token_rows
from glasslm.data.token_file import NO_TARGET
from glasslm.errors import InputError
from glasslm.inference.exact_answers import exact_answers, likeliest_tokens
from glasslm.inference.proportions import Proportion
from glasslm.inference.suites.suite_result import SuiteResult
from glasslm.inference.trained_model import WINDOWS_PER_CALL, Model

NAMES = {
    "addition": "a new sum",
    "comparison": "the larger of two new numbers",
    "itself": "a number of its own, asked in a new way",
    "greeting": "a greeting by a name in a new pair",
    "memory": "the name that was said before",
    "spelling": "a word that it has not spelled before",
}


def measure_dialogues(model: Model, dataset: Dataset) -> SuiteResult:
    """The share of held-out questions that are answered exactly, by kind.

    Raises InputError for a run that did not learn the dialogues.
    """
    facts = dataset.facts.get("chat", {})
    if "self_facts" not in facts or dataset.val.conversations is None:
        raise InputError(
            "--suite dialogues needs a run that learned them: `glasslm finetune RUN --full --chat "
            "dialogues` makes one"
        )
    n_training, n_held_out = facts["train_conversations"], facts["val_conversations"]
    all_dialogues = dialogues.generate(facts["self_facts"], n_training, n_held_out)
    right = _right_answers(model, dataset)
    counts = {kind: [0, 0] for kind in dialogues.KINDS}
    for dialogue, is_right in zip(islice(all_dialogues, n_training, None), right):
        kinds = [
            kind
            for message, kind in zip(dialogue.messages, dialogue.kinds)
            if message["role"] == "assistant"
        ]
        for kind, is_exact in zip(kinds, is_right):
            if kind:
                counts[kind][0] += is_exact
                counts[kind][1] += 1
    shares = {kind: Proportion(*count) for kind, count in counts.items()}
    shares["all"] = Proportion(*(sum(part) for part in zip(*counts.values())))
    return SuiteResult(
        "dialogues",
        "Which held-out questions does the model answer exactly?",
        "An answer is right if greedy decoding writes it, its end included. No question that "
        "counts is in the training dialogues (docs/howto/chat.md). Guessing one of the two numbers "
        "answers half of the comparisons. 95% intervals by Wilson's score are in parentheses.",
        ("kind", "right", "of", "answered exactly"),
        tuple(
            (NAMES.get(kind, kind), str(share.count), str(share.total), str(share))
            for kind, share in shares.items()
        ),
        model.step,
        facts={kind: share.facts for kind, share in shares.items()},
    )


def _right_answers(model: Model, dataset: Dataset) -> list[list[bool]]:
    """Of each validation conversation, whether each of its answers is right.

    An answer behind the context is wrong.
    """
    conversations = dataset.val.conversations
    assert conversations is not None
    T, starts = model.config.model.block_size, conversations.starts.tolist()
    results: list[list[bool]] = []
    for first in range(0, len(conversations), WINDOWS_PER_CALL):
        spans = list(zip(starts[first:-1], starts[first + 1 :]))[:WINDOWS_PER_CALL]
        texts = [dataset.val.tokens[begin:end] for begin, end in spans]
        marks = [np.asarray(conversations.answers[begin:end], bool) for begin, end in spans]
        longest = max(len(text) for text in texts) - 1
        inputs, targets = next_token_rows(texts, longest, marks)
        predictions = np.full_like(targets, NO_TARGET)  # behind the context there are none
        predictions[:, :T] = likeliest_tokens(model.engine, inputs[:, :T])
        results += [exact_answers(*row).tolist() for row in zip(predictions, targets)]
    return results
