"""Find the text that a configuration asks for: a named corpus, files or a Hugging Face dataset.

A new named corpus is a module beside this one, a row of CORPUS_FACTS, a branch of `find_source`,
and its word in config/data_config.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from glasslm.config.schema import DataConfig, TextCorpus
from glasslm.data.download import HURRIED_TIMEOUTS_S, DownloadError
from glasslm.data.sources import (
    arxiv,
    dialogue_text,
    hub,
    python_code,
    shakespeare,
    text_files,
    text_paths,
    wikipedia,
)
from glasslm.data.sources.text_files import Source
from glasslm.data.sources.texts import SEPARATOR
from glasslm.data.special_tokens import Documents
from glasslm.data.tasks import catalogue
from glasslm.errors import InputError
from glasslm.text import Notify

# For each named corpus but the tasks (data/tasks/): its size, its licence, and its origin.
CORPUS_FACTS: dict[TextCorpus, tuple[str, str, str]] = {
    "shakespeare": shakespeare.FACTS,
    "python": python_code.FACTS,
    "arxiv": arxiv.FACTS,
    "wikipedia": wikipedia.FACTS,
    "dialogues": dialogue_text.FACTS,
}


def find_source(data: DataConfig, notify: Notify) -> Source:
    """The text that `data` asks for, downloaded if necessary, with the ends of its documents.

    The default is Shakespeare. If it cannot be downloaded within 5 seconds, a warning is sent and
    the standard library of Python is used. Raises InputError when a requested text is missing.
    """
    if data.chat is not None:
        raise InputError("--chat is for `glasslm finetune RUN`: give a text, or leave it out")
    if (
        data.max_bytes != DataConfig.max_bytes
        and data.corpus != "wikipedia"
        and not data.hf_dataset
    ):
        raise InputError(
            "--max-bytes is for --corpus wikipedia and --hf-dataset: other texts are taken whole"
        )
    return end_documents(_find_text(data, notify), data)


def end_documents(source: Source, data: DataConfig) -> Source:
    """`source` with the ends of documents that `data` asks for, if any."""
    if not data.used_special_tokens:
        return source
    end, *others = data.used_special_tokens
    # An abstract is one line; the cached text has blank lines between abstracts.
    separator = data.document_separator or (SEPARATOR if data.corpus == "arxiv" else "")
    return replace(source, documents=Documents(end, separator, tuple(others)))


def _find_text(data: DataConfig, notify: Notify) -> Source:
    """The text of `data`."""
    separator = _row_separator(data)
    if data.text_file:
        return text_paths.find_source(
            data.text_file, notify, data.encoding_errors, data.json_field, separator
        )
    if data.hf_dataset:
        request = hub.HubRequest(
            data.hf_dataset,
            data.hf_config,
            data.hf_split,
            data.hf_column,
            data.max_byte_count,
            revision=data.hf_revision,
            separator=separator,
        )
        return hub.find_source(data.hf_dataset, request, notify)
    if data.task:
        return catalogue.find_source(data, notify)
    if data.corpus == "wikipedia":
        return wikipedia.find_source(data.max_byte_count, notify, separator)
    if data.corpus == "dialogues":
        return dialogue_text.find_source(notify)
    if data.corpus == "python":
        return python_code.find_source(notify)
    if data.corpus == "arxiv":
        return arxiv.find_source(data.category, data.max_results, notify)
    if data.corpus == "shakespeare":
        return shakespeare.find_source(notify)
    try:
        return shakespeare.find_source(notify, timeouts_s=HURRIED_TIMEOUTS_S)
    except DownloadError as error:
        notify(f"warning: {error}")
        notify(
            "warning: falling back to the corpus 'python'; "
            "with --corpus shakespeare this is an error instead"
        )
        return replace(python_code.find_source(notify), fallback=True)


def _row_separator(data: DataConfig) -> str:
    """What stands between the rows of a dataset: the token that ends documents, if there is one."""
    return next(iter(data.used_special_tokens), SEPARATOR)


def find_run_source(data: DataConfig, facts: dict[str, Any], notify: Notify) -> Source:
    """The text that a run was trained on. `data` is its config, `facts` the "data" of its run.json.

    A named corpus or dataset is found again. Files are those that run.json records, also where they
    came through a pipe. Parquet files are converted again if their texts are lost. Raises
    DamagedError when a file is missing or has changed, InputError for an imported model, which has
    no text.
    """
    if not facts["files"]:
        raise InputError(
            "this model was imported without its training text: give a text with --text-file"
        )
    if data.text_file:
        files = text_paths.convert_again(
            facts["files"], data.text_file, notify, _row_separator(data)
        )
        source = text_files.reopen_source(files, data.json_field)
        return end_documents(source, data)
    return find_source(data, notify)
