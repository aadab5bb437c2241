"""The number of parameters of a transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from glasslm.config.schema import ModelConfig
from glasslm.course.learn.exercise import Case, CaseRandom, Exercise, Mistake, Sizes, VerdictName
from glasslm.model.parameters import parameter_table

NO_CHANGE: Mapping[str, float] = MappingProxyType({})


def count_parameters(V: int, L: int, D: int, H: int, K: int, F: int, tied: bool) -> int:
    """The parameters of a model with RMSNorm, SwiGLU and no biases."""
    attention = 2 * D * D + 2 * D * (D // H * K)  # queries and output; keys and values
    feedforward, norms = 3 * D * F, 2 * D
    layers = L * (attention + feedforward + norms)
    return V * D + layers + D + (0 if tied else V * D)


def configuration(L: int, D: int, H: int, K: int, F: int, tied: bool) -> ModelConfig:
    """glasslm's own kind of model: RMSNorm, SwiGLU, rotary positions, no biases."""
    return ModelConfig(n_layers=L, d_model=D, n_heads=H, n_kv_heads=K, d_ff=F, tie_embeddings=tied)


def count_by_part(V: int, L: int, D: int, H: int, K: int, F: int, tied: bool) -> dict[str, int]:
    """The parameters of each part of the model, from the same table."""
    counts = dict.fromkeys(PART_WORDS, 0)
    for name, spec in parameter_table(configuration(L, D, H, K, F, tied), V).items():
        part = next(p for p, words in PART_WORDS.items() if any(word in name for word in words))
        counts[part] += spec.size
    return counts


PART_WORDS = {  # words in the names of a part's weights; the first part that fits
    "embedding": ("embedding.",),
    "queries": (".q.",),
    "keys": (".k.",),
    "values": (".v.",),
    "output projections": (".o.",),
    "feed-forwards": ("feedforward.",),
    "norms of the layers": ("_norm.",),
    "last norm": ("norm.",),
    "head": ("head.",),
}


def reference(
    V: int,
    L: int,
    D: int,
    H: int,
    K: int,
    F: int,
    tied: bool,
    *,
    times: Mapping[str, float] = NO_CHANGE,
    added: Callable[..., float] = lambda V, L, D, H, K, F, tied: 0,
    formula: Callable[..., float] | None = None,
) -> float:
    """The count. `times` are wrong factors of its parts, `added` is a wrong part more."""
    sizes = (V, L, D, H, K, F, tied)
    if formula:
        return formula(*sizes)
    counts = count_by_part(*sizes)
    return sum(times.get(part, 1) * n for part, n in counts.items()) + added(*sizes)


def _total(sizes: tuple[Any, ...], times: Mapping[str, float]) -> float:
    return reference(*sizes, times=times)


IN_LAYERS = tuple(part for part in PART_WORDS if part not in ("embedding", "last norm", "head"))


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    return Case(dict(sizes), {**sizes, "tied": number % 2 == 1})


def _wrong(verdict: VerdictName, sentence: str, **changes: Any) -> Mistake:
    return Mistake(verdict, "count", sentence, changes)


