"""Files that hold text in another form: recognised by their content, converted once, and kept in the cache as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from glasslm import files
from glasslm.data.cache import cache_dir
from glasslm.data.sources import mediawiki, parquet
from glasslm.data.sources.texts import Progress, joined, made_once
from glasslm.errors import InputError
from glasslm.text import Say, size

Texts = Callable[
    [Path], Iterator[tuple[float, str]]
]  # each text with the share of the file that is done then

FORMAT = 1  # of the conversion: another number converts everything again


def as_text(path: Path, say: Say) -> Path:
    """`path` itself, or, where it is a parquet file or a MediaWiki dump, the text that was made of it.

    Raises InputError where it is damaged, or a library is missing.
    """
    try:
        kind, texts = _kind(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error
    if texts is None:
        return path

    def make() -> Iterator[bytes]:
        say(f"{path.name}: {kind}, {size(path.stat().st_size)}; converting it to text, once")
        return joined(_told(path, texts, say))

    request = {"sha256": files.sha256_of(path), "kind": kind, "format": FORMAT}
    return made_once(cache_dir("converted"), request, make)[0]


def _kind(path: Path) -> tuple[str, Texts | None]:
    with open(path, "rb") as file:
        head = file.read(8192)
    named = path.suffix.lower() == ".parquet"
    if head.startswith(parquet.MAGIC) and (named or b"\0" in head):
        return "a parquet file", parquet.texts
    if named:
        raise InputError(
            f"{path} is called a parquet file, but does not begin as one: get it again"
        )
    return ("a MediaWiki dump", mediawiki.articles) if mediawiki.is_dump(path) else ("text", None)


def _told(path: Path, texts: Texts, say: Say) -> Iterator[str]:
    """The texts, with a word now and then on how far it is, and on how many were empty."""
    progress, count, empty = Progress(say), 0, 0
    for share, text in texts(path):
        count += 1
        empty += not text.strip("\r\n")
        progress.at(share, f"{path.name}: {share:.0%}, {count:,} texts")
        yield text
    if empty:
        say(
            f"note: {empty:,} of the {count:,} texts in {path.name} are empty or cannot be read, and left out"
        )
