"""A call of a library that reports no progress shows its time on a terminal only."""

import io
import sys
import time

import pytest

from glasslm import text
from glasslm.text import show_elapsed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SHOW_INTERVAL_S", 0.01)
    monkeypatch.setattr(text, "NOTIFY_INTERVAL_S", 0.05)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_the_time_is_shown_on_a_terminal_and_the_end_everywhere(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    messages: list[str] = []
    with show_elapsed("training BPE", messages.append, expected_s=90):
        assert messages == ["training BPE"]
        time.sleep(0.1)
    assert messages[1:] == ["training BPE: done in 0s"]
    shown = stream.getvalue()
    assert ("\r  0s of about 1m 30s" in shown) == stream.isatty()
    assert shown == "" or shown.endswith("\r")  # the line is removed


@pytest.mark.usefixtures("quick")
def test_what_failed_is_not_called_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # a program without standard error
    messages: list[str] = []

    def write() -> None:
        with show_elapsed("writing", messages.append):
            time.sleep(0.1)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write()
    assert messages == ["writing"]
