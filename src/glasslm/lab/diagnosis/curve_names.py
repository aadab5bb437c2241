"""The names that training programs give to the columns of their logs."""

from __future__ import annotations

from glasslm.lab.tables.columns import normalize_name

# The names of a column in lower case, with underscores for all other characters. Earlier names are
# preferred.
STEP_NAMES = (
    "step",
    "steps",
    "global_step",
    "trainer_global_step",
    "train_global_step",
    "iter",
    "iters",
    "iteration",
    "iterations",
    "iter_num",
    "num_updates",
    "update",
    "updates",
    "batch",
    "it",
    "s",
    "trainer_batch",
)
# A longer name is one of steps as "validation loss at iteration" or "completed step" is, but not
# as "time per step" or "train_loss_step".
STEP_ENDINGS = {"step", "iteration", "iter", "updates"}
PREPOSITIONS = {"at", "in", "after", "on", "for"}
STEP_QUALIFIERS = {
    "train", "training", "trainer", "val", "valid", "validation", "eval", "test", "global",
    "optimizer", "completed", "current", "num", "number", "of", "model",
}  # fmt: skip
EPOCH_NAMES = ("epoch", "train_epoch", "epochs")
LOSS_NAMES = (
    "loss",
    "train_loss",
    "training_loss",
    "loss_train",
    "train_loss_step",
    "loss_step",
    "reduced_train_loss",
    "loss_train_total",
    "train_cross_entropy",
    "train_cross_entropy_loss",
    "cross_entropy",
    "lm_loss",
    "ce_loss",
    "nll_loss",
    "nll",
    "trl",
    "loss_metrics_global_avg_loss",
    "train_loss_epoch",
    "train",
    "train_bpb",
    "bpb",
)
VALIDATION_NAMES = (
    "val_loss",
    "eval_loss",
    "valid_loss",
    "validation_loss",
    "loss_val",
    "loss_valid",
    "loss_eval",
    "dev_loss",
    "test_loss",
    "val_loss_epoch",
    "val_cross_entropy",
    "validate_loss",
    "lm_loss_value",
    "tel",
    "val",
    "valid",
    "val_bpb",
    "eval_bpb",
    "validation_bpb",
)
GRAD_NORM_NAMES = (
    "grad_norm",
    "train_grad_norm",
    "gradient_norm",
    "gradnorm",
    "gnorm",
    "grad_norm_total",
    "total_grad_norm",
    "total_norm",
    "global_grad_norm",
    "norm",
    "grad",
)
RATE_NAMES = ("lr", "learning_rate", "train_lr", "train_learning_rate")
TOKEN_NAMES = (
    "tokens", "tokens_seen", "num_tokens", "n_tokens", "total_tokens", "train_tokens",
    "trained_tokens", "training_tokens", "consumed_tokens", "throughput_total_tokens", "samples",
    "consumed_samples", "num_samples", "examples",
)  # fmt: skip

# Other names are recognized by their words: one of the role, and beside it only words that change
# nothing, as in "metrics/train/LanguageCrossEntropy" or "optim/total grad norm".
LOSS_WORDS = {"loss", "losses", "nll", "entropy", "crossentropy", "ce", "xent", "bpb", "bpc"}
VALIDATION_WORDS = {
    "val", "valid", "validation", "validate", "validating", "eval", "evaluation", "dev", "test",
    "heldout",
}  # fmt: skip
PLAIN_WORDS = {
    "train", "training", "trainer", "metrics", "metric", "total", "average", "avg", "mean",
    "global", "reduced", "running", "smoothed", "out", "lm", "language", "cross", "model", "main",
    "optim", "optimizer", "results", "value", "step", "bits", "nats", "per", "token", "byte",
    "char", "character", "of", "set", "raw",
}  # fmt: skip
NORM_WORDS = {"norm", "gnorm", "gradnorm"}
NORM_PLAIN_WORDS = PLAIN_WORDS | {"grad", "gradient", "gradients", "l2", "unclipped"}
RATE_WORDS = {"lr", "learning"}
RATE_PLAIN_WORDS = PLAIN_WORDS | {"rate", "group0", "adamw", "adam", "decoupledadamw", "pg1"}


def ends_with_step(name: str) -> bool:
    """Whether a longer name is one of steps.

    >>> ends_with_step("validation loss at iteration"), ends_with_step("train_loss_step")
    (True, False)
    """
    *before, last = normalize_name(name).split("_")
    return (
        last in STEP_ENDINGS
        and bool(before)
        and (before[-1] in PREPOSITIONS or STEP_QUALIFIERS.issuperset(before))
    )