EXERCISE = Exercise(
    name="count_parameters",
    title="parameter count",
    task="Count the parameters of a transformer with RMSNorm, SwiGLU and rotary positions, and no "
    "biases: the embedding, L layers, a last norm, and a head of its own unless it is tied.",
    signature="count_parameters(V, L, D, H, K, F, tied)",
    shapes="""V     size of the vocabulary
L     layers
D     width; a head has D / H entries
H, K  query heads, and key-value heads
F     inner width of the feed-forward, which has three matrices
tied  True: the head is the embedding; False: it is a matrix of its own
returns an int""",
    reference=reference,
    sizes=Sizes.of(
        "V L D H K F",
        small="3 1 2 1 1 1, 3 1 4 2 1 3",
        distinct="11 2 12 3 1 7, 13 3 16 4 2 9, 17 5 24 6 3 10, 29 4 20 5 1 18, 7 6 8 2 1 21, "
        "31 7 36 6 2 25",
        equal="8 2 8 2 2 8, 12 3 12 3 3 12, 11 2 12 3 1 7, 13 3 16 4 2 9, 17 5 24 6 3 10",
    ),
    draw=draw,
    hints=(
        "A matrix has outputs times inputs parameters; an RMSNorm has D, its gain.",
        "Attention has four matrices: D x D for the queries and the output, and (K D / H) x D for "
        "the keys and for the values.",
        "A layer has two norms, one before each half, and the model one more at the end.",
        "V D + L (2 D D + 2 D K D / H + 3 D F + 2 D) + D, and V D more if the head is not tied.",
    ),
    derivation="Parameters and FLOPs",
    solution="course/learn/exercises/count_parameters.py:count_parameters",
    needs=("attention", "swiglu", "rms_norm"),
    outputs=("count",),
    mistakes=(
        _wrong(
            "other",
            "the head is counted although it is tied: then it is the embedding's table",
            added=lambda V, L, D, H, K, F, tied: V * D * tied,
        ),
        _wrong(
            "missing_term",
            "the head is never counted: it has V D parameters of its own unless it is tied",
            times={"head": 0},
        ),
        _wrong(
            "other",
            "tied is used the wrong way round: a tied head adds nothing",
            added=lambda V, L, D, H, K, F, tied: V * D * (1 if tied else -1),
        ),
        _wrong(
            "missing_term",
            "the norms are left out: two in each layer and one at the end, D parameters each",
            times={"norms of the layers": 0, "last norm": 0},
        ),
        _wrong("missing_term", "the last norm is left out, D parameters", times={"last norm": 0}),
        _wrong(
            "missing_term",
            "the norms of the layers are left out, 2 D parameters each",
            times={"norms of the layers": 0},
        ),
        _wrong(
            "missing_term",
            "a layer has one norm only: it has two, one before attention and one before the "
            "feed-forward",
            times={"norms of the layers": 0.5},
        ),
        _wrong(
            "other",
            "the norms are not in the layers: each of the L layers has two",
            formula=lambda *s: _total(s, {"norms of the layers": 1 / s[1]}),
        ),
        _wrong(
            "other",
            "keys and values are counted with all H heads: they have K heads",
            added=lambda V, L, D, H, K, F, tied: 2 * L * D * (D - D // H * K),
        ),
        _wrong(
            "factor",
            "keys and values are counted once: each has a matrix of its own",
            times={"values": 0},
        ),
        _wrong(
            "missing_term",
            "keys and values are left out",
            times={"values": 0, "keys": 0},
        ),
        _wrong(
            "other",
            "keys and values have one head's width: they have K heads of D / H",
            formula=lambda *s: _total(s, {"keys": 1 / s[4], "values": 1 / s[4]}),
        ),
        _wrong(
            "missing_term",
            "the output projection of attention is left out, D x D",
            times={"output projections": 0},
        ),
        _wrong(
            "factor",
            "the feed-forward has two matrices: SwiGLU has three, gate, up and down",
            times={"feed-forwards": 2 / 3},
        ),
        _wrong(
            "factor",
            "the feed-forward has one matrix: SwiGLU has three, gate, up and down",
            times={"feed-forwards": 1 / 3},
        ),
        _wrong(
            "other",
            "the feed-forward is counted as 8 D²: it is 3 D F with this F",
            formula=lambda *s: _total(s, {"feed-forwards": 8 * s[2] / 3 / s[5]}),
        ),
        _wrong(
            "missing_term",
            "the feed-forwards are left out",
            times={"feed-forwards": 0},
        ),
        _wrong("missing_term", "the embedding is left out, V D", times={"embedding": 0}),
        _wrong(
            "other",
            "this is the estimate 12 L D² + V D of a model with F = 4 D and two matrices in the "
            "feed-forward: count this one",
            formula=lambda V, L, D, H, K, F, tied: 12 * L * D * D + V * D,
        ),
        _wrong(
            "factor",
            "one layer is counted: there are L",
            formula=lambda *s: _total(s, dict.fromkeys(IN_LAYERS, 1 / s[1])),
        ),
        _wrong(
            "other",
            "the feed-forward has biases, 2 F + D in each layer: this model has none",
            added=lambda V, L, D, H, K, F, tied: L * (2 * F + D),
        ),
        _wrong(
            "other",
            "attention has biases: this model has none",
            added=lambda V, L, D, H, K, F, tied: L * (2 * D + 2 * D // H * K),
        ),
        _wrong(
            "other",
            "the norms have a bias, as in LayerNorm: RMSNorm has a gain only",
            added=lambda V, L, D, H, K, F, tied: (2 * L + 1) * D,
        ),
        _wrong(
            "other",
            "the embedding is subtracted: count all parameters, not those without it",
            added=lambda V, L, D, H, K, F, tied: -V * D * (2 if tied else 3),
        ),
        _wrong(
            "other",
            "embedding and head are left out: count all parameters",
            times={"embedding": 0, "head": 0},
        ),
        _wrong(
            "other",
            "an untied head has a bias: it has V D parameters",
            added=lambda V, L, D, H, K, F, tied: 0 if tied else V,
        ),
    ),
    keeps_dtype=False,
)
