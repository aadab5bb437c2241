"""Which columns of a table of runs are N, D, C and the loss: by known names, else by words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from glasslm.lab.tables.columns import (
    UNITS,
    Column,
    find_by_words,
    find_columns,
    find_perplexity,
    normalize_name,
)
from glasslm.lab.tables.rows import Table

# Names in lower case with underscores; earlier names are preferred.
COLUMN_NAMES = {
    "N": (
        "n",
        "params",
        "parameters",
        "parameter",
        "n_params",
        "num_params",
        "n_parameters",
        "num_parameters",
        "total_params",
        "params_total",
        "total_parameters",
        "parameter_count",
        "param_count",
        "model_size",
        "model_params",
        "model_parameters",
        "size",
        "non_embedding_params",
        "n_non_embedding",
        "non_embedding_parameters",
        "params_non_embedding",
        "non_embed_params",
        "active_params",
        "model_n",
    ),
    "D": (
        "d",
        "tokens",
        "n_tokens",
        "num_tokens",
        "train_tokens",
        "training_tokens",
        "tokens_seen",
        "total_tokens",
        "tokens_trained",
        "dataset_size",
        "data",
        "token_count",
    ),
    "C": (
        "c",
        "flops",
        "flop",
        "compute",
        "training_flops",
        "training_flop",
        "train_flops",
        "train_flop",
        "total_flops",
        "total_flop",
        "training_compute",
        "train_compute",
        "compute_flops",
    ),
    "loss": (
        "loss",
        "val_loss",
        "final_val_loss",
        "final_loss",
        "eval_loss",
        "validation_loss",
        "valid_loss",
        "test_loss",
        "final_eval_loss",
        "best_val_loss",
        "loss_val",
        "cross_entropy",
        "ce_loss",
        "nll",
        "train_loss",
        "training_loss",
        "final_train_loss",
        "val_bpb",
        "final_val_bpb",
        "eval_bpb",
        "bpb",
        "train_bpb",
        "bits_per_byte",
    ),
    "seed": ("seed", "random_seed", "run_seed"),
    "unique": ("unique_tokens", "unique_d", "u", "corpus_tokens", "unique_data", "tokens_unique"),
    "ratio": (
        "tokens_per_param", "tokens_per_parameter", "d_n", "token_multiplier", "token_mult", "tpp",
        "tokens_per_params", "token_ratio", "tokens_param_ratio", "d_over_n", "m",
    ),
}  # fmt: skip
LOSS_LETTER = ("l",)  # L, which also counts layers, so that every other loss is preferred
ROLES = ("N", "D", "C", "loss", "seed", "unique", "ratio")  # that --columns can name

# Other names are recognized by their words: one of the first set, and only words of the second
# beside it.
COUNTING_WORDS = {"n", "num", "number", "no", "nb", "of", "total", "count", "all", "the", "final"}
COLUMN_WORDS = {
    "N": (
        {"params", "param", "parameters", "parameter"},
        COUNTING_WORDS
        | {"non", "embedding", "embeddings", "embed", "emb", "model", "active", "trainable", "size",
           "excluding", "including", "without", "with", "excl", "incl", "matmul", "weights"},
    ),
    "D": (
        {"tokens", "token"},
        COUNTING_WORDS
        | {"train", "training", "trained", "seen", "processed", "consumed", "pretraining",
           "pretrain", "data", "size", "dataset", "used"},
    ),
    "C": (
        {"flops", "flop", "compute"},
        COUNTING_WORDS | {"train", "training", "pretraining", "budget", "model", "estimated"},
    ),
    "loss": (
        {"loss", "xent", "nll", "crossentropy", "bpb", "ce", "bits", "bpt"},
        COUNTING_WORDS
        | {"cross", "entropy", "val", "validation", "valid", "eval", "evaluation", "test", "train",
           "training", "lm", "language", "bits", "nats", "per", "token", "byte", "mean", "average",
           "avg", "en", "best", "c4", "pile", "paloma", "fineweb", "edu", "dclm", "wikitext",
           "openwebtext", "owt", "redpajama", "rpj", "refinedweb", "lambada", "slimpajama",
           "metrics", "model", "set", "out", "heldout", "minipile", "wiki", "web",
           "char", "character"},
    ),
    "unique": ({"unique"}, COUNTING_WORDS | {"tokens", "data", "train", "training", "size"}),
}  # fmt: skip
NAME_COLUMNS = ("model", "name", "model_name", "run", "run_name", "size", "variant", "config")
_SIZE_IN_NAME = re.compile(
    r"(?<![\w.])(\d+(?:\.\d+)?\s*(?:[kmb]|bn|million|billion))(?![a-z])", re.I
)
_TRAINING = re.compile(r"(?:^|_)train(?:ing)?(?:_|$)")


def find_candidates(table: Table) -> dict[str, list[Column]]:
    """The columns that may have each role, the preferred one first."""
    found = {role: find_columns(table, names) for role, names in COLUMN_NAMES.items()}
    for role, (required, allowed) in COLUMN_WORDS.items():
        by_words = find_by_words(table, required, allowed)
        if role == "loss":  # a validation loss before a training loss
            by_words.sort(
                key=lambda column: _TRAINING.search(normalize_name(column.name)) is not None
            )
        known = {column.name for column in found[role]}
        found[role] += [column for column in by_words if column.name not in known]
    taken = {column.name for columns in found.values() for column in columns}
    if not found["C"]:
        found["C"] = [
            Column(name, UNITS[unit])
            for name in table.names
            if (unit := normalize_name(name)) in UNITS and unit.endswith(("flop", "flops", "days"))
        ]
    if not found["loss"]:
        found["loss"] = [column for column in find_perplexity(table) if column.name not in taken]
    found["loss"] += find_columns(table, LOSS_LETTER)
    return found


def read_sizes_in_names(table: Table) -> tuple[str, dict[int, str]]:
    """A column of names with sizes in them, such as "pythia-160m", and the sizes by line.

    "" if there is none, or a name has none or two of them.
    """
    by_name = {normalize_name(name): name for name in reversed(table.names)}
    for word in NAME_COLUMNS:
        name = by_name.get(word)
        if name is None:
            continue
        sizes = {
            row.line: _SIZE_IN_NAME.findall(str(row.cells.get(name, "")).replace("-", " "))
            for row in table.rows
        }
        if sizes and all(len(found) == 1 for found in sizes.values()):
            return name, {line: found[0] for line, found in sizes.items()}
    return "", {}


def other_columns(candidates: Sequence[Column], chosen: Column) -> list[Column]:
    """The candidates beside the chosen one."""
    return [column for column in candidates if column.name != chosen.name]
