"""glasslm evaluate: loss, perplexity and bits per byte on any text, with gzip as a baseline."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from glasslm.cli.flag_groups import CheckpointFlag, RunArgument, RunOpsFlag
from glasslm.cli.parsing import parse
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import DataConfig, DeviceConfig
from glasslm.data.baselines import simple_baselines
from glasslm.data.dataset import Dataset, Split, tokenize_source
from glasslm.data.lossy_tokenizers import explain_lossy_tokenizer
from glasslm.data.sources import corpora
from glasslm.data.special_tokens import count_spellings, explain_spellings
from glasslm.data.token_file import Tokens
from glasslm.errors import InputError
from glasslm.inference.context_config import ContextConfig
from glasslm.inference.exact_answers import score_own_text
from glasslm.inference.suites.suite_result import SuiteName, SuiteResult, save_result
from glasslm.inference.trained_model import Model, load_model
from glasslm.report import text_kinds
from glasslm.report.text_kinds import Domain
from glasslm.runs.checkpoint_selector import parse_checkpoint
from glasslm.runs.metrics import to_json_types
from glasslm.runs.protection import open_run
from glasslm.runs.run_folder import Run
from glasslm.text import align_columns, escape_control_chars, notify, print_escaped, wrap_lines

MAX_BASELINE_BYTES = 4 << 20  # gzip takes about a second

DESCRIPTION = """Loss, perplexity and bits per byte of a trained model on a whole text.

Without --text-file the text is the validation part of the run's own text. For
Python code and lists of names, generated samples are checked as well; the
answers of a synthetic task are counted.

Examples:
  glasslm evaluate RUN
  glasslm evaluate RUN --text-file other.txt
  glasslm evaluate RUN --context 512 --rope-scaling ntk
  glasslm evaluate RUN --suite grammar"""


@dataclass(frozen=True)
class Flags:
    """The text to score, and the weights."""

    run: RunArgument
    text_file: Annotated[tuple[str, ...], optional_flag("PATH...", "the run's own text")] = ()
    """Text to score: files, folders, patterns, or - for standard input."""
    json_field: Annotated[str | None, optional_flag("NAME", "none: the lines as they are")] = None
    """Read --text-file as JSON lines: this field of each line is a document."""
    split: Annotated[Literal["val", "test"] | None, optional_flag("val|test", "val")] = None
    """Part of the run's own text."""
    suite: Annotated[
        SuiteName | None, optional_flag("|".join(get_args(SuiteName)), "none: a text")
    ] = None
    """Measure what the model can do instead of the loss of a text.
    The result also stands in the run's report, if context and operations are those of training."""
    checkpoint: CheckpointFlag = "best"
    ops: RunOpsFlag = ""
    reading: ContextConfig = field(default_factory=ContextConfig)
    compute: DeviceConfig = field(default_factory=DeviceConfig)
    json: bool = False
    """Print one JSON object: loss, perplexity, bpb, tokens, bytes, whole, text, step.
    Short texts add unigram_bpb and gzip_bpb; code, lists of names and tasks add domain."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm evaluate", DESCRIPTION)
    if flags.json_field is not None and not flags.text_file:
        raise InputError("--json-field needs --text-file: give both, or leave out --json-field")
    if flags.text_file and flags.split:
        raise InputError("both --text-file and --split were given: choose one of them")
    if flags.suite is not None and (flags.text_file or flags.split):
        raise InputError("--suite makes its own texts: leave out --text-file and --split")
    run = open_run(flags.run)  # an error before the first message
    if flags.suite is not None and "imported" in run.record:
        raise InputError(
            f"--suite {flags.suite} takes words or tokens from the training text, and this model "
            "was imported without it: leave out --suite, or measure a run of `glasslm finetune`"
        )
    notify("reading the model and the text")
    model = load_model(
        flags.run,
        parse_checkpoint(flags.checkpoint),
        **vars(flags.reading),
        **vars(flags.compute),
        ops=flags.ops,
    )
    if flags.suite is not None:
        return _evaluate_suite(run, model, flags.suite, flags.json)
    domain = split = None
    if flags.text_file:
        name, ids = ", ".join(flags.text_file), _read_tokens(flags, model)
    else:
        name, dataset = flags.split or "val", run.dataset(notify)
        split = _find_split(dataset, name)
        ids = split.tokens
        domain = text_kinds.measure_domain(run, dataset, model, math.inf)
    scores_answers = split is not None and model.config.data.predicts_answers
    what = f"the answers in {len(ids):,}" if scores_answers else f"{max(0, len(ids) - 1):,}"
    notify(f"evaluating {what} tokens with the {model.engine.name} engine")
    score = score_own_text(model, split, notify) if split else model.score(ids, notify)
    hidden = ("stderr", "accuracy", "train_accuracy")
    facts = {name: value for name, value in score._asdict().items() if name not in hidden}
    result: dict[str, Any] = {**facts, "text": name, "step": model.step}
    if math.isnan(score.bpb):
        why = model.tokenizer.lossy_reason
        result["no_bpb"] = (
            explain_lossy_tokenizer(why) if why else "the predicted tokens have no text"
        )
    elif score.bytes <= MAX_BASELINE_BYTES and not scores_answers:
        result |= simple_baselines(
            b"".join(model.tokenizer.token_bytes[token] for token in ids[:].tolist())
        )
        if model.tokenizer.special_tokens:  # which have no bytes; the model predicts them, too
            result["baseline_text"] = "without special tokens"
    if score.accuracy is not None:
        result["accuracy"] = score.accuracy.facts
    if domain:
        result["domain"] = domain.facts
    print_escaped(
        json.dumps(to_json_types(result))
        if flags.json
        else "\n".join([_format_scores(result), *_format_domain(domain)])
    )
    return 0


def _read_tokens(flags: Flags, model: Model) -> Tokens:
    """The tokens of --text-file, read as the model's own text was."""
    trained_on, tokenizer = model.config.data, model.tokenizer
    data = DataConfig(
        text_file=flags.text_file,
        json_field=flags.json_field,
        encoding_errors=trained_on.encoding_errors,
        special_tokens=trained_on.used_special_tokens,
        document_separator="" if flags.json_field else trained_on.document_separator,
    )
    source = corpora.find_source(data, notify)
    texts = source.text(data.encoding_errors)
    if spellings := count_spellings(texts, source.special_tokens, tokenizer.unused_special_tokens):
        notify(explain_spellings(spellings, "the text"))
    return tokenize_source(source, tokenizer, data.encoding_errors)


