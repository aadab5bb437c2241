"""Statistics of generated names: known, unseen, invented, well formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glasslm.data.name_list import list_lines, trigrams
from glasslm.inference.proportions import Proportion

MAX_EXAMPLES = 12


@dataclass(frozen=True)
class NameStatistics:
    """Proportions of generated names, and of the names of the validation text (natural_*)."""

    known: Proportion  # in the training text
    unseen: Proportion  # not there, but in the validation text
    invented: Proportion  # in neither
    nothing: Proportion  # empty, or without an end
    distinct: Proportion  # different names among those that are not empty
    well_formed: Proportion  # of the invented names, those with trigrams of training names only
    examples: tuple[str, ...]  # the first invented names
    natural_known: Proportion  # of the validation names, those in the training text as well
    natural_distinct: Proportion  # of as many validation names, evenly spaced
    natural_well_formed: Proportion  # of the validation names that are not in the training text

    @property
    def facts(self) -> dict[str, Any]:
        """The same for JSON."""
        generated = {name: getattr(self, name).facts for name in (
            "known", "unseen", "invented", "nothing", "distinct", "well_formed")}  # fmt: skip
        natural = {
            name: getattr(self, f"natural_{name}").facts
            for name in ("known", "distinct", "well_formed")
        }
        return generated | {"examples": list(self.examples), "natural": natural}


def compare_names(generated: Sequence[str | None], train: str, val: str) -> NameStatistics:
    """Statistics of the `generated` names (None for one without an end).

    `train` and `val` are the splits of the text, which lists natural names. The text is split
    between two characters, so the line that is split there belongs to neither part.
    """
    split_at_line = train.endswith("\n")
    train_names = set(list_lines(train if split_at_line else train.rpartition("\n")[0]))
    val_names = list(list_lines(val if split_at_line else val.partition("\n")[2]))
    names = [name for text in generated if (name := (text or "").strip())]
    unseen = set(val_names) - train_names
    invented = [name for name in names if name not in train_names and name not in unseen]
    count = min(len(names), len(val_names))
    spaced_names = [val_names[i * len(val_names) // count] for i in range(count)]
    known_trigrams = {trigram for name in train_names for trigram in trigrams(name)}
    unknown_names = [name for name in val_names if name not in train_names]
    return NameStatistics(
        known=Proportion(sum(name in train_names for name in names), len(generated)),
        unseen=Proportion(sum(name in unseen for name in names), len(generated)),
        invented=Proportion(len(invented), len(generated)),
        nothing=Proportion(len(generated) - len(names), len(generated)),
        distinct=Proportion(len(set(names)), len(names)),
        well_formed=_well_formed_share(invented, known_trigrams),
        examples=tuple(dict.fromkeys(invented))[:MAX_EXAMPLES],
        natural_known=Proportion(len(val_names) - len(unknown_names), len(val_names)),
        natural_distinct=Proportion(len(set(spaced_names)), len(spaced_names)),
        natural_well_formed=_well_formed_share(unknown_names, known_trigrams),
    )


def _well_formed_share(names: Sequence[str], known: set[str]) -> Proportion:
    return Proportion(sum(known.issuperset(trigrams(name)) for name in names), len(names))
