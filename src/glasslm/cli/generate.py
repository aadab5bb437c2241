"""`glasslm generate`: let a trained model write: a stream, lines of JSON, a conversation, or sampler beside sampler."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, TextIO

import tyro

from glasslm.cli.parsing import parse
from glasslm.config.schema import DeviceConfig
from glasslm.engines.memory_estimate import PRECISION_BYTES, cache_bytes, cache_numbers
from glasslm.errors import InputError
from glasslm.inference.generation import Piece, cache_capacity, encode_prompt
from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import (
    ContextConfig,
    GrammarName,
    Model,
    load,
    parse_checkpoint,
)
from glasslm.text import size

SAMPLERS = {
    "greedy": Sampling(temperature=0.0),
    "temperature 0.3": Sampling(temperature=0.3),
    "temperature 0.7": Sampling(temperature=0.7),
    "temperature 1.0": Sampling(temperature=1.0),
    "temperature 1.5": Sampling(temperature=1.5),
    "top-k 40": Sampling(temperature=1.0, top_k=40),
    "top-p 0.9": Sampling(temperature=1.0, top_p=0.9),
    "min-p 0.05": Sampling(temperature=1.0, min_p=0.05),
    "repetition penalty 1.2": Sampling(temperature=1.0, repetition_penalty=1.2),
}
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {
    0x7F: 0x2421,
    0x9B: 0x241B,
}


DESCRIPTION = """Let a trained model write.

Examples:
  glasslm generate RUN --prompt "ROMEO:" --temperature 0.7 --max-new-tokens 300
  glasslm generate RUN                             type one prompt after another
  echo -n "ROMEO:" | glasslm generate RUN --json
  glasslm generate RUN --prompt "ROMEO:" --compare
  glasslm generate RUN --context 512 --rope-scaling ntk --max-new-tokens 1000

