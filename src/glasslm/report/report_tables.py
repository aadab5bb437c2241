"""The tables and sentences of a report, from run.json and metrics.jsonl."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from glasslm.config.presets import PRESETS, preset_config
from glasslm.config.schema import ModelConfig, PreferenceConfig, RunConfig
from glasslm.model import parameters
from glasslm.runs.metrics import (
    ENDED_STATUSES,
    EvalLine,
    Line,
    elapsed_s,
    eval_lines,
    step_lines,
    timing_of,
)
from glasslm.text import format_bytes, format_duration, format_number, plural, quote_path

Row = tuple[str, str]
T = TypeVar("T")

SPLITS = ("train", "val", "test")
ENDINGS = {
    "finished": "The run did all its steps.",
    "stopped": "The run stopped early: it reached the target loss, or the loss no longer improved.",
    "time": "The run ended at its time limit, before its last step: the machine had become slower. "
    "Its learning rate had not reached its end.",
    "interrupted": "The run was interrupted. `glasslm resume` continues it.",
    "diverged": "Training diverged: its losses are not finite, or more than a nat above the start. "
    "Try a lower learning rate first.",
    "failed": "The run ended with an error. "
    "`glasslm resume` continues it from the last checkpoint.",
    None: "The run has no end in metrics.jsonl: it is still training, or it was killed. "
    "`glasslm resume` continues it from the last checkpoint.",
}


def headline_tiles(
    best: EvalLine | None, lines: list[Line], vocab_size: int
) -> list[tuple[str, str, str]]:
    """Label, value and note of the most important numbers."""
    timing = [timing_of(line) for line in lines if line.get("timing")]
    tiles = []
    if best is not None and "preference" in best:
        note = f"at step {best['step']:,}"
        tiles = [("best held-out loss", format_number(best["loss"], ".4f"), note)]
        tiles += [
            (f"held-out {name}", format_number(value, ".3f"), note)
            for name, value in best["preference"].items()
        ]
    elif best is not None:
        bpb = best.get("bpb")
        tiles += [
            (
                "best validation loss",
                format_number(best["loss"], ".4f"),
                f"nats per token, at step {best['step']:,}",
            ),
            (
                "perplexity",
                format_number(best.get("perplexity"), ".2f"),
                f"{vocab_size:,} for a uniform guess",
            ),
            (
                "bits per byte",
                format_number(bpb, ".3f"),
                f"{bpb / 8:.0%} of the uncompressed size" if bpb else "",
            ),
        ]
    steps = step_lines(lines)
    if timing:
        last = plural(steps[-1]["step"], "step") if steps else "no logged step"
        tiles += [("time", format_duration(elapsed_s(lines)), last)]
    if steps and steps[-1].get("tokens"):
        epoch = steps[-1].get("epoch")
        tiles += [
            (
                "tokens seen",
                f"{steps[-1]['tokens']:,}",
                f"{epoch:.3g} epochs" if epoch is not None else "",
            )
        ]
    speeds = sorted(t["tokens_per_s"] for t in timing if t.get("tokens_per_s") is not None)
    if speeds:
        peaks = [m for t in timing if (m := t.get("memory_bytes")) is not None]
        memory = f"up to {format_bytes(max(peaks))} of memory" if peaks else ""
        tiles += [("tokens per second", f"{speeds[len(speeds) // 2]:,.0f}", memory)]
    return tiles


def loss_unit(settings: PreferenceConfig) -> str:
    """The unit of the losses of a run."""
    if settings.reward:
        return "1 - reward"
    return "nats per pair" if settings.preferences else "nats per token"


def objective_unit(config: RunConfig) -> str:
    """The unit of the losses of a run, which says whether only the tokens of answers count."""
    is_answer = config.data.predicts_answers and not config.preference.is_active
    return loss_unit(config.preference) + " of an answer" * is_answer


def describe_best_eval(best: EvalLine | None, predicts_answers: bool) -> str:
    """A sentence: on how much text, or on how many answers in it, the best loss was measured."""
    if best is None:
        return "No finite validation loss was recorded."
    if "preference" in best:
        return f"The best loss was measured on {best['tokens']:,} tokens of held-out answers."
    extent = "all" if best.get("whole") else "an evenly spaced sample of"
    error = best.get("stderr")
    exactness = "" if error is None else f", with a standard error of {error:.4f} nats per token"
    return (
        f"The best loss was measured on {extent} {best.get('tokens', 0):,} tokens of the "
        + "answers in the " * predicts_answers
        + "validation text"
        + (f" ({best['bytes']:,} bytes)" if best.get("bytes") else "")
    ) + f"{exactness}."


def evaluation_rows(lines: Iterable[Line], best: EvalLine | None) -> list[list[str]]:
    """Rows of step, split, loss, perplexity, bits per byte, tokens, mark of the best."""
    return [
        [
            f"{line['step']:,}",
            str(line.get("split", "val")),
            format_number(line.get("loss"), ".4f"),
            format_number(line.get("perplexity"), ".2f"),
            format_number(line.get("bpb"), ".4f"),
            f"{line.get('tokens', 0):,}" + ("" if line.get("whole") else _sample_mark(line)),
            "best" if line is best else "",
        ]
        for line in eval_lines(lines, None)
    ]


def _sample_mark(line: EvalLine) -> str:
    error = line.get("stderr")
    return " (sample)" if error is None else f" (sample, standard error {error:.4f})"


def select_evenly(items: list[T], count: int = 5) -> list[T]:
    """At most `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def reference_preset(preset: str) -> str:
    """The preset with which a run's configuration is compared: its own, or else tiny."""
    return preset if preset in PRESETS else "tiny"


def configuration_parts(
    config: RunConfig, preset: str
) -> list[tuple[str, list[tuple[str, str, str | None]]]]:
    """For each part its rows of field, value, and the preset's value if that differs."""
    base = preset_config(reference_preset(preset)).resolve()
    parts = []
    for part in dataclasses.fields(config):
        if part.name == "operations" and not config.operations.ops:
            continue
        if part.name == "preference" and not config.preference.is_active:
            continue
        values, preset_values = (
            dataclasses.asdict(getattr(owner, part.name)) for owner in (config, base)
        )
        rows = [
            (
                name,
                _format_value(value),
                _format_value(preset_values[name]) if value != preset_values[name] else None,
            )
            for name, value in values.items()
        ]
        parts.append((part.name, rows))
    return parts


def parameter_rows(config: ModelConfig, vocab_size: int) -> list[tuple[str, int, float, str]]:
    """Rows of part of the model, its parameters, their share of all, remark."""
    sizes: dict[str, int] = {}
    for name, row in parameters.parameter_table(config, vocab_size).items():
        words = re.sub(r"^blocks\.\d+\.", "", name).split(".")
        part = "norms" if words[0].endswith("norm") else words[0]
        part = words[1] if words[1] in ("experts", "router", "shared") else part
        part = "adapters" if words[-1].startswith("lora_") else part
        sizes[part] = sizes.get(part, 0) + row.size
    tied = "also the output head" if config.tie_embeddings else ""
    per_token = f"{config.experts_per_token} of {config.n_experts} compute a token"
    remarks = {
        "experts": per_token,
        "shared": "computes every token",
        "adapters": "trained; the other weights are frozen",
    }
    remarks |= {
        "embedding": tied,
        "attention": "queries, keys, values, output",
        "feedforward": config.feedforward,
    }
    total = sum(sizes.values())
    return [(name, count, count / total, remarks.get(name, "")) for name, count in sizes.items()]


def data_rows(record: Mapping[str, Any]) -> list[Row]:
    """Sizes of the splits, the tokenizer and hashes, as far as run.json has them."""
    data, tokenizer = record.get("data", {}), record.get("tokenizer", {})
    rows = [
        (f"{split} tokens", f"{data[f'{split}_tokens']:,}")
        for split in SPLITS
        if data.get(f"{split}_tokens")
    ]
    rows += [
        (f"{split} bytes", f"{data[f'{split}_bytes']:,}")
        for split in SPLITS
        if data.get(f"{split}_bytes")
    ]
    if data.get("train_tokens") and data.get("train_bytes"):
        rows += [("bytes per token", f"{data['train_bytes'] / data['train_tokens']:.3g}")]
    rows += [
        ("tokenizer", f"{tokenizer.get('kind', '?')}, {tokenizer.get('vocab_size', 0):,} tokens")
    ]
    rows += [("tokenizer sha256", str(tokenizer["sha256"]))] if tokenizer.get("sha256") else []
    return rows + ([("data sha256", str(data["sha256"]))] if data.get("sha256") else [])


def origin_rows(record: Mapping[str, Any]) -> list[Row]:
    """Command, engine, machine, versions and commit, as far as run.json has them."""
    keys = ("command", "created", "seed", "engine", "device", "precision")
    rows = [(key, str(record[key])) for key in keys if record.get(key) is not None]
    rows += [(key, str(value)) for key, value in (record.get("machine") or {}).items()]
    rows += [
        (f"{name} version", str(value)) for name, value in (record.get("versions") or {}).items()
    ]
    rows += [(f"git {key}", str(value)) for key, value in (record.get("git") or {}).items()]
    if record.get("flops_per_token"):
        rows += [("FLOPs per token", f"{record['flops_per_token']:,.0f}")]
    return rows


def next_commands(run_dir: str, status: str | None) -> list[Row]:
    """Purpose and command line of what a user can do next with a run."""
    run = quote_path(run_dir)
    is_over = status in ENDED_STATUSES
    return [
        *([] if is_over else [("continue training", f"glasslm resume {run}")]),
        ("generate text", f"glasslm generate {run}"),
        ("compare sampling methods", f"glasslm generate {run} --compare"),
        ("evaluate another text", f"glasslm evaluate {run} --text-file OTHER.txt"),
        ("check the gradients by finite differences", f"glasslm check {run}"),
        ("write this report again", f"glasslm report {run}"),
    ]


def _format_value(value: Any) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(_format_value, value))
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
