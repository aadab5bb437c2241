"""The made-up dialogues: right answers, held-out questions, characters that the corpus has."""

import re
from itertools import islice

import pytest

from glasslm.config.schema import DataConfig
from glasslm.data.chat import dialogues
from glasslm.data.sources.corpora import find_source

FACTS = dict(zip(dialogues.FACTS, ("4", "2", "128", "256", "70"), strict=True))


@pytest.fixture(scope="module")
def parts() -> tuple[list[dialogues.Dialogue], list[dialogues.Dialogue]]:
    made = list(dialogues.generate(FACTS, 3000, 600))
    return made[:3000], made[3000:]


def scored(part: list[dialogues.Dialogue]) -> set[tuple[str, str, str]]:
    """Kind, text so far, and answer of each scored question."""
    return {
        (kind, " ".join(m["content"] for m in dialogue.messages[:i]), message["content"])
        for dialogue in part
        for i, (message, kind) in enumerate(zip(dialogue.messages, dialogue.kinds, strict=True))
        if kind
    }


def test_no_question_that_is_scored_is_in_training(
    parts: tuple[list[dialogues.Dialogue], list[dialogues.Dialogue]],
) -> None:
    training, held_out = parts
    pairs = {(d.messages[i]["content"], d.messages[i + 1]["content"])
             for d in training for i in range(0, len(d.messages), 2)}  # fmt: skip
    asked = [(kind, text, answer) for kind, text, answer in scored(held_out) if kind != "memory"]
    assert {kind for kind, _, _ in scored(held_out)} == set(dialogues.KINDS)
    for dialogue in held_out:
        for i, kind in enumerate(dialogue.kinds):
            if kind and kind != "memory":
                pair = dialogue.messages[i - 1]["content"], dialogue.messages[i]["content"]
                assert pair not in pairs
    assert asked
    sums = {frozenset(re.findall(r"\d+", a)[:2]) for k, _, a in scored(training) if k == "addition"}
    new = {frozenset(re.findall(r"\d+", a)[:2]) for k, _, a in scored(held_out) if k == "addition"}
    assert sums.isdisjoint(new)


def test_the_answers_are_right(
    parts: tuple[list[dialogues.Dialogue], list[dialogues.Dialogue]],
) -> None:
    for kind, text, answer in scored([*parts[0], *parts[1]]):
        numbers = [int(word) for word in re.findall(r"\d+", answer)]
        asked = [int(word) for word in re.findall(r"\d+", text)][-2:]
        if kind == "addition":
            assert numbers[0] + numbers[1] == numbers[2]
            assert numbers[:2] == asked
        elif kind == "comparison":
            assert numbers == [max(asked)]
        elif kind == "spelling":
            assert answer.replace(" ", "")[:-1] in text
        elif kind in ("memory", "greeting"):
            name = next(word for word in re.findall(r"\w+", answer) if word in dialogues.NAMES)
            assert name in text


def test_dialogues_fit_into_128_tokens_and_are_the_same_each_time() -> None:
    made = list(islice(dialogues.generate(FACTS, 1000, 0), 1000))
    assert made == list(dialogues.generate(FACTS, 1000, 0))
    sizes = [
        1 + sum(len(m["content"]) + (8 if m["role"] == "user" else 13) for m in d.messages)
        for d in made
    ]
    assert sum(size > 129 for size in sizes) <= 2
    assert dialogues.identity(FACTS) != dialogues.identity({})


def test_the_corpus_has_the_characters_of_the_conversations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dialogues, "N_CONVERSATIONS", 4000)
    text = "".join(find_source(DataConfig(corpus="dialogues"), lambda message: None).text())
    contents = {m["content"] for d in dialogues.generate(FACTS, 2000, 400) for m in d.messages}
    assert set("".join(contents)) | set("user assistant\n") <= set(text)
    held_out = {m["content"] for d in dialogues.generate(FACTS, 0, 400) for m in d.messages
                if "plus" in m["content"] and m["role"] == "assistant"}  # fmt: skip
    assert not any(f"\n{line}\n" in text for line in held_out)
