"""`glasslm evaluate`: loss, perplexity and bits per byte of a trained model on any text, beside what gzip takes."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from glasslm.cli.parsing import parse
from glasslm.config.schema import DataConfig, DeviceConfig
from glasslm.data import shards
from glasslm.data.baselines import baselines
from glasslm.data.batch_sampler import Shard
from glasslm.data.sources import corpora
from glasslm.errors import InputError
from glasslm.inference.trained_model import ContextConfig, load, parse_checkpoint
from glasslm.report import domains
from glasslm.report.domains import Domain
from glasslm.runs import run_folder
from glasslm.runs.metrics import plain
from glasslm.text import harmless, tell

BASELINE_BYTES = 4 << 20  # about a second of gzip at its best


DESCRIPTION = """Loss, perplexity and bits per byte of a trained model on a whole text.

Examples:
  glasslm evaluate RUN                             the validation part of the run's own text; of Python and of lists of
                                                   names also how well it writes them
  glasslm evaluate RUN --text-file other.txt
  glasslm evaluate RUN --context 512 --rope-scaling ntk"""


@dataclass(frozen=True)
class Flags:
    """What to score, and with which weights."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run's folder, or its name under ./runs."""
    text_file: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH...")] = ()
    """Text to score: files, folders, patterns, or - for standard input."""
    split: Literal["val", "test"] | None = None
    """Which part of the run's own text (val unless --text-file is given)."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="best|latest|STEP")] = "best"
    """Which of the run's checkpoints."""
    reading: ContextConfig = field(default_factory=ContextConfig)
    compute: DeviceConfig = field(default_factory=DeviceConfig)
    json: bool = False
    """Print one JSON object: loss, perplexity, bpb, tokens, bytes, whole, text, step, unigram_bpb, gzip_bpb, domain."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm evaluate", DESCRIPTION)
    if flags.text_file and flags.split:
        raise InputError("both --text-file and --split were given: choose one of them")
    model = load(
        flags.run, parse_checkpoint(flags.checkpoint), **vars(flags.reading), **vars(flags.compute)
    )
    domain = None
    if flags.text_file:
        source = corpora.find(DataConfig(text_file=flags.text_file), tell)
        name = ", ".join(flags.text_file)
        ids = shards.encoded(source, model.tokenizer, model.config.data.encoding_errors)
    else:
        name, run = flags.split or "val", run_folder.Run(run_folder.find(flags.run))
        dataset = shards.of_run(run.config.data, run.record["data"], run.tokenizer, tell)
        ids = _split(dataset, name)
        domain = domains.examine(run, dataset, model, math.inf)
    score = model.score(ids)
    result: dict[str, Any] = {**score._asdict(), "text": name, "step": model.step}
    if score.bytes <= BASELINE_BYTES:
        result |= baselines(b"".join(model.tokenizer.token_bytes[token] for token in ids.tolist()))
    if domain:
        result["domain"] = domain.facts
    print(
        json.dumps(plain(result))
        if flags.json
        else "\n".join([_readable(result), *_measured(domain)])
    )
    return 0


def _split(data: shards.Dataset, name: str) -> Shard:
    """A split of the run's own text."""
    split = data.val if name == "val" else data.test
    if split is None:
        raise InputError(
            f"this run has no {name} split: it was trained with --test-fraction 0; use --split val"
        )
    return split.tokens


def _readable(result: dict[str, Any]) -> str:
    lines = [
        f"{result['text']}: {result['tokens']:,} tokens, {result['bytes']:,} bytes, scored by step {result['step']:,}",
        f"  loss           {result['loss']:8.4f} nats a token",
        f"  perplexity     {result['perplexity']:8.2f}",
        f"  bits per byte  {result['bpb']:8.4f}",
    ]
    if "gzip_bpb" in result:
        lines.append(
            f"  to compare     {result['gzip_bpb']:8.4f} gzip, {result['unigram_bpb']:.4f} single bytes"
        )
    return "\n".join(lines)


def _measured(domain: Domain | None) -> list[str]:
    """The lines of what only some texts have."""
    if domain is None:
        return []
    if domain.missing:
        return ["", domain.question, *_filled(domain.missing)]
    widths = [max(len(row[column]) for row in (domain.header, *domain.rows)) for column in range(3)]
    table = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in (domain.header, *domain.rows)
    ]
    invented = f"Invented: {', '.join(map(harmless, domain.examples))}." if domain.examples else ""
    notes = [harmless(domain.remark), invented, f"{domain.how} It took {domain.seconds:.1f} s."]
    return [
        "",
        domain.question,
        *table,
        *(line for note in notes if note for line in _filled(note)),
    ]


def _filled(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ")
