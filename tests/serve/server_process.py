"""A server as a process of its own, and small runs for it to serve."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from doubles import make_record
from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from glasslm.engines.factory import make_engine
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz.,"
SIZES = {"d_model": 16, "n_layers": 1, "n_heads": 2, "block_size": 64}

# Runs the server with other limits, after an optional line of Python.
SCRIPT = """
import json, sys
{prelude}
from glasslm.cli.serve import EXTRA
from glasslm.config.schema import DeviceConfig
from glasslm.serve.limits import Limits
from glasslm.serve.server import ServerSettings, serve
from glasslm.serve.served_model import name_sources
from glasslm.training.interruption import raise_on_signals
runs, limits = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sources = name_sources(runs, "latest", DeviceConfig(threads=1))
try:
    with raise_on_signals():
        serve(sources, ServerSettings(port=int(sys.argv[3]), limits=Limits(**limits)))
except KeyboardInterrupt as interrupt:
    import os
    os._exit(128 + interrupt.args[0])
"""


def make_run(
    folder: Path,
    tokenizer: Tokenizer | None = None,
    transformers: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """A run with a checkpoint of step 0, whose weights are so large that logits differ widely.

    `transformers`: the chat template and special tokens of an imported model.
    """
    tokenizer = tokenizer or CharTokenizer(ALPHABET)
    config = RunConfig(model=ModelConfig(**SIZES | model)).resolve()
    record = make_record(config, tokenizer)
    if transformers:
        record["tokenizer"]["transformers"] = transformers
    run_folder.create_run(folder, record, tokenizer.to_json())
    save_step(folder, 0)
    return folder


def make_byte_run(folder: Path) -> Path:
    """A run that can write any byte."""
    return make_run(folder, ByteTokenizer())


def save_step(folder: Path, step: int) -> None:
    """Add a checkpoint, with weights of its own."""
    run = run_folder.Run(folder)
    vocab_size = run.tokenizer.vocab_size
    engine = make_engine(run.config, vocab_size, ComputeConfig(threads=1))
    weights = initial_weights(parameter_table(run.config.model, vocab_size), seed=step + 1)
    engine.load((name, _widen(name, array)) for name, array in weights)
    position = checkpoint.TrainingPosition(step, step, 0, 0)
    checkpoint.save(folder, engine.state(), position, run.identity)


def _widen(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if name.endswith(".bias"):  # zeros at first
        return np.linspace(-1, 1, array.size, dtype=array.dtype)
    return array * 12 if array.std() else array


class ServerProcess:
    """A server under way. `log` holds its lines on standard error."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.log = process, list[str]()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert process.stdout is not None
        self.first_line = process.stdout.readline()
        assert self.first_line.startswith("serving: http://"), self.all_log()
        self.url = self.first_line.removeprefix("serving: ").strip()
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def all_log(self) -> str:
        """The whole log of a server that has ended."""
        self.process.wait(10)
        self._reader.join(5)
        return "".join(self.log)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer of /v1/completions, which must be 200."""
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        values = [line.rpartition(" ")[2] for line in lines if re.match(rf"{name}[{{ ]", line)]
        return sum(map(float, values))

    def wait_until_idle(self, seconds: float = 1.0) -> None:
        """Return as soon as no text is generated; fail after `seconds`."""
        end = time.monotonic() + seconds
        while self.metric("glasslm_running") + self.metric("glasslm_queued"):
            assert time.monotonic() < end, "a text is still generated"
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(15)


@contextmanager
def serving(*arguments: str | Path, engine: str = "numpy") -> Iterator[ServerProcess]:
    """`glasslm serve ARGUMENTS --port 0`."""
    command = [sys.executable, "-m", "glasslm", "serve", *map(str, arguments), "--port", "0"]
    with _running([*command, "--engine", engine, "--threads", "1"]) as server:
        yield server


@contextmanager
def serving_with_limits(
    *runs: Path, prelude: str = "", port: int = 0, **limits: float
) -> Iterator[ServerProcess]:
    """A server with other limits; `prelude` is Python that it runs first."""
    script = SCRIPT.format(prelude=prelude)
    names = json.dumps([str(run) for run in runs])
    with _running([sys.executable, "-c", script, names, json.dumps(limits), str(port)]) as server:
        yield server


@contextmanager
def _running(command: list[str]) -> Iterator[ServerProcess]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONIOENCODING": "utf-8", "OPENBLAS_NUM_THREADS": "1"},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        server = None
        try:
            server = ServerProcess(process)
            yield server
        finally:
            process.kill()
            if server is not None:
                server.client.close()
                server.all_log()  # its thread must end before `process` closes the file


def read_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream of server-sent events, which must end with [DONE]."""
    events = response.text.split("\n\n")
    data = [event.removeprefix("data: ") for event in events if event.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]
