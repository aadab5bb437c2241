"""glasslm corpus: list the named corpora, download one, or inspect any text."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, get_args

import tyro

from glasslm.cli import parsing
from glasslm.cli.flag_groups import JsonFlag
from glasslm.config.config_fields import optional_flag
from glasslm.config.data_config import TASK_PREFIX
from glasslm.config.schema import Corpus, DataConfig, TextCorpus
from glasslm.config.unused_flags import refuse_unused_flags
from glasslm.data.sources import corpora
from glasslm.data.tasks.catalogue import TASKS
from glasslm.errors import InputError
from glasslm.text import align_columns, escape_control_chars, notify, print_result, to_one_line

HELP = """usage: glasslm corpus list | get [NAME] [FLAGS] | inspect [NAME] [FLAGS]

  list       list the named corpora (size, licence, origin) and the synthetic tasks
  get        download a corpus, or find it in the cache, and check it
  inspect    show sizes, vocabulary, compression, an excerpt, and duplicates
             between training and validation text

Examples:
  glasslm corpus get shakespeare
  glasslm corpus get task:addition --task-size 4
  glasslm corpus get wikipedia --max-bytes 10MB
  glasslm corpus get --hf-dataset roneneldan/TinyStories --max-bytes 20MB
  glasslm corpus inspect --text-file notes/ --tokenizer bpe --vocab-size 512"""

GET_HELP = """Download a text, or find it in the cache, and check it.

Example:
  glasslm corpus get shakespeare"""

INSPECT_HELP = """Show sizes, vocabulary, compression and an excerpt of a text, and duplicates
between its training and validation part.

Example:
  glasslm corpus inspect --text-file notes/ --tokenizer bpe --vocab-size 512"""

NameArgument = Annotated[
    tyro.conf.Positional[Corpus | None],
    tyro.conf.arg(
        metavar="[NAME]",
        help=f"Named corpus: {', '.join(get_args(TextCorpus))}, or task:NAME.",
        help_behavior_hint="(default: none)",
    ),
]
MAX_LISTED_FILES = 10
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class GetFlags:
    """The text to get. The names are those of DataConfig's fields."""

    name: NameArgument = None
    category: str = DataConfig.category
    """Category of the abstracts of arXiv (https://arxiv.org/category_taxonomy)."""
    max_results: int = DataConfig.max_results
    """Number of abstracts of arXiv, the newest first."""
    text_file: Annotated[tuple[str, ...], optional_flag("PATH...", "none")] = ()
    """Use your own text instead: files, folders or glob patterns.
    A parquet file is converted to text."""
    json_field: Annotated[str | None, optional_flag("NAME", "none: the lines as they are")] = None
    """Read --text-file as JSON lines: this field of each line is a document."""
    hf_dataset: Annotated[str | None, optional_flag("OWNER/NAME", "none")] = None
    """Use a Hugging Face dataset instead, such as roneneldan/TinyStories."""
    hf_config: Annotated[str | None, optional_flag("NAME", "the dataset's default")] = None
    """Configuration of --hf-dataset."""
    hf_split: str = DataConfig.hf_split
    """Split of --hf-dataset."""
    hf_revision: Annotated[str | None, optional_flag("COMMIT", "the newest one")] = None
    """Commit of --hf-dataset."""
    hf_column: Annotated[str | None, optional_flag("NAME", "text, or the only column of text")] = (
        None
    )
    """Column of --hf-dataset that holds the text."""
    max_bytes: Annotated[str, tyro.conf.arg(metavar="SIZE")] = DataConfig.max_bytes
    """Size of the text taken from the start of wikipedia or --hf-dataset, such as 2GB."""
    task_size: int = DataConfig.task_size
    """Largest size of the examples of a task: letters, digits, the modulus (0: the task's own)."""
    task_examples: int = DataConfig.task_examples
    """Number of examples of a task."""


@dataclass(frozen=True)
class InspectFlags:
    """The text to inspect, and its tokenizer."""

    name: NameArgument = None
    data: DataConfig = field(default_factory=DataConfig)
    json: JsonFlag = False


def main(argv: list[str]) -> int:
    if not argv or argv[0] in parsing.HELP_FLAGS:
        print(HELP)
        return 0
    actions = {"list": _list, "get": _get, "inspect": _inspect}
    if argv[0] not in actions:
        raise InputError(f"there is no 'corpus {argv[0]}': choose from {', '.join(actions)}")
    return actions[argv[0]](argv[1:])


def _list(argv: list[str]) -> int:
    if argv:
        raise InputError(f"'corpus list' takes no arguments: leave out {' '.join(argv)}")
    rows: Rows = [(name, *facts) for name, facts in corpora.CORPUS_FACTS.items()]
    _print_table("", rows, ("name", "size", "licence", "origin"))
    print()
    tasks: Rows = [
        (f"{TASK_PREFIX}{name}", f"{task.size} {task.size_unit}", task.rule)
        for name, task in TASKS.items()
    ]
    _print_table("synthetic tasks", tasks, ("name", "size", "the answer is"))
    notify(
        "also: any Hugging Face dataset (--hf-dataset OWNER/NAME), and your own files "
        "(--text-file PATH)"
    )
    return 0