def _evaluate_suite(run: Run, model: Model, name: SuiteName, as_json: bool) -> int:
    """Measure a suite, print its result, and save it in the run for its report.

    The report shows the run as it was trained, so a result with another context or other operations
    is not saved.
    """
    from glasslm.inference.suites.catalogue import SUITES

    result = SUITES[name](model, run.dataset(notify))
    if model.config == run.config:
        path = save_result(result, run.path)
        notify(f"saved in {path}; `glasslm report {run.path}` shows it")
    else:
        notify("not saved in the run: leave out --ops, --context and --rope-scaling to save it")
    facts = {"suite": name, "step": result.step, **result.facts}
    print_escaped(json.dumps(to_json_types(facts)) if as_json else _format_suite(result))
    return 0


def _format_suite(result: SuiteResult) -> str:
    """The table of a suite with its method."""
    table = align_columns([result.header, *result.rows], indent="  ")
    notes = [note for note in (result.remark, result.method) if note]
    return "\n".join(
        [result.question, *table, *(line for note in notes for line in wrap_lines(note, "  "))]
    )


def _find_split(data: Dataset, name: str) -> Split:
    """A split of the run's own text."""
    split = data.val if name == "val" else data.test
    if split is None:
        raise InputError(
            f"this run has no {name} split: it was trained with --test-fraction 0. Use --split val"
        )
    return split


def _format_scores(result: dict[str, Any]) -> str:
    lines = [
        f"{result['text']}: {result['tokens']:,} tokens, {result['bytes']:,} bytes, "
        f"scored by step {result['step']:,}",
        f"  loss           {result['loss']:8.4f} nats per token",
        f"  perplexity     {result['perplexity']:8.2f}",
    ]
    if math.isfinite(result["bpb"]):
        lines.append(f"  bits per byte  {result['bpb']:8.4f}")
    else:
        lines.append(f"  bits per byte  none: {result['no_bpb']}")
    if "gzip_bpb" in result:
        part = f" (of the text {result['baseline_text']})" if "baseline_text" in result else ""
        lines.append(
            f"  to compare     {result['gzip_bpb']:8.4f} gzip, "
            f"{result['unigram_bpb']:.4f} single bytes{part}"
        )
    return "\n".join(lines)


def _format_domain(domain: Domain | None) -> list[str]:
    """The measurements that only some kinds of text have, as lines."""
    if domain is None:
        return []
    if domain.missing:
        return ["", domain.question, *wrap_lines(domain.missing, indent="  ")]
    table = align_columns([domain.header, *domain.rows], indent="  ")
    invented = (
        f"Invented: {', '.join(map(escape_control_chars, domain.examples))}."
        if domain.examples
        else ""
    )
    notes = [
        escape_control_chars(domain.remark),
        invented,
        f"{domain.method} It took {domain.seconds:.1f} s.",
    ]
    return [
        "",
        domain.question,
        *table,
        *(line for note in notes if note for line in wrap_lines(note, indent="  ")),
    ]
