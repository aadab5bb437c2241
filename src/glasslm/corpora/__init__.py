"""Where text comes from: named corpora and your own files, found, hashed and read in chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from glasslm.config import Corpus, DataConfig
from glasslm.corpora import arxiv, files, python_code, shakespeare
from glasslm.corpora.cache import cache_dir
from glasslm.corpora.download import HURRIED, DownloadError
from glasslm.corpora.files import Source, SourceFile
from glasslm.wording import Say

__all__ = ["DESCRIPTIONS", "Source", "SourceFile", "cache_dir", "find", "of_run"]

DESCRIPTIONS: dict[Corpus, str] = {
    "shakespeare": shakespeare.DESCRIPTION,
    "python": python_code.DESCRIPTION,
    "arxiv": arxiv.DESCRIPTION,
}


def find(data: DataConfig, say: Say) -> Source:
    """The text that `data` asks for, downloaded if it must be; `say` gets what a person should know.

    Without a corpus and without files it is Shakespeare, or, when that cannot be had within 5 seconds, loudly, Python's
    own library. Raises InputError when what was asked for by name is not there.
    """
    if data.text_file:
        return files.find(data.text_file, say)
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
        say("WARNING: falling back to the corpus 'python'; with --corpus shakespeare this is an error instead")
        return replace(python_code.find(say), fallback=True)


def of_run(data: DataConfig, facts: dict[str, Any], say: Say) -> Source:
    """The text that a run was trained on, wherever it is resumed: `data` is its config, `facts` its record of the data.

    A named corpus is found again; your own files are those that were recorded, also where they came through a pipe.
    Raises DamagedError when one of them is gone or has changed.
    """
    return files.of_run(facts["files"]) if data.text_file else find(data, say)
