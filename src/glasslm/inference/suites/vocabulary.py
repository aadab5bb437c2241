"""The words that a model knows: those of its training text, by frequency."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

MAX_TEXT_CHARACTERS = 4 << 20
WORD = re.compile(r"[A-Za-z_]+")
DETERMINERS = ("the", "a", "an", "his", "her", "my", "your", "our", "their", "this", "that", "thy")
MIN_WORD_COUNT = 3
MIN_NOUN_SHARE = 0.2  # of the occurrences of a noun that follow a determiner
MAX_WORDS = 60  # of a kind, the most frequent ones


@dataclass(frozen=True)
class Vocabulary:
    """The words and characters of a training text."""

    text: str

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each word occurs."""
        return Counter(WORD.findall(self.text))

    @cached_property
    def characters(self) -> frozenset[str]:
        """The characters of the text."""
        return frozenset(self.text)

    @cached_property
    def noun_pairs(self) -> list[tuple[str, str]]:
        """Singulars with their plurals in -s, by the frequency of the rarer form.

        A noun is a word that often follows a determiner, in both forms.
        """
        determined = Counter(
            noun
            for noun in re.findall(
                rf"(?<![A-Za-z_])(?:{'|'.join(DETERMINERS)}) ([a-z]+)(?![A-Za-z_])", self.text
            )
        )

        def is_noun(word: str) -> bool:
            count = self.counts[word]
            return count >= MIN_WORD_COUNT and determined[word] >= MIN_NOUN_SHARE * count

        pairs = [
            (word, f"{word}s")
            for word in self.counts
            if len(word) > 2 and not word.endswith("s") and is_noun(word) and is_noun(f"{word}s")
        ]
        return sorted(pairs, key=lambda pair: (-min(map(self.counts.__getitem__, pair)), pair))[
            :MAX_WORDS
        ]

    @cached_property
    def nouns(self) -> list[str]:
        """Words in small letters that often follow "the", by frequency."""
        after_the = Counter(re.findall(r"(?<![A-Za-z_])the ([a-z]{3,})(?![A-Za-z_])", self.text))
        known = [
            word
            for word, count in after_the.items()
            if count >= MIN_WORD_COUNT and count >= MIN_NOUN_SHARE * self.counts[word]
        ]
        return sorted(known, key=lambda word: (-after_the[word], word))[:MAX_WORDS]

    @cached_property
    def names(self) -> list[str]:
        """Words that stand before "(", as functions do in code, by frequency."""
        called = Counter(re.findall(r"([a-z_]{3,})\(", self.text))
        known = [word for word, count in called.items() if count >= MIN_WORD_COUNT]
        return sorted(known, key=lambda word: (-called[word], word))[:MAX_WORDS]

    def knows(self, *words: str) -> bool:
        """Whether each of the words occurs at least MIN_WORD_COUNT times."""
        return all(self.counts[word] >= MIN_WORD_COUNT for word in words)
