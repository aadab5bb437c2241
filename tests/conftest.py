"""Shared by all tests: a separate cache, no network, no fsync, short runs, reasons for skips."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings

from glasslm.runs import blas
from small_runs import shorten_runs, train_trial

# PyTorch's threads wait for each other by spinning, which slows tests on a busy machine several
# times. Programs that tests start inherit this setting.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Hypothesis has no deadline, because the speed of a shared machine varies, and no database, because
# tests write nothing beside the code.
settings.register_profile("glasslm", deadline=None, database=None)
settings.load_profile("glasslm")

# CI and .ci/run fail a test that is skipped for another reason, because it might never run
# anywhere. Each entry is the beginning of a reason. The leg `tests` of .ci/run sets only
# GLASSLM_STRICT_SKIPS, because Hypothesis and pytest read CI as well.
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
    "needs curl",
    "needs chromium",
    "Ray is an extra",
    "llama.cpp is an extra",
    "lm-evaluation-harness is installed by hand",
)
if os.environ.get("GLASSLM_WITHOUT_TORCH"):  # .ci/run sets it where only core dependencies are
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
        "starlette",
        "llguidance",
        "openai",
        "httpx",
        "playwright",
    )
    MAY_SKIP += tuple(f"could not import '{name}'" for name in (*extras, "tensorboard"))
    MAY_SKIP += ("needs the extra [hub]",)

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def fail_unlisted_skip(report: Report) -> Report:
    """The report of a test or a file, as a failure if it was skipped for an unlisted reason."""
    # The longrepr of a skip is a tuple, and that of an expected failure is not.
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
    return fail_unlisted_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return fail_unlisted_skip((yield))


@pytest.fixture(scope="session", autouse=True)
def separate_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))  # learners' progress
        patch.setenv("GLASSLM_MIRROR", "http://127.0.0.1:9")  # a port without a server
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def disable_fsync() -> Iterator[None]:
    """Make fsync return at once in this process: it matters only after a power failure.

    Programs that tests start call the real fsync. tests/test_files.py tests that files are flushed
    before they get their names.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def accept_the_kernel_of_this_machine() -> Iterator[None]:
    """Leave out the warning of a slow BLAS kernel: tests must pass with any OPENBLAS_CORETYPE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blas, "slow_kernel_warning", lambda *_: "")
        yield


@pytest.fixture(scope="session", autouse=True)
def shortened_runs() -> Iterator[None]:
    """Short samples and one question to git; programs that tests start train whole runs."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_runs(patch)
        yield


@pytest.fixture
def trials_in_this_process() -> Iterator[None]:
    """Studies that train their runs here; tests/lab/test_sweep.py tests their processes."""
    with pytest.MonkeyPatch.context() as patch:  # undone after what a test patches
        patch.setattr("glasslm.lab.studies.sweep.run_in_subprocess", train_trial)
        yield


@pytest.fixture
def no_figures() -> Iterator[None]:
    """Pages without figures, which take most of the time of a page."""
    with pytest.MonkeyPatch.context() as patch:  # which a test's monkeypatch.undo() leaves alone
        patch.setattr("glasslm.report.figures.png", lambda figure: b"")
        patch.setattr("glasslm.report.figures.inline_svg", lambda figure, label: "")
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder ../shared/data; the test is skipped on a machine without it."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the data folder beside the repository")
    return path
