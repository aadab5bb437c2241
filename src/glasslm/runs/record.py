"""run.json: its type, and the one builder of it.

The file says what a run is and is written once, when the run starts (docs/formats.md).
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from glasslm.config.conversion import to_dict
from glasslm.config.schema import DataConfig, EngineName, RunConfig
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.operations import find_operations
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table
from glasslm.runs import provenance
from glasslm.runs.blas import BlasRecord, loaded_blas
from glasslm.runs.typed_json import Count

FORMAT = 1


class TokenizerRecord(TypedDict):
    """The tokenizer of a run."""

    kind: str
    vocab_size: Count
    sha256: str
    # Of an imported model: roles of special tokens, chat template, tokens around each text
    # (interop/hf_special_tokens.py).
    transformers: NotRequired[dict[str, Any]]
    lossless: NotRequired[bool]  # whether its tokens decode to the text; absent in old runs
    lossy_reason: NotRequired[str]


class FileRecord(TypedDict):
    """A file of a run's text. Older runs lack `origin`."""

    path: str  # absolute
    bytes: Count
    sha256: str
    origin: NotRequired[str]


class DataRecord(TypedDict):
    """The text of a run: data.dataset.Dataset.facts. That of an imported run has no files."""

    files: list[FileRecord]
    sha256: str
    train_tokens: Count
    train_bytes: Count
    val_tokens: Count
    val_bytes: Count
    test_tokens: NotRequired[Count]
    test_bytes: NotRequired[Count]
    chat: NotRequired[dict[str, Any]]  # of conversations (data/chat/chat_dataset.py)


class SourceRun(TypedDict):
    """The run that another one starts from."""

    run: str
    step: Count
    data_sha256: NotRequired[str]


class ComputeRecord(TypedDict, total=False):
    """The engine and device of the first step. Imported models have only the first three fields."""

    engine: EngineName
    device: str
    precision: str
    compiled: bool
    threads: Count
    processes: Count
    parallel: str
    deterministic: bool


class MachineRecord(TypedDict):
    """The machine that computed the first step."""

    platform: str
    cpu: str
    cores: Count | None


class GitRecord(TypedDict):
    """The commit of glasslm's source, and whether files were changed."""

    commit: str
    dirty: bool


class OperationsRecord(TypedDict):
    """The file of --ops, whose functions replace operations of the engine."""

    file: str  # its path as it was given
    sha256: str  # of its bytes
    names: list[str]  # of the replaced operations
    text: str


# "from" is a keyword of Python.
ImportRecord = TypedDict("ImportRecord", {"from": str, "model_type": str, "sha256": dict[str, str]})


class RunRecord(TypedDict):
    """run.json, which is read by this type. Older runs may lack the fields that are NotRequired."""

    format: Literal[1]
    preset: NotRequired[str]
    glasslm: str
    created: str  # UTC, ISO 8601
    command: NotRequired[str]
    seed: Count
    config: dict[str, dict[str, Any]]  # RunConfig as JSON
    engine: Literal["numpy", "torch"]
    device: str
    precision: Literal["fp32", "bf16", "fp16", "fp64"]
    compiled: NotRequired[bool]
    threads: NotRequired[Count]
    processes: NotRequired[Count]
    parallel: NotRequired[str]
    deterministic: NotRequired[bool]
    parameters: dict[str, Count]
    flops_per_token: float
    data: DataRecord
    tokenizer: TokenizerRecord
    versions: dict[str, str]
    machine: MachineRecord
    git: GitRecord | None
    blas: NotRequired[BlasRecord | None]  # that computes NumPy's products
    final_windows: NotRequired[int]  # of the final measurement; missing: the whole split
    base: NotRequired[SourceRun]  # the run that fine-tuning started from
    merged_from: NotRequired[SourceRun]  # the run whose adapters were merged
    imported: NotRequired[ImportRecord]  # where an imported model came from
    operations: NotRequired[OperationsRecord]  # code, which is only run with the user's consent


def build_record(
    config: RunConfig,
    tokenizer: Tokenizer,
    data: dict[str, Any],
    compute: ComputeRecord,
    *,
    preset: str,
    command: str,
) -> RunRecord:
    """run.json of a new run. `data` is the `facts` of its dataset."""
    versions = provenance.versions()
    record = {
        "format": FORMAT,
        "preset": preset,
        "command": command,
        "glasslm": versions["glasslm"],
        "created": _now(),
        "seed": config.train.seed,
        "config": to_dict(config),
        **compute,
        "parameters": parameter_table(config.model, tokenizer.vocab_size).counts(),
        "flops_per_token": flops_per_token(config.model, tokenizer.vocab_size),
        "data": data,
        "tokenizer": _tokenizer_record(tokenizer),
        "versions": versions,
        "machine": provenance.machine(),
        "git": provenance.git(),
        "blas": loaded_blas(),
    }
    if operations := find_operations(config):
        record["operations"] = OperationsRecord(
            file=operations.file.name,
            sha256=operations.file.sha256,
            names=list(operations.functions),
            text=operations.file.text,
        )
    return cast(RunRecord, record)


def _tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    record = TokenizerRecord(
        kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, sha256=tokenizer.sha256,
        lossless=not tokenizer.lossy_reason,
    )  # fmt: skip
    if tokenizer.lossy_reason:
        record["lossy_reason"] = tokenizer.lossy_reason
    return record


def build_merged_record(
    record: RunRecord, config: RunConfig, command: str, merged_from: SourceRun
) -> RunRecord:
    """run.json of a run with merged adapters; the other fields stay those of the trained run."""
    vocab_size = record["tokenizer"]["vocab_size"]
    merged = {
        **record,
        "config": to_dict(config),
        "parameters": parameter_table(config.model, vocab_size).counts(),
        "flops_per_token": flops_per_token(config.model, vocab_size),
        "command": command,
        "created": _now(),
        "merged_from": merged_from,
    }
    merged.pop("base", None)
    return cast(RunRecord, merged)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def text_name(data: DataConfig) -> str:
    """The name of a text: its corpus, its Hugging Face dataset, or its file names."""
    names = ["standard input" if path == "-" else Path(path).name for path in data.text_file]
    if data.chat is not None:
        return f"conversations of {Path(data.chat).name}"
    return data.corpus or data.hf_dataset or ", ".join(names) or "the default corpus"
