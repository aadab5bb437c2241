"""glasslm serve without the libraries that it needs."""

import importlib.util

import pytest

from glasslm.cli import main


@pytest.mark.parametrize("library", ["starlette", "uvicorn", "prometheus_client"])
def test_without_a_library_the_command_names_the_extra(
    library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else find_spec(name)
    )
    assert main(["serve", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert library in error
    assert "pip install 'glasslm[serve]'" in error
    assert len(error.splitlines()) == 1
