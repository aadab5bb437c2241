"""Text streamed from a data set of Hugging Face, no more of it than was asked for, kept in the cache.

The libraries run in a process of their own (hub_reader.py), which says what it finds, a line of JSON each. Here its
texts are joined and cut, and it is ended when there is enough or when nothing comes any more.
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
from glasslm.data.sources.child import Child
from glasslm.data.sources.files import Source, source_file
from glasslm.data.sources.texts import Progress, joined, made_once
from glasslm.errors import InputError
from glasslm.text import Say, duration, harmless, size

WAIT_S, WAITS = (
    30.0,
    20,
)  # seconds without a text until a word about that, and how often, before it is given up
READER = "glasslm.data.sources.hub_reader"


@dataclass(frozen=True)
class Wanted:
    """Which part of which data set. `title` is a column that comes before each text; `revision` a commit."""

    dataset: str
    config: str | None
    split: str
    column: str | None
    most: int  # bytes
    title: str | None = None
    revision: str | None = None


def find(name: str, wanted: Wanted, say: Say, by_hand: str = "") -> Source:
    """The text, from the cache or the hub. Raises DownloadError when neither has it; `by_hand` is its last clause.

    InputError where something that was asked for by name is not there, or the library `datasets` is missing.
    """
    by_hand = by_hand or (
        f"to supply it by hand, get a parquet file from https://huggingface.co/datasets/{wanted.dataset}/tree/main "
        "and give it with --text-file"
    )

    about: dict[str, str] = {}  # as the hub says it

    def make() -> Iterator[bytes]:
        with closing(_texts(wanted, about, say, by_hand)) as texts:
            yield from joined(_told(texts, wanted, say), wanted.most)

    def origin() -> str:
        return f"https://huggingface.co/datasets/{about['dataset']}/tree/{about['revision']}"

    path, found = made_once(cache_dir("corpora", "hub"), dataclasses.asdict(wanted), make, origin)
    return Source(name, (source_file(path, found),))


def _told(texts: Iterator[str], wanted: Wanted, say: Say) -> Iterator[str]:
    """The texts, with a word now and then on how far it is; too little text is an error, or worth a note."""
    progress, total = Progress(say), 0
    for text in texts:
        yield text
        total += len(text.encode("utf-8", "replace"))
        progress.at(total / wanted.most, f"{wanted.dataset}: {size(total)} of {size(wanted.most)}")
    if not total:
        raise InputError(f"{wanted.dataset}, split {wanted.split}, holds no text")
    if total < wanted.most:
        say(f"note: that is all of {wanted.dataset}, split {wanted.split}: {size(total)} of text")


def _texts(
    wanted: Wanted, about: dict[str, str], say: Say, by_hand: str
) -> Generator[str, None, None]:
    """What the reader finds, as it comes; before that it fills `about`."""

    def failed(why: str) -> DownloadError:
        return DownloadError(f"{wanted.dataset} could not be read: {why}; {by_hand}")

    request = json.dumps(dataclasses.asdict(wanted))
    with (
        tempfile.TemporaryDirectory(dir=cache_dir(), ignore_cleanup_errors=True) as folder,
        Child(READER, request, folder, environment=_environment(folder)) as reader,
    ):
        waits = 0
        while True:
            try:
                line = reader.line(WAIT_S)
            except TimeoutError:
                waits += 1
                silence = f"nothing came for {duration(waits * WAIT_S)}{reader.last_words()}"
                if waits == WAITS:
                    raise failed(silence) from None
                say(f"{wanted.dataset}: {silence}; waiting")
                continue
            waits = 0
            if not line:
                raise failed(f"its process ended{reader.last_words()}")
            said: dict[str, Any] = json.loads(line)
            if "text" in said:
                yield said["text"]
            elif "about" in said:
                about |= said["about"]
                say(_about(about, wanted))
            elif "refused" in said:
                raise InputError(harmless(said["refused"]))
            elif "failed" in said:
                raise failed(harmless(said["failed"]))
            else:
                return


def _about(about: dict[str, str], wanted: Wanted) -> str:
    """Licence and size, before anything is fetched."""
    part = ", ".join(filter(None, (wanted.config, wanted.split)))
    which = f"Hugging Face {about['dataset']} ({part}) at {about['revision'][:12]}"
    return harmless(
        f"{which}: {about['licence']}; {about['size']}, taking at most {size(wanted.most)} of text"
    )


def _environment(folder: str) -> dict[str, str]:
    """The reader's: its own caches, which go with it; no telemetry; and the mirror in place of the hub."""
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
        # The token of huggingface.co is nobody else's business.
        environment |= {"HF_ENDPOINT": mirror.rstrip("/"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return environment
