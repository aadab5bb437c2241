"""run.json: what a run is, written once."""

from __future__ import annotations

from pathlib import Path

from glasslm.config.schema import DataConfig


def text_name(data: DataConfig) -> str:
    """What the text is called: its corpus, its name on the hub, or its files without their folders."""
    names = ["standard input" if path == "-" else Path(path).name for path in data.text_file]
    return data.corpus or data.hf_dataset or ", ".join(names) or "the default corpus"
