"""glasslm corpus: list the named corpora, get one, or look closely at any text."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro

from glasslm.cli import parsing
from glasslm.config.schema import Corpus, DataConfig
from glasslm.data.sources import corpora
from glasslm.errors import InputError
from glasslm.text import harmless, one_line, tell

HELP = """usage: glasslm corpus list | get [NAME] [FLAGS] | inspect [NAME] [FLAGS]

  list       the named corpora: size, licence, and where each comes from
  get        download one (or find it) and check it, with the flags of `glasslm train` that say what text
  inspect    sizes, vocabulary, compression, an excerpt, duplicates between training and validation

Examples:
  glasslm corpus get shakespeare
  glasslm corpus get wikipedia --max-bytes 10MB
  glasslm corpus get --hf-dataset roneneldan/TinyStories --max-bytes 20MB
  glasslm corpus inspect --text-file notes/ --tokenizer bpe --vocab-size 512"""

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class GetFlags:
    """Which text. The names are those of DataConfig's fields."""

    name: Annotated[tyro.conf.Positional[Corpus | None], tyro.conf.arg(metavar="[NAME]")] = None
    """A named corpus."""
    category: str = DataConfig.category
    """Which abstracts of arXiv (https://arxiv.org/category_taxonomy)."""
    max_results: int = DataConfig.max_results
    """How many of them, the newest first."""
    text_file: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH...")] = ()
    """Your own text instead: it is looked for, and converted where it is a parquet file or a MediaWiki dump."""
    hf_dataset: str | None = None
    """A data set of Hugging Face instead, such as roneneldan/TinyStories."""
    hf_config: str | None = None
    """Which of its configurations."""
    hf_split: str = DataConfig.hf_split
    """Which of its splits."""
    hf_revision: str | None = None
    """Which commit of it (default: the newest one, which is told)."""
    hf_column: str | None = None
    """The column with the text (default: text, or the only one that holds text)."""
    max_bytes: str = DataConfig.max_bytes
    """How much is taken of wikipedia or --hf-dataset, from its beginning."""


@dataclass(frozen=True)
class InspectFlags:
    """Which text, how tokenised, how shown."""

    name: Annotated[tyro.conf.Positional[Corpus | None], tyro.conf.arg(metavar="[NAME]")] = None
    """A named corpus."""
    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    actions = {"list": _list, "get": _get, "inspect": _inspect}
    if argv[0] not in actions:
        raise InputError(f"there is no 'corpus {argv[0]}': choose from {', '.join(actions)}")
    return actions[argv[0]](argv[1:])


def _list(argv: list[str]) -> int:
    if argv:
        raise InputError(f"'corpus list' takes nothing after it, not {' '.join(argv)}")
    rows: Rows = [(name, *facts) for name, facts in corpora.KNOWN.items()]
    _show("", rows, ("name", "size", "licence", "where from"))
    tell(
        "also any data set of Hugging Face (--hf-dataset OWNER/NAME), and files of your own (--text-file PATH)"
    )
    return 0


def _get(argv: list[str]) -> int:
    flags = parsing.parse(
        GetFlags, argv, "glasslm corpus get", "Example: glasslm corpus get shakespeare"
    )
    chosen = vars(flags) | {"corpus": flags.name}
    data = DataConfig(**{name: value for name, value in chosen.items() if name != "name"})
    if not data.chosen:
        raise InputError(
            f"which text? choose from {', '.join(corpora.KNOWN)}, or give --hf-dataset or --text-file"
        )
    source = corpora.find(data, tell)
    size = sum(file.bytes for file in source.files)
    where = source.files[0].path if len(source.files) == 1 else f"{len(source.files)} files"
    print(f"{source.name}: {size:,} bytes, sha256 {source.sha256}, {where}")
    return 0


