"""Minimal pairs: two texts that differ in one place, of which one is right.

The templates are filled with words that the model knows, after BLiMP (Warstadt et al.,
arXiv:1912.00582) and Marvin and Linzen (arXiv:1808.09031). A category without enough words is left
out, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from glasslm.inference.suites.vocabulary import Vocabulary

MIN_PAIRS = 10  # of a category
MAX_PAIRS = 120


class Pair(NamedTuple):
    """A right text, and one that differs from it in one place and is wrong."""

    right: str
    wrong: str


class Category(NamedTuple):
    """Pairs of one kind, and what they need of a vocabulary."""

    name: str
    example: str  # right / wrong
    needs: str
    make: Callable[[Vocabulary], Iterator[Pair]]


def _agreement(v: Vocabulary) -> Iterator[Pair]:
    for singular, plural in v.noun_pairs:
        for one, many in (("is", "are"), ("was", "were"), ("hath", "have"), ("has", "have")):
            if v.knows(one, many):
                yield Pair(f"the {singular} {one} ", f"the {singular} {many} ")
                yield Pair(f"the {plural} {many} ", f"the {plural} {one} ")


def _attraction(v: Vocabulary) -> Iterator[Pair]:
    others = v.noun_pairs[1:] + v.noun_pairs[:1]
    for (singular, plural), (other, others_plural) in zip(v.noun_pairs, others):
        if v.knows("of", "is", "are"):
            yield Pair(
                f"the {singular} of the {others_plural} is ",
                f"the {singular} of the {others_plural} are ",
            )
            yield Pair(f"the {plural} of the {other} are ", f"the {plural} of the {other} is ")


def _number(v: Vocabulary) -> Iterator[Pair]:
    for singular, plural in v.noun_pairs:
        for determiner, is_plural in (("this", 0), ("that", 0), ("these", 1), ("those", 1)):
            if v.knows(determiner):
                forms = (plural, singular) if is_plural else (singular, plural)
                right, wrong = (f"{determiner} {form} " for form in forms)
                yield Pair(right, wrong)


def _article(v: Vocabulary) -> Iterator[Pair]:
    for noun in v.nouns if v.knows("a", "an") else ():
        if noun[0] in "aeio":
            yield Pair(f"an {noun} ", f"a {noun} ")
        elif noun[0] not in "uh":  # "a use", "an hour"
            yield Pair(f"a {noun} ", f"an {noun} ")


def _order(v: Vocabulary) -> Iterator[Pair]:
    for noun in v.nouns:
        for preposition in ("of", "in", "to"):
            if v.knows(preposition, "and"):
                yield Pair(f"and {preposition} the {noun} ", f"and the {preposition} {noun} ")


def _pronouns(v: Vocabulary) -> Iterator[Pair]:
    subjects = (("he", "him"), ("they", "them"), ("we", "us"), ("I", "me"))
    for subject, object_form in subjects:
        for verb in ("will", "would", "shall", "may", "must", "can", "could", "should"):
            if v.knows(subject, object_form, verb):
                yield Pair(f"{subject} {verb} ", f"{object_form} {verb} ")
        for preposition in ("to", "with", "for", "of", "from", "by"):
            if v.knows(subject, object_form, preposition):
                yield Pair(f"{preposition} {object_form}, ", f"{preposition} {subject}, ")


def _brackets(v: Vocabulary) -> Iterator[Pair]:
    names = v.names
    for name, argument in zip(names, names[1:] + names[:1]):
        yield Pair(f"x = {name}({argument})\n", f"x = {name}({argument}]\n")
        yield Pair(f"x = {name}[{argument}]\n", f"x = {name}[{argument})\n")


def _quotes(v: Vocabulary) -> Iterator[Pair]:
    names = v.names
    for name, word in zip(names, names[1:] + names[:1]):
        yield Pair(f"{name}('{word}')\n", f"{name}('{word}\")\n")
        yield Pair(f'{name}("{word}")\n', f"{name}(\"{word}')\n")


def _colons(v: Vocabulary) -> Iterator[Pair]:
    for name in v.names if v.knows("def", "self", "return") else ():
        start, body = f"    def {name}(self)", "\n        return"
        yield Pair(f"{start}:{body}", f"{start}{body}")
        yield Pair(f"    return {name}(self)\n", f"    return {name}(self):\n")


NOUN_FORMS = "nouns in singular and plural after a determiner"
CALLS = "words before an opening bracket"
CATEGORIES = (
    Category("agreement", "the king is / the king are", NOUN_FORMS, _agreement),
    Category("attraction", "the king of the lords is / are", NOUN_FORMS, _attraction),
    Category("number", "this king / this kings", NOUN_FORMS, _number),
    Category("article", "an eye / a eye", 'nouns after "the"', _article),
    Category("order", "and of the king / and the of king", 'nouns after "the"', _order),
    Category("pronouns", "he will / him will", "pronouns in both cases", _pronouns),
    Category("brackets", "x = len(name) / x = len(name]", CALLS, _brackets),
    Category("quotes", "open('name') / open('name\")", CALLS, _quotes),
    Category("colons", "def f(self): / def f(self)", CALLS, _colons),
)


def make_pairs(vocabulary: Vocabulary, category: Category) -> list[Pair]:
    """Up to MAX_PAIRS pairs of a category; [] where the vocabulary does not allow MIN_PAIRS."""
    pairs = (
        pair for pair in category.make(vocabulary) if set("".join(pair)) <= vocabulary.characters
    )
    chosen = list(islice(pairs, MAX_PAIRS))
    return chosen if len(chosen) >= MIN_PAIRS else []
