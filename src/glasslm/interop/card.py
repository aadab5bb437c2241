"""The model card, README.md of an exported folder: front matter that Hugging Face reads, and words for people.

Everything in it is from the run's own files. Names and samples are foreign text: made harmless, and escaped. The card
is made to be published, so it names files without their folders, and no machine by its name.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import PureWindowsPath
from typing import Any

from glasslm.config.schema import DataConfig
from glasslm.data.baselines import baselines
from glasslm.data.sources import corpora
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import InputError
from glasslm.interop import families
from glasslm.interop.model_export import Leaving
from glasslm.model.parameters import parameter_table
from glasslm.report import data_checks, facts, run_report
from glasslm.report.page import inline_markdown
from glasslm.runs.record import text_name
from glasslm.text import duration, harmless, number, size

Line = dict[str, Any]
Rows = list[tuple[str, str]]

LANGUAGES = {"shakespeare": "en", "arxiv": "en", "wikipedia": "en", "python": "code"}
ON_THE_HUB = {"wikipedia": "wikimedia/wikipedia"}
LEVELS = {"char": "character-level", "byte": "byte-level"}
NAMES = {"val": "validation", "test": "test"}  # of the parts of its text
SPLITS = {"val": "the validation text", "test": "the test text",
          "old": "the validation text of the run that it started from"}  # fmt: skip
SHOWN = 10  # files that are listed
NEW_TOKENS = 200  # that the example writes


def text(leaving: Leaving, difference: float | None) -> str:
    """README.md for a folder that transformers loads.

    `difference` is what was measured between the logits of glasslm and of transformers, as a share of the largest one;
    None where transformers is not installed. Old runs may lack fields, and imported ones have no text: what is not
    known is left out.
    """
    lines = [line for line in leaving.run.metrics() if line["step"] <= leaving.step]
    evals = [line for line in lines if line["kind"] == "eval" and line["step"] == leaving.step]
    measured = {line.get("split", "val"): line for line in evals if line.get("loss") is not None}
    parts = [
        _front_matter(leaving, measured),
        f"# {inline_markdown(_name(leaving))}",
        _lead(leaving),
        "## What it is",
        _table(_architecture(leaving)),
        "## What it was trained on",
        *_data(leaving),
        "## How it was trained",
        *_training(leaving, lines),
        "## How good it is",
        *_results(leaving, measured),
        *_sample(lines),
        "## How to use it",
        _example(leaving),
        "## Where it comes from",
        _table(_origin(leaving, difference)),
        "## What it cannot do",
        _limits(leaving),
    ]
    return "\n\n".join(parts) + "\n"


# -- what Hugging Face reads ------------------------------------------------------------------------------------------


def _front_matter(leaving: Leaving, measured: dict[str, Line]) -> str:
    data = leaving.run.config.data
    dataset = data.hf_dataset or ON_THE_HUB.get(data.corpus or "")
    language = LANGUAGES.get(data.corpus or "")
    return "\n".join(
        [
            "---",
            "license: other  # of these weights, which are yours: put your own here",
            *([f"language: {language}"] if language else []),
            *([f"datasets:\n- {_yaml(dataset)}"] if dataset else []),
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:\n- glasslm",
            *([f"- {LEVELS[leaving.tokenizer.kind]}"] if leaving.tokenizer.kind in LEVELS else []),
            *_model_index(leaving, dataset, measured),
            "---",
        ]
    )


def _model_index(leaving: Leaving, dataset: str | None, measured: dict[str, Line]) -> list[str]:
    """Results as the Hub's specification of model-index has them, a list of metrics for each part of its text."""
    name = text_name(leaving.run.config.data)
    results = []
    for split in [split for split in NAMES if split in measured]:
        line = measured[split]
        values = (
            ("loss", "cross-entropy, nats per token"),
            ("perplexity", "perplexity"),
            ("bpb", "bits per byte"),
        )
        metrics = [
            f"    - type: {'bits_per_byte' if key == 'bpb' else key}\n"
            f"      name: {meaning}\n"
            f"      value: {_number(line[key])}"
            for key, meaning in values if line.get(key) is not None
        ]  # fmt: skip
        results += [
            "  - task:\n      type: text-generation\n      name: Text generation",
            f"    dataset:\n      type: {_yaml(dataset or 'text')}\n      name: {_yaml(name)}",
            f"      split: {NAMES[split]}",
            "    metrics:",
            *metrics,
        ]
    return (
        [f"model-index:\n- name: {_yaml(_name(leaving))}\n  results:", *results] if results else []
    )


