"""Tasks of formal languages: brackets, parity, counting, and agreement in a tiny grammar."""

from __future__ import annotations

from random import Random

from glasslm.data.tasks.task import Example, Task, draw_below, draw_text

BRACKETS = {"(": ")", "[": "]", "{": "}"}
COUNTED_LETTERS = "abc"
NOUNS = {
    "dog": "dogs", "cat": "cats", "king": "kings", "girl": "girls", "tree": "trees",
    "ship": "ships", "house": "houses", "boy": "boys",
}  # fmt: skip
PREPOSITIONS = ("near", "by", "with")
ADJECTIVES = ("old", "red", "sad", "big")
NOUN_PHRASE = len("the old houses")  # characters of the longest


def draw_dyck(random: Random, size: int) -> Example:
    """`size` brackets that open and close in order; the answer closes those still open."""
    open_brackets: list[str] = []
    question = ""
    for _ in range(size):
        if open_brackets and random.random() < 0.4:
            question += BRACKETS[open_brackets.pop()]
        else:
            open_brackets.append("([{"[draw_below(random, 3)])
            question += open_brackets[-1]
    return Example(question, "".join(BRACKETS[bracket] for bracket in reversed(open_brackets)))


def draw_parity(random: Random, size: int) -> Example:
    """`size` bits; the answer is 1 where an odd number of them is 1."""
    bits = draw_text(random, "01", size)
    return Example(bits, str(bits.count("1") % 2))


def draw_counting(random: Random, size: int) -> Example:
    """`size` letters and one of them; the answer is how often it occurs, in two digits."""
    word = draw_text(random, COUNTED_LETTERS, size)
    asked = COUNTED_LETTERS[draw_below(random, len(COUNTED_LETTERS))]
    return Example(f"{word}?{asked}", f"{word.count(asked):02}")


def draw_agreement(random: Random, size: int) -> Example:
    """A subject with `size` nouns after it; the answer is the verb that agrees with the subject."""

    def noun_phrase(is_plural: bool) -> str:
        noun = list(NOUNS)[draw_below(random, len(NOUNS))]
        adjective = f"{ADJECTIVES[draw_below(random, len(ADJECTIVES))]} "
        has_adjective = random.random() < 0.5
        return f"the {adjective if has_adjective else ''}{NOUNS[noun] if is_plural else noun}"

    is_plural = random.random() < 0.5
    sentence = noun_phrase(is_plural)
    for _ in range(size):
        preposition = PREPOSITIONS[draw_below(random, len(PREPOSITIONS))]
        sentence += f" {preposition} {noun_phrase(random.random() < 0.5)}"
    return Example(sentence, "are" if is_plural else "is")


DYCK = Task(
    draw_dyck,
    size=12,
    max_size=100,
    size_unit="brackets",
    longest=lambda size: 2 * size + 2,
    rule="the brackets that close those still open, innermost first",
    phenomenon="Bounded nesting is learned with two layers, deeper nesting is not "
    "(arXiv:2105.11115).",
)
PARITY = Task(
    draw_parity,
    size=16,
    max_size=100,
    size_unit="bits",
    longest=lambda size: size + 3,
    rule="1 for an odd number of ones, else 0",
    phenomenon="Parity depends on every bit, which attention averages away (arXiv:1906.06755).",
)
COUNTING = Task(
    draw_counting,
    size=12,
    max_size=99,
    size_unit="letters",
    longest=lambda size: size + 6,
    rule="how often the asked letter occurs",
    phenomenon="Counts within the trained range are learned, larger ones are not "
    "(arXiv:2407.15160).",
)
GRAMMAR = Task(
    draw_agreement,
    size=2,
    max_size=6,
    size_unit="nouns after the subject",
    longest=lambda size: NOUN_PHRASE + size * (len(" near ") + NOUN_PHRASE) + len("=are\n"),
    rule="is or are, by the number of the first noun",
    phenomenon="Nouns between subject and verb mislead n-grams and small models "
    "(arXiv:1611.01368).",
    min_size=0,
)
