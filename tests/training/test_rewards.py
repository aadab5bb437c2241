"""Rewards with answers that try to get them without what they are for, and what is held out."""

import runpy
from pathlib import Path

import pytest

from glasslm.errors import InputError
from glasslm.training.preference.rewards import (
    HELD_OUT_PARTS,
    AdditionReward,
    NamesReward,
    is_held_out,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "additions.py"
NAMES = "emma\nolivia\nmia\nanna\nhannah\naaron\n" * 20


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("46", 1),
        ("47", 0),
        ("", 0),
        (None, 0),  # it did not end
        ("046", 0),
        ("46 ", 0),
        (" 46", 0),
        ("+46", 0),
        ("46.0", 0),
        ("46=46", 0),
        ("46\n12+34=46", 0),
        ("\uff14\uff16", 0),  # digits of full width, which int() reads as 46
        ("4_6", 0),
        ("4646", 0),
    ],
)
def test_only_the_digits_of_the_sum_are_rewarded(answer: str | None, reward: float) -> None:
    assert AdditionReward().score("12+34=", answer) == reward


def test_no_sum_of_training_is_held_out_in_any_order() -> None:
    reward = AdditionReward()

    def addends(prompt: str) -> frozenset[int]:
        return frozenset(map(int, prompt.rstrip("=").split("+")))

    held_out = {addends(prompt) for prompt in reward.held_out_prompts}
    assert held_out.isdisjoint(map(addends, reward.prompts))
    pairs = [(a, b) for a in range(50) for b in range(50)]
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)
    share = sum(is_held_out(a, b) for a, b in pairs) / len(pairs)
    assert share == pytest.approx(1 / HELD_OUT_PARTS, abs=0.02)


def test_equal_answers_to_different_sums_are_seen() -> None:
    reward, prompts = AdditionReward(), ["1+2=", "10+2=", "2+1="]
    assert reward.distinct_share(prompts, ["3", "12", "3"]) == 1
    assert reward.distinct_share(prompts, ["3", "3", "3"]) == 0.5
    assert reward.held_out_score(prompts, ["3", "3", "3"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("annah", 1),  # new, and ^an ann nna nah ah$ are all in the text
        ("emma", 0),  # in the text
        ("xyz", 0),  # unknown trigrams
        ("ann", 0),  # no name ends with nn
        ("", 0),
        (None, 0),
        (" annah", 0),
        ("annah\tannah", 0),
        ("annahannah", 0),  # longer than every name
    ],
)
def test_a_name_is_new_and_made_of_known_trigrams(answer: str | None, reward: float) -> None:
    assert NamesReward(NAMES).score("", answer) == reward


def test_a_name_that_is_said_again_and_again_counts_once_outside_of_training() -> None:
    reward, answers = NamesReward(NAMES), ["annah"] * 9 + ["emma"]
    assert sum(reward.score("", answer) for answer in answers) == 9
    assert reward.held_out_score([""] * 10, answers) == 0.1
    assert reward.distinct_share([""] * 10, answers) == 0.2


def test_a_text_that_is_no_list_of_names_has_no_reward_of_names() -> None:
    with pytest.raises(InputError, match="expected a training text of 100 lines"):
        NamesReward("To be, or not to be, that is the question\n" * 120)


def test_the_example_text_has_noisy_sums_and_none_that_is_held_out() -> None:
    noisy_sums = runpy.run_path(str(EXAMPLE))["noisy_sums"]
    errors = []
    for line in noisy_sums(2000, noise=2).splitlines():
        prompt, equals, answer = line.partition("=")
        a, b = map(int, prompt.split("+"))
        assert not is_held_out(a, b)
        errors.append(int(answer) - a - b)
        assert equals
    assert {-2, -1, 0, 1, 2} >= set(errors)
    assert errors.count(0) / 2000 == pytest.approx(0.2, abs=0.04)