def _yaml(text: str) -> str:
    """Foreign text as a YAML scalar: JSON's strings are YAML's, but for escapes of what `harmless` leaves as it is."""
    return json.dumps(" ".join(harmless(text).split()), ensure_ascii=False)


def _number(value: float) -> str:
    """As YAML 1.1 reads it, which wants a point in 1.0e+22."""
    written = repr(round(float(value), 6))
    return written if "." in written else written.replace("e", ".0e")


# -- in plain words ---------------------------------------------------------------------------------------------------


def _name(leaving: Leaving) -> str:
    return leaving.run.path.resolve().name


def _lead(leaving: Leaving) -> str:
    record, level = leaving.run.record, LEVELS.get(leaving.tokenizer.kind, "")
    total = parameter_table(leaving.config, leaving.vocab_size).total
    what = f"A {level} language model".replace("  ", " ") + f" with {total:,} parameters"
    if imported := record.get("imported"):
        kind = inline_markdown(imported.get("model_type", "unknown"))
        return f"{what}, brought into glasslm from a folder of the model type {kind}. It was not trained by glasslm."
    how = "trained from scratch"
    if base := record.get("base"):
        how = f"trained on from the run {inline_markdown(_last(str(base.get('run'))))} (step {base.get('step')})"
    return f"{what}, {how} on {inline_markdown(text_name(leaving.run.config.data))} with glasslm."


def _architecture(leaving: Leaving) -> Rows:
    c, V = leaving.config, leaving.vocab_size
    there = families.of(c).to_config(c, V)
    counted = parameter_table(c, V).counts()
    active = f", of which {counted['active']:,} compute a token" if c.n_experts else ""
    shared = (
        f", keys and values shared by {c.n_heads // c.n_kv_heads} each"
        if c.n_kv_heads < c.n_heads
        else ""
    )
    experts = (
        f", {c.n_experts} experts, {c.experts_per_token} of them for each token"
        if c.n_experts
        else ""
    )
    rotation = f", base {c.rope_base:g}" if c.position == "rope" else ""
    stretched = (
        f", stretched {c.rope_factor:g} times ({c.rope_scaling})"
        if c.rope_scaling != "none"
        else ""
    )
    window = (
        [("window", f"a token sees the newest {c.window:,}, itself included")] if c.window else []
    )
    kinds = {
        "char": "one token a character",
        "byte": "one token a byte",
        "bpe": "byte-level BPE",
        "gpt2": "GPT-2's",
    }
    return [
        ("in transformers", f"{there['architectures'][0]} ({there['model_type']})"),
        ("parameters", f"{counted['total']:,}{active}, float32"),
        ("layers", f"{c.n_layers}, of width {c.d_model:,}"),
        (
            "attention",
            f"{c.n_heads} heads of size {c.head_size}{shared}{', qk-norm' if c.qk_norm else ''}",
        ),
        ("feed-forward", f"{c.feedforward}, inner width {c.d_ff:,}{experts}"),
        ("norm", f"{c.norm}, before each sublayer"),
        ("positions", f"{c.position}{rotation}{stretched}"),
        ("context", f"{c.block_size:,} tokens"),
        *window,
        ("output head", "the embedding matrix" if c.tie_embeddings else "a matrix of its own"),
        ("tokenizer", f"{kinds.get(leaving.tokenizer.kind, 'of another make')}, {V:,} tokens"),
    ]


def _data(leaving: Leaving) -> list[str]:
    record, data = leaving.run.record.get("data", {}), leaving.run.config.data
    files = record.get("files", [])
    if not files:
        return ["That is not known here: it came without its text."]
    parts = [
        f"The text was {inline_markdown(text_name(data))}{_licence(data)}. "
        f"It was split in order: {_split(data)}.",
        _table(facts.data(leaving.run.record)),
        _table([(_named(file), f"{file['bytes']:,}", file["sha256"]) for file in files[:SHOWN]],
               ("file", "bytes", "sha256")),
    ]  # fmt: skip
    if len(files) > SHOWN:
        total = size(sum(file["bytes"] for file in files))
        parts += [f"These are the first {SHOWN} of {len(files):,} files, of {total} in total."]
    return parts


def _licence(data: DataConfig) -> str:
    """Where a named text is from, and under which terms."""
    if data.corpus:
        _, licence, origin = corpora.KNOWN[data.corpus]
        return f" ({inline_markdown(licence)}), from {inline_markdown(re.split('[,;]', origin)[0])}"
    if data.hf_dataset:
        return " of Hugging Face, whose card tells the licence"
    return ""


