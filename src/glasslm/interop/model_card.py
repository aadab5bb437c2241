"""The model card, README.md of an exported folder: the run in tables and sentences.

All content comes from the run's own files. Names and samples are foreign text: control characters
are replaced, and Markdown is escaped. The card is for publication, so it has file names without
folders and no name of a machine.
"""

from __future__ import annotations

import re

from glasslm.config.schema import DataConfig, ModelConfig, NormPosition
from glasslm.data.chat import dialogues
from glasslm.data.sources import corpora
from glasslm.data.tokenizers import Tokenizer
from glasslm.interop.card_example import example_code
from glasslm.interop.card_front_matter import TOKENIZER_LEVELS, front_matter
from glasslm.interop.card_paths import file_name, strip_folders
from glasslm.interop.card_results import measured_results
from glasslm.interop.model_export import DOCUMENT_ATTENTION_NOTE, ModelExport
from glasslm.model.parameters import parameter_table
from glasslm.report import report_tables, run_report
from glasslm.report.page import escape_markdown, markdown_table
from glasslm.runs.metrics import (
    Line,
    elapsed_s,
    eval_lines,
    sample_lines,
    step_lines,
)
from glasslm.runs.record import FileRecord, text_name
from glasslm.text import format_bytes, format_duration, plural
from glasslm.training.plan import describe_preference_step

Rows = list[tuple[str, str]]

TOKENIZERS = {
    "char": "one token per character",
    "byte": "one token per byte",
    "bpe": "byte-level BPE",
    "gpt2": "GPT-2's",
}
STYLES = {  # by whether it learned conversations
    False: "It continues text in the style of its training text. Its statements are not reliable, "
    "it does not follow instructions, and its output is not filtered.",
    True: "It answers in the style of the conversations that it learned. Its statements are not "
    "reliable, and its output is not filtered.",
}
NORM_PLACES: dict[NormPosition, str] = {
    "pre": "before each sublayer",
    "post": "after each sum",
    "sandwich": "before and after each sublayer",
}
MAX_LISTED_FILES = 10
MAX_LISTED_TOKENS = 10


def render_card(export: ModelExport, difference: float | None) -> str:
    """README.md for a folder that transformers loads.

    `difference` is the measured difference between the logits of glasslm and of transformers, as a
    share of the largest one; None where transformers is not installed. Unknown facts are left out:
    old runs lack fields, and imported models have no text.
    """
    lines = [line for line in export.run.metrics() if line["step"] <= export.step]
    step_evals = [line for line in eval_lines(lines, None) if line["step"] == export.step]
    evals = {line.get("split", "val"): line for line in step_evals if line.get("loss") is not None}
    parts = [
        front_matter(export, evals),
        f"# {escape_markdown(export.name)}",
        _lead(export),
        "## Model",
        markdown_table(_architecture(export)),
        "## Training data",
        *_data(export),
        "## Training",
        *_training(export, lines),
        "## Evaluation",
        *measured_results(export, evals),
        *_sample(lines),
        "## Usage",
        example_code(export),
        "## Provenance",
        markdown_table(_origin(export, difference)),
        "## Limitations",
        _limits(export),
    ]
    return "\n\n".join(parts) + "\n"


# -- sections --------------------------------------------------------------------------------------


def _lead(export: ModelExport) -> str:
    record, level = export.run.record, TOKENIZER_LEVELS.get(export.tokenizer.kind, "")
    total = parameter_table(export.config, export.vocab_size).total
    model = f"A {level} language model".replace("  ", " ") + f" with {total:,} parameters"
    if imported := record.get("imported"):
        kind = escape_markdown(imported.get("model_type", "unknown"))
        return (
            f"{model}, imported into glasslm from a folder of the model type {kind}. "
            "It was not trained by glasslm."
        )
    training = "trained from scratch"
    if base := record.get("base"):
        base_run = escape_markdown(file_name(str(base.get("run"))))
        training = f"fine-tuned from the run {base_run} (step {base.get('step')})"
    text = escape_markdown(text_name(export.run.config.data))
    return f"{model}, {training} on {text} with glasslm."


