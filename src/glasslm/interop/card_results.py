"""The results in a model card: the losses of the exported checkpoint, beside simple baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping

from glasslm.data.baselines import simple_baselines
from glasslm.interop.model_export import ModelExport
from glasslm.report import data_checks, report_tables, run_report
from glasslm.report.page import markdown_table
from glasslm.runs.metrics import EvalLine, Split
from glasslm.text import format_bytes, format_number

SPLITS: dict[Split, str] = {"val": "the validation text", "test": "the test text",
                            "old": "the validation text of the base run"}  # fmt: skip


def measured_results(export: ModelExport, evals: Mapping[Split, EvalLine]) -> list[str]:
    """The table of the evaluations of the exported checkpoint, beside simple baselines."""
    if not evals:
        return ["The model was not measured at this step."]
    tuned = [line for line in evals.values() if "preference" in line]
    if tuned:
        evals = {split: line for split, line in evals.items() if "preference" not in line}
        parts = _preference_results(export, tuned[0])
        return [*parts, *measured_results(export, evals)] if evals else parts
    data = export.run.config.data
    answers_of = "examples" if data.task else "conversations"
    rows = [
        (
            f"the answers in the validation {answers_of}"
            if data.predicts_answers and split == "val"
            else SPLITS.get(split, split),
            format_number(line["loss"], ".4f"),
            format_number(line.get("perplexity"), ".2f"),
            format_number(line.get("bpb"), ".4f"),
            f"{line.get('tokens', 0):,}",
            "all of it" if line.get("whole") else "a sample",
        )
        for split, line in evals.items()
    ]
    V = export.vocab_size
    rows += [("a uniform guess", f"{math.log(V):.4f}", f"{V:,}", "", "", "")]
    rows += [(name, "", "", bpb, "", extent) for name, bpb, extent in _baseline_rows(export)]
    header = (
        "measured on",
        "loss (nats per token)",
        "perplexity",
        "bits per byte",
        "tokens",
        "extent",
    )
    explanation = (
        "Loss is the mean cross-entropy of the next token. Bits per byte can be compared between "
        "models with different tokenizers."
    )
    if export.tokenizer.special_tokens:
        explanation += (
            " Special tokens have no bytes: their nats count, and the bytes are those of the text "
            "without them."
        )
    return [markdown_table(rows, header), explanation]


def _preference_results(export: ModelExport, line: EvalLine) -> list[str]:
    """The held-out score of preference tuning, whose loss is no cross-entropy."""
    settings = export.run.config.preference
    rows = [(f"loss ({report_tables.loss_unit(settings)})", format_number(line["loss"], ".4f"))]
    rows += [(name, format_number(value, ".3f")) for name, value in line["preference"].items()]
    held_out = "prompts" if settings.reward else "pairs"
    return [f"On held-out {held_out}, which training did not see:", markdown_table(rows)]


def _baseline_rows(export: ModelExport) -> list[tuple[str, str, str]]:
    """Rows of baseline, bits per byte, extent; empty if the text is not cached or not learned."""
    if export.run.config.preference.is_active:
        return []
    dataset = run_report.cached_dataset(export.run)
    # The loss of answers is no loss of a text.
    if dataset is None or export.run.config.data.predicts_answers:
        return []
    text = data_checks.decode_bytes(
        dataset.val.tokens, dataset.tokenizer, data_checks.MAX_VALIDATION_BYTES
    )
    if not text:
        return []
    bpb = simple_baselines(text)
    extent = f"{format_bytes(len(text))} of the validation text"
    extent += ", without special tokens" if dataset.tokenizer.special_tokens else ""
    return [
        ("single bytes", f"{bpb['unigram_bpb']:.4f}", extent),
        ("gzip -9", f"{bpb['gzip_bpb']:.4f}", extent),
    ]
