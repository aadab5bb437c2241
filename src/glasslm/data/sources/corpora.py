"""Where text comes from: named corpora and your own files, found, hashed and read in chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from glasslm.config.schema import Corpus, DataConfig
from glasslm.data.cache import cache_dir
from glasslm.data.download import HURRIED, DownloadError
from glasslm.data.sources import arxiv, files, hub, python_code, shakespeare, wikipedia
from glasslm.data.sources.files import Source, SourceFile
from glasslm.errors import InputError
from glasslm.text import Say

__all__ = ["KNOWN", "Source", "SourceFile", "cache_dir", "find", "of_run"]

# Of each named corpus: its size, its licence, and where it comes from.
KNOWN: dict[Corpus, tuple[str, str, str]] = {
    "shakespeare": shakespeare.FACTS,
    "python": python_code.FACTS,
    "arxiv": arxiv.FACTS,
    "wikipedia": wikipedia.FACTS,
}


def find(data: DataConfig, say: Say) -> Source:
    """The text that `data` asks for, downloaded if it must be; `say` gets what a person should know.

    Without a corpus, a data set and files it is Shakespeare, or, when that cannot be had within 5 seconds, loudly,
    Python's own library. Raises InputError when what was asked for by name is not there.
    """
    if (
        data.max_bytes != DataConfig.max_bytes
        and data.corpus != "wikipedia"
        and not data.hf_dataset
    ):
        raise InputError(
            "--max-bytes is for --corpus wikipedia and --hf-dataset: other texts are taken whole"
        )
    if data.text_file:
        return files.find(data.text_file, say)
    if data.hf_dataset:
        part = (data.hf_config, data.hf_split, data.hf_column)
        wanted = hub.Wanted(data.hf_dataset, *part, data.most_bytes, revision=data.hf_revision)
        return hub.find(data.hf_dataset, wanted, say)
    if data.corpus == "wikipedia":
        return wikipedia.find(data.most_bytes, say)
    if data.corpus == "python":
        return python_code.find(say)
    if data.corpus == "arxiv":
        return arxiv.find(data.category, data.max_results, say)
    if data.corpus == "shakespeare":
        return shakespeare.find(say)
    try:
        return shakespeare.find(say, attempts=HURRIED)
    except DownloadError as error:
        say(f"WARNING: {error}")
        say(
            "WARNING: falling back to the corpus 'python'; with --corpus shakespeare this is an error instead"
        )
        return replace(python_code.find(say), fallback=True)


def of_run(data: DataConfig, facts: dict[str, Any], say: Say) -> Source:
    """The text that a run was trained on, wherever it is resumed: `data` is its config, `facts` its record of the data.

    A named corpus or data set is found again; your own files are those that were recorded, also where they came through
    a pipe or were converted.
    Raises DamagedError when one of them is gone or has changed, InputError for an imported model, which has none.
    """
    if not facts["files"]:
        raise InputError(
            "this model was imported, without the text that it was trained on: give one with --text-file"
        )
    return files.of_run(facts["files"]) if data.text_file else find(data, say)
