"""`glasslm evaluate`: loss, perplexity and bits per byte of a trained model on any text, beside what gzip takes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from glasslm import corpora, runs, tokens
from glasslm.cli import parsing
from glasslm.config import ComputeConfig, DataConfig
from glasslm.errors import DamagedError, InputError
from glasslm.evaluation import baselines
from glasslm.trained import load, parse_checkpoint

BASELINE_BYTES = 4 << 20  # about a second of gzip at its best


DESCRIPTION = """Loss, perplexity and bits per byte of a trained model on a whole text.

Examples:
  glasslm evaluate RUN                             the validation part of the run's own text
  glasslm evaluate RUN --text-file other.txt"""


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
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object: loss, perplexity, bpb, tokens, bytes, whole, text, step, unigram_bpb, gzip_bpb."""


def main(argv: list[str]) -> int:
    flags = parsing.parse(Flags, argv, "glasslm evaluate", DESCRIPTION)
    if flags.text_file and flags.split:
        raise InputError("both --text-file and --split were given: choose one of them")
    model = load(flags.run, parse_checkpoint(flags.checkpoint), **vars(flags.compute))
    if flags.text_file:
        source = corpora.find(DataConfig(text_file=flags.text_file), _say)
        text = "".join(source.text(model.config.data.encoding_errors))
        name, ids = ", ".join(flags.text_file), model.tokenizer.encode(text)
    else:
        name = flags.split or "val"
        ids = _split(runs.Run(runs.find(flags.run)), name)
    score = model.score(ids)
    result: dict[str, Any] = {**score._asdict(), "text": name, "step": model.step}
    if score.bytes <= BASELINE_BYTES:
        result |= baselines(b"".join(model.tokenizer.token_bytes[token] for token in ids.tolist()))
    print(json.dumps(_finite(result)) if flags.as_json else _readable(result))
    return 0


def _split(run: runs.Run, name: str) -> NDArray[Any]:
    """A split of the run's own text, from the cache or else prepared again; DamagedError if the text changed."""
    sha256 = run.record["data"]["sha256"]
    data = tokens.reopen(sha256)
    if data is None:
        data = tokens.prepare(run.config.data, corpora.find(run.config.data, _say), _say, run.tokenizer)
        if data.sha256 != sha256:
            raise DamagedError(
                f"the text of this run has changed since: its sha256 was {sha256}, it is {data.sha256} now. Put the "
                "original back, or use --text-file to score another text"
            )
    split = data.val if name == "val" else data.test
    if split is None:
        raise InputError(f"this run has no {name} split: it was trained with --test-fraction 0; use --split val")
    return split.tokens


def _readable(result: dict[str, Any]) -> str:
    lines = [
        f"{result['text']}: {result['tokens']:,} tokens, {result['bytes']:,} bytes, scored by step {result['step']:,}",
        f"  loss           {result['loss']:8.4f} nats a token",
        f"  perplexity     {result['perplexity']:8.2f}",
        f"  bits per byte  {result['bpb']:8.4f}",
    ]
    if "gzip_bpb" in result:
        lines.append(f"  to compare     {result['gzip_bpb']:8.4f} gzip, {result['unigram_bpb']:.4f} single bytes")
    return "\n".join(lines)


def _finite(result: dict[str, Any]) -> dict[str, Any]:
    """Strict JSON: numbers that are not finite become null."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in result.items()
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr)
