"""Made-up dialogues with one right answer each: arithmetic, facts of the run, small talk.

Every exchange has a key, such as the terms of a sum, and a hash of the key decides whether it is
held out. No training dialogue has a held-out exchange, and all questions that are scored are held
out. So an exact answer is no copy of one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from glasslm.data.chat.conversations import Conversation

NAME = "dialogues"
VERSION = 1  # part of the identity: another generator, other dialogues
N_CONVERSATIONS = 40_000
MAX_EXCHANGES, MAX_CHARACTERS = 2, 86  # of a dialogue, which with chatml fits into 128 tokens
HELD_OUT_SHARE = 10  # one key of so many is held out
MAX_TERM = 49  # of a sum
SEED = 20_261_129

KINDS = ("addition", "comparison", "itself", "greeting", "memory", "spelling")
NAMES = [
    "Ada", "Alan", "Amir", "Anna", "Ben", "Carl", "Chen", "Clara", "Dana", "David", "Elena",
    "Emil", "Eva", "Felix", "Grace", "Hana", "Hugo", "Ida", "Ines", "Ivan", "Jan", "Jana",
    "Joel", "Jonas", "Julia", "Karim", "Lea", "Leo", "Lena", "Lina", "Luca", "Maja", "Marie",
    "Max", "Mira", "Nadia", "Nils", "Nina", "Noah", "Nora", "Olga", "Omar", "Oscar", "Paul",
    "Petra", "Rosa", "Ruth", "Sara", "Selma", "Sofia", "Theo", "Tim", "Uma", "Vera", "Viktor",
    "Wei", "Yara", "Yuki", "Zoe",
]  # fmt: skip
# Made-up words: a model memorizes few real ones.
CONSONANTS, VOWELS = "bdfgklmnprst", "aeiou"
WORDS = [
    *map("".join, itertools.product(CONSONANTS, VOWELS, CONSONANTS)),
    *map("".join, itertools.product(CONSONANTS, VOWELS, CONSONANTS, VOWELS)),
]
SUMS = ("What is {} plus {}?", "How much is {} plus {}?", "Add {} and {}.", "{} plus {}?")
COMPARISONS = ("Which is larger, {} or {}?", "The larger of {} and {}?")
GREETINGS = {
    "Hello, I am {}.": "Nice to meet you, {}.",
    "Hi, my name is {}.": "Hi {}, how are you?",
    "Good morning, {} here.": "Good morning, {}.",
    "{} here. Good evening.": "Good evening, {}.",
}
REMINDERS = ("What is my name?", "Do you know my name?", "Who am I?")
SPELLINGS = ("Spell {}.", "How do you spell {}?", "Please spell {}.")
# What a model knows of itself, by the name of the fact (training/chat_run.py has the values).
FACTS = {
    "layers": ("layers do you have", "I have {} layers."),
    "heads": ("heads do you have", "I have {} heads."),
    "width": ("numbers are in a vector", "{} numbers."),
    "context": ("tokens can you read", "I can read {} tokens."),
    "vocabulary": ("tokens do you know", "I know {} tokens."),
}
QUESTIONS = (
    "How many {}?", "Tell me how many {}.", "Say, how many {}?", "Please, how many {}?",
    "Hey, how many {}?", "And how many {}?", "So how many {}?", "Now, how many {}?",
)  # fmt: skip


class Dialogue(NamedTuple):
    """Messages, and the kind of each answer ("" for a message that is no answer)."""

    messages: Conversation
    kinds: list[str]


class Exchange(NamedTuple):
    """A question with its answer; `before`: an exchange that must come first."""

    kind: str
    question: str
    answer: str
    before: Exchange | None = None


def identity(self_facts: Mapping[str, str]) -> str:
    """The SHA-256 that identifies the dialogues of a model with these facts."""
    values = [NAME, VERSION, N_CONVERSATIONS, sorted(self_facts.items())]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def generate(self_facts: Mapping[str, str], n_training: int, n_held_out: int) -> Iterator[Dialogue]:
    """Training dialogues, then held-out ones; the same each time.

    `self_facts` has values of FACTS; without them no question is about the model itself.
    """
    exchanges = all_exchanges(self_facts)
    for index, (count, held_out) in enumerate(((n_training, False), (n_held_out, True))):
        rng = np.random.Generator(np.random.Philox(key=np.array([SEED, index], np.uint64)))
        pools = [
            pool for kind in KINDS if (pool := [e for e in exchanges[kind] if _fits(e, held_out)])
        ]
        for _ in range(count):
            yield _dialogue(pools, rng)


def _dialogue(pools: list[list[Exchange]], rng: np.random.Generator) -> Dialogue:
    """One or two exchanges of different kinds."""
    messages: Conversation = []
    kinds: list[str] = []
    n = int(rng.integers(1, MAX_EXCHANGES + 1))
    for pool in rng.permutation(len(pools))[:n].tolist():
        exchange = pools[pool][int(rng.integers(len(pools[pool])))]
        parts = [part for part in (exchange.before, exchange) if part]
        size = sum(len(message["content"]) for message in messages)
        size += sum(len(part.question) + len(part.answer) for part in parts)
        if messages and (size > MAX_CHARACTERS or len(messages) + 2 * len(parts) > 4):
            break
        for part in parts:
            messages += [
                {"role": "user", "content": part.question},
                {"role": "assistant", "content": part.answer},
            ]
            kinds += ["", part.kind if part is exchange else ""]
    return Dialogue(messages, kinds)


def all_exchanges(self_facts: Mapping[str, str]) -> dict[str, list[Exchange]]:
    """All exchanges by their kind."""
    numbers = range(MAX_TERM + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    greetings = [
        Exchange("greeting", ask.format(name), reply.format(name))
        for ask, reply in GREETINGS.items()
        for name in NAMES
    ]
    return {
        "addition": [
            Exchange("addition", ask.format(a, b), f"{a} plus {b} is {a + b}.")
            for ask in SUMS
            for a, b in pairs
        ],
        "comparison": [
            Exchange("comparison", ask.format(a, b), f"{max(a, b)} is larger.")
            for ask in COMPARISONS
            for a, b in pairs
            if a != b
        ],
        "itself": [
            Exchange("itself", ask.format(FACTS[fact][0]), FACTS[fact][1].format(value))
            for fact, value in self_facts.items()
            for ask in QUESTIONS
        ],
        "greeting": greetings,
        "memory": [
            Exchange("memory", ask, f"Your name is {name}.", greeting)
            for ask in REMINDERS
            for greeting, name in zip(greetings, NAMES * len(GREETINGS))
        ],
        "spelling": [
            Exchange("spelling", ask.format(word), f"{' '.join(word)}.")
            for ask in SPELLINGS
            for word in WORDS
        ],
    }


def _fits(exchange: Exchange, held_out: bool) -> bool:
    """Whether an exchange belongs to the held-out dialogues, or to the training ones.

    A training dialogue has no held-out exchange before another one either.
    """
    before = exchange.before
    if not held_out and before is not None and _is_held_out(before):
        return False
    return _is_held_out(exchange) == held_out


def _is_held_out(exchange: Exchange) -> bool:
    """Whether an exchange is held out: by its answer, its question, or both.

    A sum and its mirror image have one key, and so do all ways to ask for it. A word is held out in
    all ways to spell it. A greeting and what the model knows of itself are held out by the way to
    ask: without having met the answer nobody could know it.
    """
    kind, question, answer, before = exchange
    if kind in ("addition", "comparison"):
        numbers = "".join(c if c.isdigit() else " " for c in question).split()
        key = " ".join(sorted(numbers))
    elif kind == "spelling":
        key = answer
    else:
        key = f"{question} {answer} {before.question if before else ''}"
    digest = hashlib.sha256(f"{kind}: {key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0
