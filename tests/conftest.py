"""Shared by all tests: a cache folder of their own, no network, and the data folder beside the repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: time on a shared machine proves nothing. No database: tests write nothing beside the code.
settings.register_profile("glasslm", deadline=None, database=None)
settings.load_profile("glasslm")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GLASSLM_MIRROR", "http://127.0.0.1:9")  # nobody listens there
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """../shared/data, which not every machine has."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the data folder beside the repository")
    return path