def _split(data: DataConfig) -> str:
    train = 1 - data.val_fraction - data.test_fraction
    test = (
        f", and the last {100 * data.test_fraction:.3g}% for a test" if data.test_fraction else ""
    )
    return f"the first {100 * train:.3g}% for training, then {100 * data.val_fraction:.3g}% for validation{test}"


def _training(leaving: Leaving, lines: list[Line]) -> list[str]:
    run, record = leaving.run, leaving.run.record
    if "imported" in record:
        return ["Not by glasslm, which only took over its weights."]
    config, train, optimizer = run.config.model, run.config.train, run.config.optimizer
    steps = [line for line in lines if line["kind"] == "step"]
    rows = [("steps", f"{leaving.step:,} of {train.max_steps:,}")]
    if steps and steps[-1].get("tokens"):
        rows += [("tokens seen", f"{steps[-1]['tokens']:,}")]
    if steps and steps[-1].get("epoch") is not None:
        rows += [("passes over the training text", f"{steps[-1]['epoch']:.3g}")]
    warmup = f" after {optimizer.warmup_steps} steps of warmup" if optimizer.warmup_steps else ""
    rows += [
        ("optimizer", f"{optimizer.optimizer}, weight decay {optimizer.weight_decay:g}"),
        ("learning rate", f"at most {optimizer.lr:g}, {optimizer.schedule}{warmup}"),
        ("batch", f"{train.batch_size} sequences of {config.block_size:,} tokens"),
        ("seed", str(record.get("seed", train.seed))),
    ]
    if config.dropout or config.attention_dropout:
        rows += [("dropout", f"{config.dropout:g}, of attention {config.attention_dropout:g}")]
    if optimizer.ema:
        rows += [("weights", f"their average over the steps, with decay {optimizer.ema:g}")]
    if config.lora_rank:
        rows += [
            (
                "adapters",
                f"rank {config.lora_rank} on {config.lora_targets}, merged here into the weights",
            )
        ]
    computed = [str(record[key]) for key in ("engine", "device", "precision") if record.get(key)]
    rows += [("computed by", ", ".join(computed))] if computed else []
    seconds = facts.elapsed_s(lines)
    rows += [("time", duration(seconds))] if seconds else []
    command = _without_folders(str(record.get("command") or ""))
    return [_table(rows), *([run_report.fenced(command)] if command else [])]


def _results(leaving: Leaving, measured: dict[str, Line]) -> list[str]:
    if not measured:
        return ["It was not measured at this step."]
    rows = [
        (SPLITS.get(split, split), number(line["loss"], ".4f"), number(line.get("perplexity"), ".2f"),
         number(line.get("bpb"), ".4f"), f"{line.get('tokens', 0):,}", "all of it" if line.get("whole") else "a sample")
        for split, line in measured.items()
    ]  # fmt: skip
    V = leaving.vocab_size
    rows += [("a guess that knows nothing", f"{math.log(V):.4f}", f"{V:,}", "", "", "")]
    rows += [(who, "", "", bpb, "", remark) for who, bpb, remark in _yardsticks(leaving)]
    header = (
        "measured on",
        "loss (nats per token)",
        "perplexity",
        "bits per byte",
        "tokens",
        "how much",
    )
    told = (
        "Loss is the mean cross-entropy of the next token. Bits per byte can be compared between models with different "
        "tokenizers."
    )
    return [_table(rows, header), told]


def _yardsticks(leaving: Leaving) -> list[tuple[str, str, str]]:
    """Who is no model, its bits per byte of the validation text, and of how much; none where the text is gone."""
    dataset = run_report.dataset_of(leaving.run)
    held = (
        data_checks.text_of(dataset.val.tokens, dataset.tokenizer, data_checks.UNSEEN)
        if dataset
        else b""
    )
    if not held:
        return []
    reached = baselines(held)
    extent = f"{size(len(held))} of the validation text"
    return [
        ("its bytes, one by one", f"{reached['unigram_bpb']:.4f}", extent),
        ("gzip -9", f"{reached['gzip_bpb']:.4f}", extent),
    ]


def _sample(lines: list[Line]) -> list[str]:
    samples = [line for line in lines if line["kind"] == "sample" and line.get("text")]
    if not samples:
        return []
    last = samples[-1]
    told = (
        f"Written by itself at step {last['step']:,}, temperature {last.get('temperature', 1.0):g}:"
    )
    return [
        "## What it writes",
        told,
        run_report.fenced(str(last.get("prompt", "")) + str(last["text"])),
    ]


