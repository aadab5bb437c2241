"""Stream text from a Hugging Face dataset, up to a number of bytes, and keep it in the cache.

The libraries run in a process of their own (hub_reader.py), which writes a line of JSON for each
text. This module joins and cuts the texts. It kills the process when there is enough text, or when
the process is silent for too long.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from glasslm.data.cache import cache_dir
from glasslm.data.download import DownloadError
from glasslm.data.sources.child_process import ChildProcess
from glasslm.data.sources.text_files import Source, source_file
from glasslm.data.sources.texts import SEPARATOR, cached_text, join_texts
from glasslm.errors import ExhaustedError, InputError
from glasslm.text import Notify, Progress, escape_control_chars, format_bytes, format_duration

WAIT_S = 30.0  # for a line of the reader, before a message
MAX_WAITS = 20  # in a row, before the reader is given up
READER_MODULE = "glasslm.data.sources.hub_reader"


@dataclass(frozen=True)
class HubRequest:
    """The requested part of a dataset."""

    dataset: str
    config: str | None
    split: str
    column: str | None
    max_bytes: int  # of text
    title: str | None = None  # a column that is put before each text
    revision: str | None = None  # a commit
    separator: str = SEPARATOR  # between two texts

    def cache_key(self) -> dict[str, Any]:
        """The fields whose hash names the text in the cache, under the names of glasslm 0.1."""
        fields = dataclasses.asdict(self)
        fields["most"] = fields.pop("max_bytes")
        if self.separator == SEPARATOR:
            del fields["separator"]
        return fields


def find_source(name: str, request: HubRequest, notify: Notify, manual_supply: str = "") -> Source:
    """The text of a dataset, from the cache or the hub.

    Raises DownloadError when neither has it; `manual_supply` is the last clause of its message.
    Raises InputError where the dataset, a part of it, or the library `datasets` is missing.
    """
    manual_supply = manual_supply or (
        "to supply it by hand, get a parquet file from "
        f"https://huggingface.co/datasets/{request.dataset}/tree/main and give it with --text-file"
    )

    dataset_info: dict[str, str] = {}  # filled by _read_texts

    def make_text() -> Iterator[bytes]:
        with closing(_read_texts(request, dataset_info, notify, manual_supply)) as texts:
            reported = _report_progress(texts, request, notify)
            yield from join_texts(reported, request.max_bytes, request.separator)

    def find_origin() -> str:
        name, revision = dataset_info["dataset"], dataset_info["revision"]
        return f"https://huggingface.co/datasets/{name}/tree/{revision}"

    path, origin = cached_text(
        cache_dir("corpora", "hub"), request.cache_key(), make_text, find_origin
    )
    return Source(name, (source_file(path, origin),))


def _report_progress(texts: Iterator[str], request: HubRequest, notify: Notify) -> Iterator[str]:
    """The texts, with progress messages, and a note if they are fewer bytes than requested.

    Raises InputError if there is no text.
    """
    progress, total = Progress(notify), 0
    for text in texts:
        yield text
        total += len(text.encode("utf-8", "replace"))
        progress.update(
            total / request.max_bytes,
            f"{request.dataset}: {format_bytes(total)} of {format_bytes(request.max_bytes)}",
        )
    if not total:
        raise InputError(
            f"{request.dataset}, split {request.split}, holds no text: choose another one with "
            "--hf-split or --hf-column"
        )
    if total < request.max_bytes:
        notify(
            f"note: that is all of {request.dataset}, split {request.split}: "
            f"{format_bytes(total)} of text"
        )


def _read_texts(
    request: HubRequest, dataset_info: dict[str, str], notify: Notify, manual_supply: str
) -> Generator[str, None, None]:
    """The texts as the reader sends them. `dataset_info` is filled before the first one."""

    def failure(reason: str) -> DownloadError:
        return DownloadError(f"{request.dataset} could not be read: {reason}; {manual_supply}")

    arguments = json.dumps(dataclasses.asdict(request))
    with (
        tempfile.TemporaryDirectory(dir=cache_dir(), ignore_cleanup_errors=True) as folder,
        ChildProcess(READER_MODULE, arguments, folder, environment=_environment(folder)) as reader,
    ):
        waits = 0
        while True:
            try:
                line = reader.read_line(WAIT_S)
            except TimeoutError:
                waits += 1
                silence = (
                    f"nothing came for {format_duration(waits * WAIT_S)}{reader.last_error_line()}"
                )
                if waits == MAX_WAITS:
                    raise failure(silence) from None
                notify(f"{request.dataset}: {silence}; waiting")
                continue
            waits = 0
            if not line:
                raise failure(f"its process ended{reader.last_error_line()}")
            message: dict[str, Any] = json.loads(line)
            if "text" in message:
                yield message["text"]
            elif "dataset_info" in message:
                dataset_info |= message["dataset_info"]
                notify(_describe(dataset_info, request))
            elif "refused" in message:
                raise InputError(escape_control_chars(message["refused"]))
            elif "exhausted" in message:
                raise ExhaustedError(escape_control_chars(message["exhausted"]))
            elif "failed" in message:
                raise failure(escape_control_chars(message["failed"]))
            else:
                return


def _describe(dataset_info: dict[str, str], request: HubRequest) -> str:
    """Licence and size of the dataset, for a message before the first text is fetched."""
    part = ", ".join(filter(None, (request.config, request.split)))
    dataset = f"Hugging Face {dataset_info['dataset']} ({part}) at {dataset_info['revision'][:12]}"
    return escape_control_chars(
        f"{dataset}: {dataset_info['licence']}; {dataset_info['size']}, "
        f"taking at most {format_bytes(request.max_bytes)} of text"
    )


def _environment(folder: str) -> dict[str, str]:
    """Environment of the reader: caches inside `folder`, no telemetry, the mirror as the hub."""
    caches = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_ASSETS_CACHE")
    environment = os.environ | {name: os.path.join(folder, name) for name in caches}
    environment |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "PYTHONIOENCODING": "utf-8",
    }
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    mirror = os.environ.get("GLASSLM_MIRROR")
    if mirror:
        # A mirror must not receive the user's token of huggingface.co.
        environment |= {"HF_ENDPOINT": mirror.rstrip("/"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return environment