def _architecture(export: ModelExport) -> Rows:
    c, V = export.config, export.vocab_size
    hf_config = export.family.to_hf_config(c, V)
    counts = parameter_table(c, V).counts()
    active = f", of which {counts['active']:,} compute a token" if c.n_experts else ""
    shared = f", {c.n_kv_heads} of keys and values" if c.n_kv_heads < c.n_heads else ""
    qk_norm = ", qk-norm" if c.qk_norm else ""
    experts = (
        f", {c.n_experts} experts, {c.experts_per_token} of them for each token"
        if c.n_experts
        else ""
    )
    base = f", base {c.rope_base:g}" if c.position == "rope" else ""
    scaling = (
        f", scaled {c.rope_factor:g} times ({c.rope_scaling})" if c.rope_scaling != "none" else ""
    )
    window = [("window", _describe_window(c))] if c.window else []
    tokenizer = TOKENIZERS.get(export.tokenizer.kind, "from another program")
    return [
        ("in transformers", f"{hf_config['architectures'][0]} ({hf_config['model_type']})"),
        ("parameters", f"{counts['total']:,}{active}, float32"),
        ("layers", f"{c.n_layers}, of width {c.d_model:,}"),
        ("attention", f"{c.n_heads} heads of size {c.head_size}{shared}{qk_norm}"),
        ("feed-forward", f"{c.feedforward}, inner width {c.d_ff:,}{experts}"),
        ("norm", f"{c.norm}, {NORM_PLACES[c.norm_position]}"),
        ("positions", f"{c.position}{base}{scaling}"),
        ("context", f"{c.block_size:,} tokens"),
        *window,
        ("output head", "the embedding matrix" if c.tie_embeddings else "a separate matrix"),
        ("tokenizer", f"{tokenizer}, {V:,} tokens"),
        ("special tokens", _special_tokens(export.tokenizer)),
    ]


def _describe_window(c: ModelConfig) -> str:
    """The window, and in how many layers it is where not all layers have it."""
    n_window_layers = sum(c.layer_kind(layer) == "w" for layer in range(c.n_layers))
    where = f" in {n_window_layers} of {c.n_layers} layers" if n_window_layers < c.n_layers else ""
    return f"a token attends to the last {c.window:,} tokens, itself included{where}"


def _special_tokens(tokenizer: Tokenizer) -> str:
    """The special tokens that a text may have, and which one ends documents."""
    if not tokenizer.special_tokens:
        return "none: their spellings are ordinary text"
    end, *others = tokenizer.special_tokens
    more = f"; also {' '.join(others[:MAX_LISTED_TOKENS])}" if others else ""
    return f"{end} ends each document{more}"


def _data(export: ModelExport) -> list[str]:
    record, data = export.run.record.get("data", {}), export.run.config.data
    files = record.get("files", [])
    if not files:
        return ["The training text is unknown, because the model was imported without it."]
    file_rows = [
        (_describe_file(file), f"{file['bytes']:,}", file["sha256"])
        for file in files[:MAX_LISTED_FILES]
    ]
    parts = [
        f"The text was {escape_markdown(text_name(data))}{_licence(data)}. "
        f"It was split in order: {_split(data)}.",
        markdown_table(report_tables.data_rows(export.run.record)),
        markdown_table(file_rows, ("file", "bytes", "sha256")),
    ]
    if len(files) > MAX_LISTED_FILES:
        total = format_bytes(sum(file["bytes"] for file in files))
        parts += [
            f"These are the first {MAX_LISTED_FILES} of {len(files):,} files with {total} in total."
        ]
    return parts


def _licence(data: DataConfig) -> str:
    """The licence and the origin of a named text; empty for other texts."""
    if data.task:
        return " (synthetic examples, which glasslm draws)"
    if data.chat == dialogues.NAME:
        return " (made up by glasslm)"
    if data.corpus in corpora.CORPUS_FACTS:
        _, licence, origin = corpora.CORPUS_FACTS[data.corpus]
        return f" ({escape_markdown(licence)}), from {escape_markdown(re.split('[,;]', origin)[0])}"
    if data.hf_dataset:
        return " of Hugging Face (its licence is in its dataset card)"
    return ""


def _split(data: DataConfig) -> str:
    train = 1 - data.val_fraction - data.test_fraction
    test = (
        f", and the last {100 * data.test_fraction:.3g}% for a test" if data.test_fraction else ""
    )
    return (
        f"the first {100 * train:.3g}% for training, "
        f"then {100 * data.val_fraction:.3g}% for validation{test}"
    )