def _example(leaving: Leaving) -> str:
    prompt = _prompt(leaving.tokenizer, leaving.config.block_size)
    room = leaving.config.block_size - len(leaving.tokenizer.encode(prompt))
    literal = repr(prompt).replace("`", r"\x60")  # which would end the fence
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

prompt = tokenizer({literal}, return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens={max(1, min(NEW_TOKENS, room))}, do_sample=True, temperature=0.8)
print(tokenizer.decode(tokens[0]))
```"""


def _prompt(tokenizer: Tokenizer, longest: int) -> str:
    """Something that every model of its kind can go on from: a line break, or else the first token that is a text."""
    for found in ("\n", *(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))):
        try:
            if 0 < len(tokenizer.encode(found)) <= longest:
                return found
        except InputError:  # a character that it does not know
            continue
    return ""


def _origin(leaving: Leaving, difference: float | None) -> Rows:
    record = leaving.run.record
    rows = [("run", _name(leaving)), ("checkpoint", f"step {leaving.step:,}")]
    rows += [(key, str(record[key])) for key in ("created", "glasslm") if record.get(key)]
    if git := record.get("git"):
        rows += [
            (
                "commit of glasslm",
                f"{git.get('commit')}{', changed since' if git.get('dirty') else ''}",
            )
        ]
    libraries = {
        name: version
        for name, version in (record.get("versions") or {}).items()
        if name != "glasslm"
    }
    rows += (
        [("versions", ", ".join(f"{name} {version}" for name, version in libraries.items()))]
        if libraries
        else []
    )
    machine = record.get("machine") or {}
    system = str(machine.get("platform", "")).split("-")[0]
    parts = (
        system,
        machine.get("cpu"),
        f"{machine['cores']} cores" if machine.get("cores") else "",
    )
    rows += [("machine", ", ".join(str(part) for part in parts if part))] if machine else []
    if merged := record.get("merged_from"):
        rows += [
            ("adapters merged from", f"{_last(str(merged.get('run')))}, step {merged.get('step')}")
        ]
    for name, sha256 in (record.get("imported") or {}).get("sha256", {}).items():
        rows += [(f"sha256 of {name}, as it came", str(sha256))]
    rows += [("sha256 of the configuration", leaving.run.config_sha256)]
    if difference is None:
        return [*rows, ("logits", "not compared with those of transformers")]
    return [
        *rows,
        ("logits", f"those of transformers differ by at most {difference:.1e} of the largest"),
    ]


def _limits(leaving: Leaving) -> str:
    c, tokenizer = leaving.config, leaving.tokenizer
    limits = [
        f"Its context is {c.block_size:,} tokens; it was not trained for longer texts.",
        "It continues text in the manner of what it was trained on. It knows no facts to rely on, follows no "
        "instructions, and nothing filters what it writes.",
        "It may repeat passages of its training text word for word.",
    ]
    if tokenizer.kind == "char":
        limits[:0] = [
            f"It knows only the {tokenizer.vocab_size:,} characters of its text; any other one is an error."
        ]
    return "\n".join(f"- {limit}" for limit in limits)


# -- foreign text -----------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] = ("", "")) -> str:
    lines = [header, ["---"] * len(header), *(map(inline_markdown, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _named(file: dict[str, Any]) -> str:
    """The file without its folders, and where it was fetched from."""
    origin = file.get("origin")
    return _last(file["path"]) + (f", from {origin}" if origin else "")


def _last(path: str) -> str:
    """The last part of a path of any system."""
    return PureWindowsPath(path).name or path


ELSEWHERE = re.compile(
    r"[/\\~]|[A-Za-z]:[/\\]"
)  # how a path begins that says more of a machine than of a run


def _without_folders(command: str) -> str:
    """A command with the last parts alone of absolute paths."""
    if command.startswith("glasslm.train("):
        return re.sub(
            r"(['\"])([^'\"]*)\1",
            lambda found: f"{found[1]}{_shortened(found[2])}{found[1]}",
            command,
        )
    try:
        return shlex.join(map(_shortened, shlex.split(command)))
    except ValueError:  # no command at all
        return ""


def _shortened(word: str) -> str:
    """
    >>> _shortened("--text-file=/home/me/faust.txt")
    '--text-file=faust.txt'
    """
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (_last(value) if ELSEWHERE.match(value) else value)
