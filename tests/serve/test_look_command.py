"""glasslm look: it serves the page, and opens it in the browser."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from server_process import make_run

from glasslm.cli import main


def test_the_page_opens_in_the_browser(tmp_path: Path) -> None:
    if os.name != "posix":
        pytest.skip("needs POSIX signals")
    run, opened = make_run(tmp_path / "run"), tmp_path / "opened.txt"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > "{opened}"\n', encoding="utf-8")
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    command = [sys.executable, "-m", "glasslm", "look", str(run), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"BROWSER": f"{browser} %s"},
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().removeprefix("serving: ").strip()
            for _ in range(200):
                if opened.exists() and opened.read_text(encoding="utf-8"):
                    break
                time.sleep(0.05)
            assert opened.read_text(encoding="utf-8") == address
        finally:
            process.kill()


def test_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["look"]) == 2
    assert "glasslm look --help" in capsys.readouterr().err
    assert main(["look", "nowhere", "--port", "70000"]) == 2
    assert "0 (any free one) to 65535" in capsys.readouterr().err
