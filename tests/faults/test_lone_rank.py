"""A group of ranks that never forms ends with its cause in one line."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from glasslm.errors import GroupError
from small_runs import train_command, write_text

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


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port of another program, which accepts connections and says nothing."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(16)
    connections: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connections.append(server.accept()[0])
            except OSError:  # closed
                return

    thread = threading.Thread(target=accept)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    thread.join()
    for each in (server, *connections):
        each.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torchrun and signals as on Linux")
@pytest.mark.parametrize(
    ("start", "cause"),
    [
        ("rank 0", "address already in use"),
        ("rank 1", "the program there does not answer"),
        ("torchrun", "address already in use"),  # torchrun itself cannot start the ranks
    ],
)
def test_ranks_on_the_port_of_another_program_end_within_the_time_out(
    start: str, cause: str, taken_port: int, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    text, run = write_text(tmp_path / "text.txt"), tmp_path / "run"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken_port)}
    environment = os.environ | address | {"GLASSLM_GROUP_TIMEOUT": "8", "OMP_NUM_THREADS": "1"}
    command = ["-m", "glasslm", *train_command(text, run, engine="torch", max_steps=2)]
    if start == "torchrun":
        flags = [f"--master-port={taken_port}", "--master-addr=127.0.0.1", "--nproc-per-node=2"]
        command = ["-m", "torch.distributed.run", *flags, *command]
    else:
        rank = start[-1]
        environment |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        environment |= {"LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run(  # without GLASSLM_GROUP_TIMEOUT it would take half an hour
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1, done.stderr
    assert cause in done.stderr
    assert not run.exists()
    if start != "torchrun":
        last = done.stderr.splitlines()[-1]
        assert f"127.0.0.1:{taken_port}" in last
        assert "Traceback" not in done.stderr
