"""glasslm generate: text from a trained model, as a stream, JSON lines or a dialogue."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from signal import SIGINT
from typing import Annotated, TextIO

import tyro

from glasslm.cli.flag_groups import CheckpointFlag, RunArgument, RunOpsFlag
from glasslm.cli.parsing import given_fields, parse
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import DeviceConfig
from glasslm.data.special_tokens import count_spellings, explain_spellings
from glasslm.engines.memory_estimate import PRECISION_BYTES, cache_bytes, cache_numbers
from glasslm.errors import InputError
from glasslm.inference.context_config import ContextConfig
from glasslm.inference.generation import Piece, cache_capacity, encode_prompt
from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import GrammarName, Model, load_model
from glasslm.runs.checkpoint_selector import parse_checkpoint
from glasslm.text import escape_control_chars, format_bytes, notify, print_escaped
from glasslm.training.interruption import signal_number

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

DESCRIPTION = """Generate text with a trained model.

Examples:
  glasslm generate RUN --prompt "ROMEO:" --temperature 0.7 --max-new-tokens 300
  glasslm generate RUN          asks for one prompt after another
  echo -n "ROMEO:" | glasslm generate RUN --json
  glasslm generate RUN --prompt "ROMEO:" --compare
  glasslm generate RUN --context 512 --rope-scaling ntk --max-new-tokens 1000

The text is printed after its prompt; with --grammar the output is only JSON."""


@dataclass(frozen=True)
class Flags:
    """The prompt, and how its continuation is generated."""

    run: RunArgument
    prompt: Annotated[
        str | None,
        tyro.conf.arg(
            constructor=str, metavar="TEXT", help_behavior_hint="(default: standard input)"
        ),
    ] = None
    """Text to continue. If it is longer than the context, the newest tokens are read."""
    max_new_tokens: int = 200
    """Largest number of tokens to generate."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """Stop before this text appears. May be given several times."""
    num_samples: int = 1
    """Number of texts."""
    grammar: Annotated[GrammarName | None, optional_flag("json", "none")] = None
    """Generate one valid JSON object or array (json), within --max-new-tokens."""
    compare: bool = False
    """Show the results of several samplers side by side."""
    cache: bool = True
    """Keep keys and values in a cache; --no-cache reads the whole text again for each token, and
    prints how much faster the cache is. Not with --compare."""
    checkpoint: CheckpointFlag = "best"
    ops: RunOpsFlag = ""
    reading: tyro.conf.OmitArgPrefixes[ContextConfig] = field(default_factory=ContextConfig)
    compute: tyro.conf.OmitArgPrefixes[DeviceConfig] = field(default_factory=DeviceConfig)
    json: bool = False
    """Print one JSON object for each text: text, prompt, tokens, finish, seed."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm generate", DESCRIPTION)
    if flags.compare and not flags.cache:
        raise InputError("--no-cache times one sampler, --compare runs several: leave out one flag")
    if flags.compare:
        _name_unused_sampling(given_fields(argv))
    model = load_model(
        flags.run,
        parse_checkpoint(flags.checkpoint),
        **vars(flags.reading),
        **vars(flags.compute),
        ops=flags.ops,
    )
    if flags.grammar and model.json_grammar.note:
        notify(f"note: {model.json_grammar.note}")
    is_batch = flags.prompt is not None or flags.compare or flags.json
    try:
        if not is_batch and _is_terminal(sys.stdin):
            _ask_for_prompts(model, flags)
            return 0
        prompt = _read_standard_input() if flags.prompt is None else flags.prompt
        print_results = _print_comparison if flags.compare else _print_texts
        print_results(model, flags, prompt, flags.sampling)
        _print_cache_size(model, flags, prompt)
    except KeyboardInterrupt:
        print()  # ends the line of the text
        raise
    return 0


def _name_unused_sampling(given: set[str]) -> None:
    """Print a note with the settings that each sampler of --compare has for itself."""
    unused = [
        f"--{setting.name.replace('_', '-')}"
        for setting in fields(Sampling)
        if setting.name in given and setting.name != "seed"
    ]
    if unused:
        notify(f"note: --compare has samplers of its own: no effect of {' and '.join(unused)}")


def _ask_for_prompts(model: Model, flags: Flags) -> None:
    """Continue one prompt after another from the terminal.

    Ctrl-C stops a text; at the prompt it ends the dialogue, like Ctrl-D.
    """
    # Windows has no readline; its console has a history of its own.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() arrow keys and a history
    _print_cache_size(model, flags, "")
    notify("Type the start of a text and press Enter. Ctrl-C stops a text, Ctrl-D ends.")
    for turn in itertools.count():
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            notify(f"this line is not UTF-8 (byte {error.start}): type it again")
            continue
        except KeyboardInterrupt as interrupt:
            if signal_number(interrupt) != SIGINT:
                raise
            print()
            return
        # Each turn has its own seed, so that a repeated prompt gives another text.
        sampling = replace(flags.sampling, seed=(flags.sampling.seed + turn) % 2**64)
        try:
            _print_texts(model, flags, prompt, sampling)
        except KeyboardInterrupt as interrupt:
            if signal_number(interrupt) != SIGINT:
                raise
            print()
        except InputError as error:
            notify(str(error))


