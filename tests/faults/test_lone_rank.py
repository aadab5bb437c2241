"""A group of ranks that never forms ends with its cause in one line."""

import pytest

from glasslm.errors import GroupError

CAUSES = ["Timed out after 4 seconds waiting for clients", "EADDRINUSE: address already in use"]


@pytest.mark.parametrize("cause", CAUSES)
def test_a_group_that_never_forms_is_named_with_its_address(
    cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from torch import distributed as dist

    from glasslm.engines.torch import distributed

    def refuse(*_: object, **__: object) -> None:
        raise dist.DistError(f"{cause}\nC++ stack trace")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    monkeypatch.setenv("GLASSLM_GROUP_TIMEOUT", "3")
    for name, value in (("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29655")):
        monkeypatch.setenv(name, value)
    with pytest.raises(GroupError, match=r"rank 1 .* 127\.0\.0\.1:29655 in 3 s") as caught:
        distributed.follow_leader()
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)
