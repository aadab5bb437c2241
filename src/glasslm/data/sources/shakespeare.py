"""Tiny Shakespeare: 1,115,394 characters of plays, 65 of them different."""

from __future__ import annotations

from collections.abc import Sequence

from glasslm.data.cache import cache_dir
from glasslm.data.download import PATIENT_TIMEOUTS_S, DownloadError, RemoteFile, download_file
from glasslm.data.sources.text_files import Source, source_file
from glasslm.text import Notify

FACTS = ("1.1 MB", "public domain", "https://github.com/karpathy/char-rnn, downloaded once")

REMOTE = RemoteFile(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def find_source(notify: Notify, timeouts_s: Sequence[float] = PATIENT_TIMEOUTS_S) -> Source:
    """The text, from the cache or the web. Raises DownloadError when neither has it."""
    path = cache_dir("corpora") / "shakespeare.txt"
    if not path.is_file():
        notify("corpus shakespeare: plays of Shakespeare, 1.1 MB, in the public domain")
    try:
        download_file(REMOTE, path, notify, timeouts_s)
    except DownloadError as error:
        raise DownloadError(f"{error}, or train on any text with --text-file PATH") from error
    return Source("shakespeare", (source_file(path, REMOTE.url),))
