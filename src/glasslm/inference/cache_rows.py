"""Rows of a KV cache that texts use in turn, and the prefixes that they share.

A text is read in chunks of CHUNK_TOKENS, the last one shorter. Keys and values of a chunk depend
only on the tokens up to its end, so that a text which starts with the same whole chunks copies
them from the row of the other one, and its bits stay the same. A row keeps its chunks after its
text has ended, until another text uses the row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.engines.protocol import Engine

CHUNK_TOKENS = 64


@dataclass
class _Row:
    """What a row of the cache holds."""

    used: bool = False
    last_use: int = 0
    chunk_ids: list[int] = field(default_factory=list)  # of whole chunks
    ids: list[int] = field(default_factory=list)  # of a whole prompt, with ...
    logits: NDArray[Any] | None = None  # ... the logits (V,) after it


class CacheRows:
    """`count` rows of one KV cache, each free or used by one text."""

    def __init__(self, engine: Engine, config: ModelConfig, count: int, capacity: int) -> None:
        self.count = count
        self.cache = engine.new_cache(count, capacity)
        self.chunk = min(CHUNK_TOKENS, config.block_size)
        self._size = config.cache_length(capacity)
        self._rows = [_Row() for _ in range(count)]
        self._tile = engine.row_tile
        self._uses = 0

    @property
    def has_free(self) -> bool:
        """Whether a row is free."""
        return not all(row.used for row in self._rows)

    def acquire(self) -> int:
        """A free row: of a tile that is computed anyway, and of these the longest unused one."""
        tiles = {i // self._tile for i, row in enumerate(self._rows) if row.used}
        index = min(
            (i for i, row in enumerate(self._rows) if not row.used),
            key=lambda i: (i // self._tile not in tiles, self._rows[i].last_use),
        )
        self._rows[index].used = True
        return index

    def begin(self, index: int, ids: list[int], share: bool) -> tuple[int, NDArray[Any] | None]:
        """Begin to read a text into its row: the number of tokens that need not be read.

        With `share` these are copied from another row. If it has read all of them, the second value
        is the logits (V,) after the text, else None.
        """
        source, length, logits = self._find_prefix(ids) if share else (index, 0, None)
        self._uses += 1
        if length:
            self.cache.copy_prefix(source, index, np.array(ids[:length]))
            self._rows[source].last_use = self._uses
        self._rows[index].last_use = self._uses
        row = self._rows[index]
        row.chunk_ids = ids[: length - length % self.chunk]
        row.ids, row.logits = ([], None) if logits is None else (ids, logits)
        return length, logits

    def _find_prefix(self, ids: list[int]) -> tuple[int, int, NDArray[Any] | None]:
        """The row that holds most tokens of a text, their number, and the logits if it is whole."""
        best, lengths = (0, 0), self.cache.lengths
        for index, row in enumerate(self._rows):
            if lengths[index] > self._size:
                continue  # newer tokens have overwritten the first ones
            if row.logits is not None and row.ids == ids:
                return index, len(ids), row.logits
            best = max(best, (self._common_length(row.chunk_ids, ids), -index))
        return -best[1], best[0], None

    def _common_length(self, chunk_ids: list[int], ids: list[int]) -> int:
        """The tokens in equal whole chunks; the last token is read in any case, for its logits."""
        length, last = 0, min(len(chunk_ids), len(ids) - 1)
        while (end := length + self.chunk) <= last and chunk_ids[length:end] == ids[length:end]:
            length = end
        return length

    def record_chunk(self, index: int, ids: list[int], logits: NDArray[Any] | None) -> None:
        """Note the tokens `ids` that row `index` holds after a chunk of its text.

        `logits` (V,): those after the text, if it ends here and they are to be shared.
        """
        row = self._rows[index]
        row.chunk_ids = ids[: len(ids) - len(ids) % self.chunk]
        if logits is not None:
            row.ids, row.logits = ids, logits.copy()

    def restart(self, index: int) -> None:
        """Empty the row of a text that goes on: it reads its newest tokens again."""
        self.cache.clear(index)
        self._forget(index)

    def release(self, index: int) -> None:
        """Free a row. It keeps what it holds for other texts."""
        if self.cache.lengths[index] > self._size:
            self._forget(index)
        self.cache.clear(index)
        self._rows[index].used = False

    def erase(self, index: int) -> None:
        """Free a row whose numbers may be nan."""
        self._forget(index)
        self.cache.erase(index)
        self._rows[index].used = False

    def _forget(self, index: int) -> None:
        row = self._rows[index]
        row.chunk_ids, row.ids, row.logits = [], [], None