The text is shown after its prompt; with --grammar the output is the JSON alone."""


@dataclass(frozen=True)
class Flags:
    """What to write, and how."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run's folder, or its name under ./runs."""
    prompt: Annotated[
        str | None, tyro.conf.arg(constructor=str, metavar="TEXT", help_behavior_hint="")
    ] = None
    """Text to go on from; of one longer than the context the newest tokens are read."""
    max_new_tokens: int = 200
    """Tokens to write at most."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """Stop before this text appears; may be given several times."""
    num_samples: int = 1
    """Number of texts."""
    grammar: Annotated[GrammarName | None, tyro.conf.arg(metavar="json")] = None
    """json: write one JSON object or array that parses, within max_new_tokens."""
    compare: bool = False
    """Show the usual samplers side by side on one prompt."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="best|latest|STEP")] = "best"
    """Which of the run's checkpoints."""
    reading: tyro.conf.OmitArgPrefixes[ContextConfig] = field(default_factory=ContextConfig)
    compute: tyro.conf.OmitArgPrefixes[DeviceConfig] = field(default_factory=DeviceConfig)
    json: bool = False
    """Print one JSON object for each text: text (the continuation), prompt, tokens, finish (length or stop), seed."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm generate", DESCRIPTION, repeatable=("--stop",))
    model = load(
        flags.run, parse_checkpoint(flags.checkpoint), **vars(flags.reading), **vars(flags.compute)
    )
    if flags.grammar and model.json_grammar.note:
        print(f"note: {model.json_grammar.note}", file=sys.stderr)
    talk = flags.prompt is None and not flags.compare and not flags.json and _is_terminal(sys.stdin)
    try:
        if talk:
            _converse(model, flags)
            return 0
        prompt = _piped() if flags.prompt is None else flags.prompt
        (_compare if flags.compare else _print_texts)(model, flags, prompt, flags.sampling)
        _tell_cache(model, flags, prompt)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _converse(model: Model, flags: Flags) -> None:
    """Prompt after prompt. Ctrl-C ends a text that is being written, or else, like Ctrl-D, the conversation."""
    with contextlib.suppress(
        ImportError
    ):  # not on Windows, where the console itself keeps a history
        import readline  # noqa: F401 - gives input() arrow keys and a history
    _tell_cache(model, flags, "")
    print(
        "Type the beginning of a text and press Enter; Ctrl-C stops a text, Ctrl-D leaves.",
        file=sys.stderr,
    )
    for turn in itertools.count():
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:  # a new seed each turn: the same prompt again gives another text
            _print_texts(
                model,
                flags,
                prompt,
                replace(flags.sampling, seed=(flags.sampling.seed + turn) % 2**64),
            )
        except KeyboardInterrupt:
            print()
        except InputError as error:
            print(error, file=sys.stderr)


def _tell_cache(model: Model, flags: Flags, prompt: str) -> None:
    """The memory of the keys and values, by its formula."""
    c, rows, width = model.config.model, flags.num_samples, PRECISION_BYTES[model.engine.precision]
    longest = len(encode_prompt(model.tokenizer, prompt))
    capacity = cache_capacity(longest, flags.max_new_tokens, c.block_size, c.rolling)
    factors = " x ".join(
        f"{number:,} ({name})" for name, number in cache_numbers(c, rows, capacity).items()
    )
    print(
        f"cache: {factors} x {width} bytes = {size(cache_bytes(c, rows, capacity, width))}",
        file=sys.stderr,
    )


class _Text:
    """One text as its pieces come."""

    def __init__(self) -> None:
        self.text, self.tokens, self.finish = "", 0, ""

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += 1
        self.finish = piece.finish or ""


def _pieces(model: Model, flags: Flags, prompt: str, sampling: Sampling) -> Iterator[Piece]:
    """Checked when called, computed as it is read."""
    return model.pieces(
        [prompt],
        flags.max_new_tokens,
        sampling=sampling,
        samples=flags.num_samples,
        stop=flags.stop,
        grammar=flags.grammar,
    )


def _texts(
    pieces: Iterator[Piece], count: int, show: Callable[[str], None] = lambda text: None
) -> list[_Text]:
    """All texts, once they are written; `show` is given the first one while it is."""
    texts = [_Text() for _ in range(count)]
    for piece in pieces:
        texts[piece.sample].add(piece)
        if piece.sample == 0:
            show(piece.text)
    return texts


def _print_texts(model: Model, flags: Flags, prompt: str, sampling: Sampling) -> None:
    """Each text after its prompt, or as a line of JSON; the speed goes to stderr."""
    start = time.monotonic()
    pieces = _pieces(model, flags, prompt, sampling)
    if flags.json:
        texts = _texts(pieces, flags.num_samples)
        _print_json(texts, prompt, sampling.seed)
    else:
        before = "" if flags.grammar else prompt
        _show(before)
        texts = _texts(pieces, flags.num_samples, _show)
        _show("".join(f"\n---\n{before}{text.text}" for text in texts[1:]) + "\n")
    seconds, tokens = time.monotonic() - start, sum(text.tokens for text in texts)
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s", file=sys.stderr)


def _compare(model: Model, flags: Flags, prompt: str, sampling: Sampling) -> None:
    """The same prompt and seed through each sampler: a table on a terminal, plain blocks elsewhere."""
    results = {
        name: _texts(
            _pieces(model, flags, prompt, replace(sampler, seed=sampling.seed)), flags.num_samples
        )
        for name, sampler in SAMPLERS.items()
    }
    if flags.json:
        for name, texts in results.items():
            _print_json(texts, prompt, sampling.seed, sampler=name)
    elif _is_terminal(sys.stdout):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("sampler", "text", show_lines=True)
        for name, texts in results.items():
            for text in texts:
                table.add_row(name, Text.assemble((prompt, "dim"), text.text.translate(VISIBLE)))
        Console().print(table)
    else:
        for name, texts in results.items():
            _show("".join(f"== {name} ==\n{prompt}{text.text}\n\n" for text in texts))


def _print_json(texts: list[_Text], prompt: str, seed: int, **more: str) -> None:
    for text in texts:
        line = {
            "text": text.text,
            "prompt": prompt,
            "tokens": text.tokens,
            "finish": text.finish,
            "seed": seed,
        }
        print(json.dumps(line | more), flush=True)


def _show(text: str) -> None:
    """To stdout at once; on a terminal control characters become symbols, for a model may write any."""
    sys.stdout.write(text.translate(VISIBLE) if _is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _piped() -> str:
    """The prompt from a pipe or file on standard input, as it is; empty where there is none."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt on standard input is not UTF-8 (byte {error.start}): convert it first"
        ) from None
