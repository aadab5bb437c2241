"""Shared by all tests: a cache folder of their own, no network, no waiting for the disk, the data
folder, and what CI lets a test skip for."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings

# PyTorch's threads wait for each other by spinning, which slows the tests of a busy machine several
# times. The programs that tests start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# No deadline: time on a shared machine proves nothing. No database: tests write nothing beside the
# code.
settings.register_profile("glasslm", deadline=None, database=None)
settings.load_profile("glasslm")

# A skip for any other reason is a failure in CI and in .ci/run, whose leg `tests` runs without the
# variable CI, because Hypothesis and pytest read it, too: a test that is never run proves nothing.
# Each is how a reason begins.
STRICT = bool(os.environ.get("CI") or os.environ.get("GLASSLM_STRICT_SKIPS"))
MAY_SKIP: tuple[str, ...] = (
    "needs the data folder beside the repository",
    "needs a CUDA device",
    "needs a CPU with bfloat16",
    "needs fork, SIGKILL or resource limits",
    "needs POSIX signals",
    "needs named pipes",
    "needs resource limits",
    "needs permissions that bind",
    "torchrun and signals as on Linux",
    "no /dev/full here",
    "root may read everything",
    "Ray is an extra",
    "llama.cpp is an extra",
    "lm-evaluation-harness is installed by hand",
)
if os.environ.get(
    "GLASSLM_WITHOUT_TORCH"
):  # the leg of .ci/run that has the core dependencies alone
    extras = (
        "torch",
        "tiktoken",
        "transformers",
        "peft",
        "gguf",
        "huggingface_hub",
        "datasets",
        "pyarrow",
        "wandb",
    )
    MAY_SKIP += tuple(f"could not import '{name}'" for name in (*extras, "tensorboard"))
    MAY_SKIP += ("needs the extra [hub]",)

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def _judged(report: Report) -> Report:
    """The report of a test or a file; failed where it was skipped for an unlisted reason."""
    # an xfail has no tuple
    if STRICT and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = (
                f"skipped in CI for a reason that tests/conftest.py does not list: {reason}"
            )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _judged((yield))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GLASSLM_MIRROR", "http://127.0.0.1:9")  # nobody listens there
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """In this process fsync returns at once: only a machine that loses its power can tell, and no
    test takes it away.

    The programs that tests start wait for the disk, and tests/test_files.py shows that nothing has
    its name before.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def short_samples() -> Iterator[None]:
    """Samples on the way of 50 tokens: those of 200 take longer than the steps of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glasslm.training.loop.SAMPLE_TOKENS", 50)
        yield


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their pictures, which take longer than all else about a page."""
    monkeypatch.setattr("glasslm.report.figures.png", lambda figure: b"")
    monkeypatch.setattr("glasslm.report.figures.inline_svg", lambda figure, label: "")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """../shared/data, which not every machine has."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the data folder beside the repository")
    return path