def _training(export: ModelExport, lines: list[Line]) -> list[str]:
    run, record = export.run, export.run.record
    if "imported" in record:
        return ["glasslm did not train this model; it imported the weights."]
    config, train, optimizer = run.config.model, run.config.train, run.config.optimizer
    steps = step_lines(lines)
    rows = [("steps", f"{export.step:,} of {train.max_steps:,}")]
    if steps and steps[-1].get("tokens"):
        rows += [("tokens seen", f"{steps[-1]['tokens']:,}")]
    if steps and steps[-1].get("epoch") is not None:
        rows += [("epochs", f"{steps[-1]['epoch']:.3g}")]
    warmup = (
        f" after {plural(optimizer.warmup_steps, 'step')} of warmup"
        if optimizer.warmup_steps
        else ""
    )
    sequences = f"{train.batch_size} sequences of {config.block_size:,} tokens"
    rows += [
        ("optimizer", f"{optimizer.optimizer}, weight decay {optimizer.weight_decay:g}"),
        ("learning rate", f"at most {optimizer.lr:g}, {optimizer.schedule}{warmup}"),
        ("batch", describe_preference_step(run.config) or sequences),
        ("seed", str(record.get("seed", train.seed))),
    ]
    if config.dropout or config.attention_dropout:
        rows += [("dropout", f"{config.dropout:g}, in attention {config.attention_dropout:g}")]
    if optimizer.ema:
        rows += [("weights", f"exponential moving average with decay {optimizer.ema:g}")]
    if config.lora_rank:
        adapters = f"rank {config.lora_rank} on {config.lora_targets}, merged into the weights"
        rows += [("adapters", adapters)]
    computed_by = [str(record[key]) for key in ("engine", "device", "precision") if record.get(key)]
    rows += [("computed by", ", ".join(computed_by))] if computed_by else []
    seconds = elapsed_s(lines)
    rows += [("time", format_duration(seconds))] if seconds else []
    command = strip_folders(str(record.get("command") or ""))
    return [markdown_table(rows), *([run_report.fence_text(command)] if command else [])]


def _sample(lines: list[Line]) -> list[str]:
    samples = [line for line in sample_lines(lines) if line.get("text")]
    if not samples:
        return []
    last = samples[-1]
    temperature = f"temperature {last.get('temperature', 1.0):g}"
    return [
        "## Sample",
        f"Generated during training at step {last['step']:,}, {temperature}:",
        run_report.fence_text(str(last.get("prompt", "")) + str(last["text"])),
    ]


def _origin(export: ModelExport, difference: float | None) -> Rows:
    record = export.run.record
    rows = [("run", export.name), ("checkpoint", f"step {export.step:,}")]
    rows += [(key, str(record[key])) for key in ("created", "glasslm") if record.get(key)]
    if git := record.get("git"):
        dirty = ", with uncommitted changes" if git.get("dirty") else ""
        rows += [("commit of glasslm", f"{git.get('commit')}{dirty}")]
    versions = ", ".join(
        f"{name} {version}"
        for name, version in (record.get("versions") or {}).items()
        if name != "glasslm"
    )
    rows += [("versions", versions)] if versions else []
    machine = record.get("machine") or {}
    system = str(machine.get("platform", "")).split("-")[0]
    parts = (
        system,
        machine.get("cpu"),
        f"{machine['cores']} cores" if machine.get("cores") else "",
    )
    rows += [("machine", ", ".join(str(part) for part in parts if part))] if machine else []
    if merged := record.get("merged_from"):
        source = f"{file_name(str(merged.get('run')))}, step {merged.get('step')}"
        rows += [("adapters merged from", source)]
    if imported := record.get("imported"):
        hashes = imported["sha256"].items()
        rows += [(f"sha256 of the imported {name}", sha256) for name, sha256 in hashes]
    rows += [("sha256 of the configuration", export.run.config_sha256)]
    if difference is None:
        return [*rows, ("logits", "not compared with those of transformers")]
    return [
        *rows,
        ("logits", f"those of transformers differ by at most {difference:.1e} of the largest"),
    ]


def _limits(export: ModelExport) -> str:
    c, tokenizer = export.config, export.tokenizer
    limits = [
        f"Its context is {c.block_size:,} tokens; it was not trained for longer texts.",
        STYLES[export.run.config.data.chat is not None],
        "It may repeat passages of its training text word for word.",
    ]
    if c.document_attention:
        limits[:0] = [f"{DOCUMENT_ATTENTION_NOTE[0].upper()}{DOCUMENT_ATTENTION_NOTE[1:]}."]
    if tokenizer.kind == "char":
        limits[:0] = [
            f"It knows only the {tokenizer.vocab_size - len(tokenizer.special_tokens):,} "
            "characters of its text; any other "
            "character is an error."
        ]
    return "\n".join(f"- {limit}" for limit in limits)


# -- foreign text ----------------------------------------------------------------------------------


def _describe_file(file: FileRecord) -> str:
    """The name of a file without its folders, and the address that it was downloaded from."""
    origin = file.get("origin")
    return file_name(file["path"]) + (f", from {origin}" if origin else "")
