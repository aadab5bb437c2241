"""A test that is skipped in CI for no known reason fails there.

Anywhere else it is skipped, as its author said.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.skip("needs POSIX signals")
def test_known(): pass

@pytest.mark.skip("no time today")
def test_unknown(): pass

@pytest.mark.xfail(reason="no time today")
def test_expected_to_fail(): assert False
"""
NEEDS = "import sys, pytest; sys.modules['{0}'] = None; pytest.importorskip('{0}')"
MODULES = (
    "torch",
    "gguf",
    "safetensors",
)  # two of extras, which the leg without torch lacks, and one of the core
EXTRAS = {"could not import 'torch'", "could not import 'gguf'"}
VARIABLES = {"CI", "GLASSLM_STRICT_SKIPS", "GLASSLM_WITHOUT_TORCH"}
NOT_LISTED = {
    "no time today": "tests/test_it.py::test_unknown",
    **{f"could not import '{name}'": f"tests/test_{name}.py" for name in MODULES},
}


@pytest.mark.parametrize(
    ("environment", "allowed"),
    [
        ({"CI": "true"}, set()),
        ({"GLASSLM_STRICT_SKIPS": "1"}, set()),
        ({"CI": "true", "GLASSLM_WITHOUT_TORCH": "1"}, EXTRAS),
        ({}, set(NOT_LISTED)),
    ],
)
def test_ci_fails_on_a_reason_that_is_not_listed(
    environment: dict[str, str], allowed: set[str], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("conftest.py", "small_runs.py"):
        shutil.copy(pytestconfig.rootpath / "tests" / name, tests)
    for name, source in {"it": TESTS, **{name: NEEDS.format(name) for name in MODULES}}.items():
        (tests / f"test_{name}.py").write_text(source, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "tests",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=inherited | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    wrong = {reason: where for reason, where in NOT_LISTED.items() if reason not in allowed}
    assert done.returncode == (pytest.ExitCode.TESTS_FAILED if wrong else pytest.ExitCode.OK)
    assert set(re.findall(r"^ERROR (\S+)", done.stdout, re.M)) == set(wrong.values())
    assert set(
        re.findall(r"does not list: (no time today|could not import '\w+')", done.stdout)
    ) == set(wrong)
    assert f"{1 + len(allowed)} skipped, 1 xfailed" in done.stdout
