"""One BLAS thread for each thread of the engine: BLAS threads under ours run at half the speed.

The limit of OpenBLAS belongs to the process. Engines in several threads share it: the first one
sets it, and the last one restores what was before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_users = 0  # blocks that are being executed
_previous: dict[str, tuple[Any, int]] = {}  # by path: a library, and its threads before the limit


@contextmanager
def one_blas_thread(libraries: Sequence[Any]) -> Iterator[None]:
    """Limit the libraries, controllers of threadpoolctl, to the calling thread in the block.

    It takes a tenth of the time of threadpool_limits.
    """
    global _users
    with _lock:
        _users += 1
        for library in libraries:
            if (threads := library.num_threads) != 1:
                _previous.setdefault(library.filepath, (library, threads))
                _set_threads(library, 1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for library, threads in _previous.values():
                    _set_threads(library, threads)
                _previous.clear()


def _set_threads(library: Any, threads: int) -> None:
    # threadpoolctl 3.8 drops the calls of all threads but the first one, without a word.
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread(force=True)
    library.set_num_threads(threads)