def _get(argv: list[str]) -> int:
    flags = parsing.parse(GetFlags, argv, "glasslm corpus get", GET_HELP)
    settings = vars(flags) | {"corpus": flags.name}
    del settings["name"]
    data = DataConfig(**settings)
    refuse_unused_flags(parsing.given_fields(argv), data)
    if not data.has_source:
        raise InputError(
            f"no text was named: choose from {', '.join(corpora.CORPUS_FACTS)}, "
            "or give --hf-dataset or --text-file"
        )
    source = corpora.find_source(data, notify)
    for file in source.files[:MAX_LISTED_FILES]:
        print(f"{file.bytes:,} bytes, sha256 {file.sha256}, {escape_control_chars(file.path)}")
    if len(source.files) > MAX_LISTED_FILES:
        print(f"and {len(source.files) - MAX_LISTED_FILES:,} more files")
    if len(source.files) > 1:
        size = sum(file.bytes for file in source.files)
        print_result(f"{source.name}: {size:,} bytes of text, sha256 {source.sha256}")
    return 0


def _inspect(argv: list[str]) -> int:
    flags = parsing.parse(
        InspectFlags, _with_task_flag(argv), "glasslm corpus inspect", INSPECT_HELP
    )
    from glasslm.data import corpus_statistics
    from glasslm.data.dataset import prepare_dataset
    from glasslm.data.lossy_tokenizers import explain_lossy_tokenizer

    data = flags.data
    if flags.name and data.corpus:
        raise InputError(
            f"both {flags.name} and --corpus {data.corpus} were given: choose one of them"
        )
    if flags.name:
        data = replace(data, corpus=flags.name)
    refuse_unused_flags(parsing.given_fields(argv), data)
    source = corpora.find_source(data, notify)
    facts = corpus_statistics.measure_corpus(data, source, prepare_dataset(data, source, notify))
    if why := facts["tokenizer"].get("lossy_reason"):
        notify(f"note: {explain_lossy_tokenizer(why)}")
    if flags.json:
        print(json.dumps(facts))
    else:
        _print_facts(facts)
    return 0


def _with_task_flag(argv: list[str]) -> list[str]:
    """`argv` with --corpus before the name of a task: its flags are checked together with it."""
    for i, word in enumerate(argv):
        is_value = i > 0 and argv[i - 1].startswith("--") and argv[i - 1] != "--json"
        if word.startswith(TASK_PREFIX) and not is_value:
            return [*argv[:i], "--corpus", *argv[i:]]
    return argv


def _print_facts(facts: dict[str, Any]) -> None:
    tokenizer, split = facts["tokenizer"], facts["split"]
    rows: Rows = [
        ("text", f"{facts['bytes']:,} bytes, {facts['characters']:,} characters"),
        ("characters", f"{facts['distinct_characters']:,} distinct"),
        ("tokenizer", f"{tokenizer['kind']}, a vocabulary of {tokenizer['vocab_size']:,}"),
        ("tokens", f"{facts['tokens']:,}"),
        (
            "compression",
            f"{_format_ratios(facts)[0]} bytes, {_format_ratios(facts)[1]} characters per token",
        ),
    ]
    for name in ("train", "val", "test"):
        if f"{name}_tokens" in split:
            rows.append(
                (name, f"{split[f'{name}_tokens']:,} tokens, {split[f'{name}_bytes']:,} bytes")
            )
    _print_table(escape_control_chars(facts["name"]), rows)
    files = facts["files"]
    listed: Rows = [
        (f"{file['bytes']:,}", file["sha256"][:12], escape_control_chars(file["path"]))
        for file in files[:MAX_LISTED_FILES]
    ]
    more: Rows = (
        [("", "", f"and {len(files) - MAX_LISTED_FILES:,} more")]
        if len(files) > MAX_LISTED_FILES
        else []
    )
    _print_table("files", listed + more, ("bytes", "sha256", "path"))
    if "vocabulary" in facts:
        shown = repr(facts["vocabulary"])
        _print_table(
            "vocabulary",
            [(escape_control_chars(shown if len(shown) <= 400 else shown[:400] + "..."),)],
        )
    if facts.get("first_merges"):
        merges = [f"{a!r}+{b!r}".replace("\\\\x", "\\x") for a, b in facts["first_merges"]]
        _print_table(
            "first merges", [("  ".join(merges[i : i + 5]),) for i in range(0, len(merges), 5)]
        )
    head = ("characters", "bytes per token", "characters per token")
    for kind in ("script", "suffix"):
        groups = facts[f"by_{kind}"]
        if groups:
            _print_table(
                f"by {kind}",
                [(g[kind], f"{g['characters']:,}", *_format_ratios(g)) for g in groups],
                (kind, *head),
            )
    _print_table("start of the validation text", [(to_one_line(facts["excerpt"], 200),)])
    _print_table(
        "validation text that is also in the training text", _duplicate_rows(facts["duplicates"])
    )


def _format_ratios(facts: dict[str, Any]) -> tuple[str, str]:
    return f"{facts['bytes_per_token']:.2f}", f"{facts['characters_per_token']:.2f}"


def _duplicate_rows(duplicates: dict[str, Any]) -> Rows:
    rows: Rows = []
    for kind, label in (
        ("lines", "lines of 20 characters or more"),
        ("windows", "windows of 50 characters"),
    ):
        share = (
            "none to compare"
            if duplicates[kind] is None
            else f"{duplicates[kind]:.1%} of {duplicates[f'{kind}_compared']:,}"
        )
        rows.append((label, share))
    if duplicates["share_of_training_text"] < 1:
        rows.append(
            ("compared with", f"{duplicates['share_of_training_text']:.0%} of the training text")
        )
    return rows


def _print_table(title: str, rows: Rows, head: tuple[str, ...] = ()) -> None:
    """Print a table: with rich on a terminal, else as aligned columns."""
    rows = [tuple(map(escape_control_chars, row)) for row in rows]
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
    for line in align_columns(lines, indent="  " if title else ""):
        print(line)
    if title:
        print()
