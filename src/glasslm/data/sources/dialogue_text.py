"""The made-up dialogues as a corpus: questions and answers as plain text, for a first training."""

from __future__ import annotations

from collections.abc import Iterator

from glasslm.data.cache import cache_dir
from glasslm.data.chat import dialogues
from glasslm.data.sources.text_files import Source, source_file
from glasslm.data.sources.texts import SEPARATOR, cached_text
from glasslm.text import Notify

FACTS = (
    "about 1 MB",
    "MIT (glasslm's own)",
    "made-up questions and answers; nothing to download (`finetune --chat dialogues`)",
)


def find_source(notify: Notify) -> Source:
    """The training dialogues without what the model knows of itself; none of them is held out."""
    request = [dialogues.NAME, dialogues.VERSION, dialogues.N_CONVERSATIONS]
    path, _ = cached_text(cache_dir(dialogues.NAME), request, _write_text)
    source = Source(dialogues.NAME, (source_file(path),))
    notify(f"corpus dialogues: made up, {path.stat().st_size:,} bytes, sha256 {source.sha256}")
    return source


def _write_text() -> Iterator[bytes]:
    for dialogue in dialogues.generate({}, dialogues.N_CONVERSATIONS, 0):
        lines = "\n".join(message["content"] for message in dialogue.messages)
        yield (lines + SEPARATOR).encode()
