"""Stop strings: text is held back while it may be the start of one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StopStringBuffer:
    """Holds text back while it may be the start of a stop string.

    >>> buffer = StopStringBuffer(("END",))
    >>> [buffer.push(text) for text in ("say E", "N", "TER E", "ND")], buffer.stopped
    (['say ', '', 'ENTER ', ''], True)
    """

    stops: tuple[str, ...]
    stopped: bool = False
    _text: str = ""

    def push(self, text: str) -> str:
        """Append text; returns the text that cannot become part of a stop string any more."""
        self._text += text
        matches = [
            (start + len(stop), start)
            for stop in self.stops
            if (start := self._text.find(stop)) >= 0
        ]
        if matches:
            self.stopped = True
            # The match that is complete first counts, so that the portions make no difference.
            _, start = min(matches)
            released, self._text = self._text[:start], ""
            return released
        n_held = max((_partial_match_length(self._text, stop) for stop in self.stops), default=0)
        end = len(self._text) - n_held
        released, self._text = self._text[:end], self._text[end:]
        return released

    def flush(self) -> str:
        """The text still held back, once no more text comes."""
        released, self._text = self._text, ""
        return released


def _partial_match_length(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper prefix of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