def _inspect(argv: list[str]) -> int:
    example = "Example: glasslm corpus inspect --text-file notes/ --tokenizer bpe --vocab-size 512"
    flags = parsing.parse(InspectFlags, argv, "glasslm corpus inspect", example)
    from glasslm.data import corpus_statistics, shards

    data = replace(flags.data, corpus=flags.name) if flags.name else flags.data
    source = corpora.find(data, tell)
    facts = corpus_statistics.facts(data, source, shards.prepare(data, source, tell))
    if flags.json:
        print(json.dumps(facts))
    else:
        _print(facts)
    return 0


def _print(facts: dict[str, Any]) -> None:
    tokenizer, split = facts["tokenizer"], facts["split"]
    rows: Rows = [
        ("text", f"{facts['bytes']:,} bytes, {facts['characters']:,} characters"),
        ("characters", f"{facts['distinct_characters']:,} different ones"),
        ("tokenizer", f"{tokenizer['kind']}, a vocabulary of {tokenizer['vocab_size']:,}"),
        ("tokens", f"{facts['tokens']:,}"),
        ("compression", f"{_ratios(facts)[0]} bytes, {_ratios(facts)[1]} characters a token"),
    ]
    for name in ("train", "val", "test"):
        if f"{name}_tokens" in split:
            rows.append(
                (name, f"{split[f'{name}_tokens']:,} tokens, {split[f'{name}_bytes']:,} bytes")
            )
    _show(harmless(facts["name"]), rows)
    files = facts["files"]
    listed: Rows = [
        (f"{file['bytes']:,}", file["sha256"][:12], harmless(file["path"])) for file in files[:10]
    ]
    more: Rows = [("", "", f"and {len(files) - 10:,} more")] if len(files) > 10 else []
    _show("files", listed + more, ("bytes", "sha256", "path"))
    if "vocabulary" in facts:
        shown = repr(facts["vocabulary"])
        _show("vocabulary", [(harmless(shown if len(shown) <= 400 else shown[:400] + "..."),)])
    if facts.get("first_merges"):
        merges = [f"{a!r}+{b!r}".replace("\\\\x", "\\x") for a, b in facts["first_merges"]]
        _show("first merges", [("  ".join(merges[i : i + 5]),) for i in range(0, len(merges), 5)])
    head = ("characters", "bytes a token", "characters a token")
    for kind in ("script", "suffix"):
        groups = facts[f"by_{kind}"]
        if groups:
            _show(
                f"by {kind}",
                [(g[kind], f"{g['characters']:,}", *_ratios(g)) for g in groups],
                (kind, *head),
            )
    _show("validation text begins", [(one_line(facts["excerpt"], 200),)])
    _show("validation text that is in the training text as well", _duplicates(facts["duplicates"]))


def _ratios(facts: dict[str, Any]) -> tuple[str, str]:
    return f"{facts['bytes_per_token']:.2f}", f"{facts['characters_per_token']:.2f}"


def _duplicates(found: dict[str, Any]) -> Rows:
    rows: Rows = []
    for kind, what in (
        ("lines", "lines of 20 characters or more"),
        ("windows", "windows of 50 characters"),
    ):
        share = (
            "none to compare"
            if found[kind] is None
            else f"{found[kind]:.1%} of {found[f'{kind}_compared']:,}"
        )
        rows.append((what, share))
    if found["share_of_training_text"] < 1:
        rows.append(
            ("compared with", f"{found['share_of_training_text']:.0%} of the training text")
        )
    return rows


def _show(title: str, rows: Rows, head: tuple[str, ...] = ()) -> None:
    """A table: with rich on a terminal, else aligned columns."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*head, show_header=bool(head), header_style="dim", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(Text, row))
        console = Console(highlight=False)
        if title:
            console.print(Text(title, style="bold"))
        console.print(table, "")
        return
    if title:
        print(f"{title}:")
    lines = [head, *rows] if head else rows
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    for row in lines:
        print(
            ("  " if title else "")
            + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        )
    if title:
        print()
