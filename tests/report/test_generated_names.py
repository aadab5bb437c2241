"""Lists of names are detected, and generated names are known, unseen, invented or well formed."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from pathlib import Path

from glasslm.data.name_list import is_name_list
from glasslm.inference.proportions import Proportion
from glasslm.report import generated_names

CODE = [inspect.getsource(module) for module in (textwrap, ast, json, inspect)]


def test_what_a_list_of_names_is() -> None:
    people = [
        f"{a}{b}"
        for a in ("Ann", "Jo", "Li", "Per", "Zo\u00eb")
        for b in ("", "a", "ette", "-Mae", " O'Neill")
    ]
    assert is_name_list("\n".join(people * 8) + "\n")
    assert is_name_list("\r\n".join(people * 8) + "\r\n")
    assert is_name_list("\u738b\u5c0f\u660e\n\u674e\u96ea\n" * 60)
    assert is_name_list("Names of people in alphabetical order:\n" + "\n".join(people * 8) + "\n")
    assert not is_name_list("\n".join(people * 3))  # too few to say
    assert not is_name_list("Floccinaucinihilipilification Honorificabilitudinitatibus\n" * 120)
    assert not is_name_list("3.14\n2.72\n1.41\n" * 60)
    assert not is_name_list("x = y\nreturn x\n" * 90)
    assert not is_name_list("ann,1\njo,2\n" * 90)
    assert not is_name_list("To be, or not to be\n" * 120)
    assert not is_name_list(
        ("We show that this holds in all cases that matter to us. " * 20 + "\n\n") * 120
    )
    assert not any(is_name_list(code) for code in CODE)


def test_lists_among_well_known_texts(data_dir: Path) -> None:
    name_lists_by_file = {
        path.name: is_name_list(path.read_text(encoding="utf-8")[: 64 << 10])
        for path in data_dir.glob("*.txt")
    }
    assert {name for name, is_list in name_lists_by_file.items() if is_list} == {"names.txt"}


def test_names_are_known_unseen_or_invented() -> None:
    train_part, val_part = "emma\nolivia\nava\nemma\nanna\nhann", "ah\nemma\nmia\nann\nmia\nxyz\n"
    generated = ["emma", "ava", "mia", "emava", "ah", "hann", "emava", "", " ", None]
    statistics = generated_names.compare_names(generated, train_part, val_part)
    assert statistics.known == Proportion(2, 10)
    assert statistics.unseen == Proportion(1, 10)  # mia
    assert statistics.invented == Proportion(
        4, 10
    )  # the name that is cut between the parts is in neither
    assert statistics.nothing == Proportion(3, 10)
    assert statistics.distinct == Proportion(6, 7)
    assert statistics.examples == ("emava", "ah", "hann")
    assert statistics.natural_known == Proportion(1, 5)  # emma of emma, mia, ann, mia, xyz
    assert statistics.natural_distinct == Proportion(4, 5)
    # emava: ^em, ema, mav ... mav is in no training name; ah: ^ah; hann: ^ha; mia and xyz neither;
    # ann: nn$ is not anna's
    assert statistics.well_formed == Proportion(0, 4)
    assert statistics.natural_well_formed == Proportion(0, 4)
    whole = generated_names.compare_names(["hann"], "emma\nhann\n", "ah\nmia\n")
    assert (whole.known, whole.natural_known) == (Proportion(1, 1), Proportion(0, 2))


def test_well_formed_is_made_of_known_trigrams() -> None:
    statistics = generated_names.compare_names(
        ["anna", "banan", "bana", "nanana", "ananas"], "banana\nanan\n", "banan\nnanas\nx\n"
    )
    assert statistics.invented == Proportion(4, 5)
    assert statistics.well_formed == Proportion(
        1, 4
    )  # bana: ^ba ban ana na$; anna: nna; nanana: ^na; ananas: nas
    assert statistics.natural_well_formed == Proportion(1, 3)  # banan: an$ is that of anan