def _print_cache_size(model: Model, flags: Flags, prompt: str) -> None:
    """Print the bytes of the KV cache as a product of its sizes."""
    c, rows, engine = model.config.model, flags.num_samples, model.engine
    width = PRECISION_BYTES[engine.precision]
    prompt_length = len(encode_prompt(model.tokenizer, prompt))
    capacity = cache_capacity(prompt_length, flags.max_new_tokens, c)
    numbers = cache_numbers(c, rows, capacity, engine.name)
    factors = " x ".join(f"{number:,} ({name})" for name, number in numbers.items())
    size = cache_bytes(c, rows, capacity, width, engine.name)
    notify(f"cache: {factors} x {width} bytes = {format_bytes(size)}")


class _Text:
    """A generated text, built from its pieces."""

    def __init__(self) -> None:
        self.text, self.tokens, self.finish = "", 0, ""

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += 1
        self.finish = piece.finish or ""


def _generate_pieces(
    model: Model, flags: Flags, prompt: str, sampling: Sampling, use_cache: bool
) -> Iterator[Piece]:
    """Pieces of all texts. The arguments are checked now, the pieces computed during iteration."""
    tokenizer = model.tokenizer
    if spellings := count_spellings(
        [prompt], tokenizer.special_tokens, tokenizer.unused_special_tokens
    ):
        notify(explain_spellings(spellings, "the prompt"))
    return model.pieces(
        [prompt],
        flags.max_new_tokens,
        sampling=sampling,
        samples=flags.num_samples,
        stop=flags.stop,
        grammar=flags.grammar,
        use_cache=use_cache,
    )


def _collect_texts(
    pieces: Iterator[Piece], count: int, show: Callable[[str], None] = lambda text: None
) -> list[_Text]:
    """Read all pieces into texts. `show` is called with each piece of the first text."""
    texts = [_Text() for _ in range(count)]
    for piece in pieces:
        texts[piece.sample].add(piece)
        if piece.sample == 0:
            show(piece.text)
    return texts


def _print_texts(model: Model, flags: Flags, prompt: str, sampling: Sampling) -> None:
    """Print each text after its prompt, or as a line of JSON. The speed goes to stderr."""
    start = time.monotonic()
    pieces = _generate_pieces(model, flags, prompt, sampling, flags.cache)
    if flags.json:
        texts = _collect_texts(pieces, flags.num_samples)
        _print_json(texts, prompt, sampling.seed)
    else:
        prefix = "" if flags.grammar else prompt
        _show(prefix)
        texts = _collect_texts(pieces, flags.num_samples, _show)
        _show("".join(f"\n---\n{prefix}{text.text}" for text in texts[1:]) + "\n")
    seconds, tokens = time.monotonic() - start, sum(text.tokens for text in texts)
    notify(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s")
    if not flags.cache:
        start = time.monotonic()
        for _ in _generate_pieces(model, flags, prompt, sampling, use_cache=True):
            pass
        cached_s = time.monotonic() - start
        notify(f"with the KV cache: {cached_s:.2f} s, {seconds / cached_s:.1f} times as fast")


def _print_comparison(model: Model, flags: Flags, prompt: str, sampling: Sampling) -> None:
    """Print each sampler's text for one prompt and seed, as a table on a terminal."""
    prefix = "" if flags.grammar else prompt
    results = {
        name: _collect_texts(
            _generate_pieces(
                model, flags, prompt, replace(sampler, seed=sampling.seed), use_cache=True
            ),
            flags.num_samples,
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
                start = (escape_control_chars(prefix), "dim")
                table.add_row(name, Text.assemble(start, escape_control_chars(text.text)))
        Console().print(table)
    else:
        for name, texts in results.items():
            print_escaped("\n".join(f"== {name} ==\n{prefix}{text.text}\n" for text in texts))


def _print_json(texts: list[_Text], prompt: str, seed: int, **extra: str) -> None:
    for text in texts:
        line = {
            "text": text.text,
            "prompt": prompt,
            "tokens": text.tokens,
            "finish": text.finish,
            "seed": seed,
        }
        print(json.dumps(line | extra), flush=True)


def _show(text: str) -> None:
    """Print to stdout at once; on a terminal control characters are escaped."""
    sys.stdout.write(escape_control_chars(text) if _is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _read_standard_input() -> str:
    """The prompt from a pipe or file, without a byte-order mark; empty from a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt on standard input is not UTF-8 (byte {error.start}): convert it first"
        ) from None
