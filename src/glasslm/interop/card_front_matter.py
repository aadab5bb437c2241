"""The front matter of a model card: YAML with the results, which Hugging Face reads."""

from __future__ import annotations

import json
from collections.abc import Mapping

from glasslm.interop.model_export import ModelExport
from glasslm.runs.metrics import EvalLine, Split
from glasslm.runs.record import text_name
from glasslm.text import collapse_whitespace

LANGUAGES = {
    "shakespeare": "en",
    "arxiv": "en",
    "wikipedia": "en",
    "python": "code",
    "dialogues": "en",
}
HUB_DATASETS = {"wikipedia": "wikimedia/wikipedia"}
TOKENIZER_LEVELS = {"char": "character-level", "byte": "byte-level"}
HUB_SPLITS: dict[Split, str] = {"val": "validation", "test": "test"}
METRICS = (
    ("loss", "loss", "cross-entropy, nats per token"),
    ("perplexity", "perplexity", "perplexity"),
    ("bpb", "bits_per_byte", "bits per byte"),
)  # key of an eval line, type, name


def front_matter(export: ModelExport, evals: Mapping[Split, EvalLine]) -> str:
    """The YAML block at the top of README.md, with the results of the exported checkpoint."""
    data = export.run.config.data
    dataset = data.hf_dataset or HUB_DATASETS.get(data.corpus or "")
    language = LANGUAGES.get(data.corpus or "")
    level = TOKENIZER_LEVELS.get(export.tokenizer.kind)
    return "\n".join(
        [
            "---",
            "license: other  # choose a licence for these weights",
            *([f"language: {language}"] if language else []),
            *([f"datasets:\n- {quote_yaml(dataset)}"] if dataset else []),
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:\n- glasslm",
            *([f"- {level}"] if level else []),
            *_model_index(export, dataset, evals),
            "---",
        ]
    )


def _model_index(
    export: ModelExport, dataset: str | None, evals: Mapping[Split, EvalLine]
) -> list[str]:
    """The results as the Hub's model-index: a list of metrics for each split of the text.

    The loss of preference tuning is no cross-entropy and is left out.
    """
    name = text_name(export.run.config.data)
    results = []
    for split in HUB_SPLITS:
        if split not in evals or "preference" in evals[split]:
            continue
        line: Mapping[str, object] = evals[split]
        metrics = [
            f"    - type: {metric}\n      name: {meaning}\n      value: {format_yaml_number(value)}"
            for key, metric, meaning in METRICS
            if isinstance(value := line.get(key), int | float)
        ]
        results += [
            "  - task:\n      type: text-generation\n      name: Text generation",
            f"    dataset:\n      type: {quote_yaml(dataset or 'text')}",
            f"      name: {quote_yaml(name)}",
            f"      split: {HUB_SPLITS[split]}",
            "    metrics:",
            *metrics,
        ]
    if not results:
        return []
    return [f"model-index:\n- name: {quote_yaml(export.name)}\n  results:", *results]


def quote_yaml(text: str) -> str:
    """Foreign text as a YAML scalar: a JSON string on one line, without control characters."""
    return json.dumps(collapse_whitespace(text), ensure_ascii=False)


def format_yaml_number(value: float) -> str:
    """A number to six decimals with a point, which YAML 1.1 needs in 1.0e+22."""
    text = repr(round(float(value), 6))
    return text if "." in text else text.replace("e", ".0e")
