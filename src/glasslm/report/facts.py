"""run.json and metrics.jsonl in the words and tables of a report."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from glasslm.config.presets import PRESETS
from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.model import parameters
from glasslm.text import duration, number, quoted, size

Line = dict[str, Any]
Row = tuple[str, str]

SPLITS = ("train", "val", "test")
ENDINGS = {
    "finished": "The run did all its steps.",
    "stopped": "The run stopped early, as it was told to: the loss asked for was reached, or it no longer improved.",
    "interrupted": "The run was interrupted and can go on where it stopped.",
    "diverged": "The run left the finite numbers and did not come back: try a lower learning rate first.",
    "failed": "The run ended with an error and can go on from its latest checkpoint.",
    None: "No end is recorded: the run is still going on, or was killed and can go on from its latest checkpoint.",
}


def headline(best: Line | None, lines: list[Line], vocab_size: int) -> list[tuple[str, str, str]]:
    """Label, value and note of the few numbers that matter most."""
    timing = [line["timing"] for line in lines if line.get("timing")]
    tiles = []
    if best is not None:
        bpb = best.get("bpb")
        tiles += [
            (
                "best validation loss",
                number(best["loss"], ".4f"),
                f"nats per token, at step {best['step']:,}",
            ),
            (
                "perplexity",
                number(best.get("perplexity"), ".2f"),
                f"a uniform guess has {vocab_size:,}",
            ),
            (
                "bits per byte",
                number(bpb, ".3f"),
                f"{bpb / 8:.0%} of the text's own size" if bpb else "",
            ),
        ]
    steps = [line for line in lines if line["kind"] == "step"]
    if timing:
        last = f"{steps[-1]['step']:,} steps" if steps else "no logged step"
        tiles += [("time", duration(elapsed_s(lines)), last)]
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
        peak = [t["memory_bytes"] for t in timing if t.get("memory_bytes") is not None]
        memory = f"up to {size(max(peak))} of memory" if peak else ""
        tiles += [("tokens per second", f"{speeds[len(speeds) // 2]:,.0f}", memory)]
    return tiles


def elapsed_s(lines: Iterable[Line]) -> float:
    """Seconds of training: the clock of a metrics file begins again with each resume."""
    before = part = 0.0
    for line in lines:
        if line["kind"] == "resume":
            before, part = before + part, 0.0
        part = max(part, (line.get("timing") or {}).get("elapsed_s") or 0.0)
    return before + part


def measured_on(best: Line | None) -> str:
    if best is None:
        return "No finite validation loss was recorded."
    share = "all" if best.get("whole") else "an evenly spaced sample of"
    return (
        f"The best loss was measured on {share} {best.get('tokens', 0):,} tokens of the validation part"
        + (f" ({best['bytes']:,} bytes)." if best.get("bytes") else ".")
    )


def evaluations(lines: Iterable[Line], best: Line | None) -> list[list[str]]:
    """Rows of step, split, loss, perplexity, bits per byte, tokens, mark."""
    return [
        [
            f"{line['step']:,}",
            str(line.get("split", "val")),
            number(line.get("loss"), ".4f"),
            number(line.get("perplexity"), ".2f"),
            number(line.get("bpb"), ".4f"),
            f"{line.get('tokens', 0):,}" + ("" if line.get("whole") else " (sample)"),
            "best" if line is best else "",
        ]
        for line in lines
        if line["kind"] == "eval"
    ]


def spaced(items: list[Line], count: int = 5) -> list[Line]:
    """At most `count` of them, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def compared_with(preset: str) -> str:
    """The preset whose values stand beside a run's: its own, and tiny for a run that has none."""
    return preset if preset in PRESETS else "tiny"


def configuration(
    config: RunConfig, preset: str
) -> list[tuple[str, list[tuple[str, str, str | None]]]]:
    """For each part its fields with their values, and the preset's value where it is another."""
    base = PRESETS[compared_with(preset)]().resolved()
    parts = []
    for part in dataclasses.fields(config):
        here, there = (dataclasses.asdict(getattr(of, part.name)) for of in (config, base))
        rows = [
            (name, _value(here[name]), _value(there[name]) if here[name] != there[name] else None)
            for name in here
        ]
        parts.append((part.name, rows))
    return parts


def parameter_parts(config: ModelConfig, vocab_size: int) -> list[tuple[str, int, float, str]]:
    """Name, parameters, share of all and a remark, for each part of the model."""
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
        "adapters": "trained; all else is frozen",
    }
    remarks |= {
        "embedding": tied,
        "attention": "queries, keys, values, output",
        "feedforward": config.feedforward,
    }
    total = sum(sizes.values())
    return [(name, count, count / total, remarks.get(name, "")) for name, count in sizes.items()]


def data(record: Line) -> list[Row]:
    held, tokenizer = record.get("data", {}), record.get("tokenizer", {})
    rows = [
        (f"{split} tokens", f"{held[f'{split}_tokens']:,}")
        for split in SPLITS
        if held.get(f"{split}_tokens")
    ]
    rows += [
        (f"{split} bytes", f"{held[f'{split}_bytes']:,}")
        for split in SPLITS
        if held.get(f"{split}_bytes")
    ]
    if held.get("train_tokens") and held.get("train_bytes"):
        rows += [("bytes per token", f"{held['train_bytes'] / held['train_tokens']:.3g}")]
    rows += [
        ("tokenizer", f"{tokenizer.get('kind', '?')}, {tokenizer.get('vocab_size', 0):,} tokens")
    ]
    rows += [("tokenizer sha256", str(tokenizer["sha256"]))] if tokenizer.get("sha256") else []
    return rows + ([("data sha256", str(held["sha256"]))] if held.get("sha256") else [])


def origin(record: Line) -> list[Row]:
    """Engine, machine, versions, commit: what of them run.json has."""
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


def commands(run_dir: str, status: str | None) -> list[Row]:
    run = quoted(run_dir)
    over = status in ("finished", "stopped", "diverged")
    return [
        *([] if over else [("go on where it stopped", f"glasslm resume {run}")]),
        ("let it write", f"glasslm generate {run}"),
        ("compare ways of sampling", f"glasslm generate {run} --compare"),
        ("score a text of your own", f"glasslm evaluate {run} --text-file SOME.txt"),
        ("check gradients of this model by finite differences", f"glasslm check {run}"),
        ("make this report again", f"glasslm report {run}"),
    ]


def _value(value: Any) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
