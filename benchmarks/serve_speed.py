"""Time to first token and tokens/s of `glasslm serve` at several numbers of streams.

    python benchmarks/serve_speed.py [--presets tiny nanogpt --streams 1 8 32 --tokens 200]
        [--seconds 20 --threads 2 --llama-server PATH/TO/llama-server]

All variants compute the same untrained weights in float32 and take turns:
- scheduler: the engine alone, inference/scheduler.py in this process;
- generate: `glasslm generate`'s own batch, N samples of one prompt;
- serve: the server in a process of its own, N streaming requests of a client in this process;
- transformers: `generate` of transformers on the exported model, a batch of N, where installed;
- llama.cpp: its server on the exported weights (GGUF, f32), asked as ours, with --llama-server.
Tokens/s count the whole time of N texts, from the requests to the last token, prompts included; of
`generate` too, which reads its one prompt once. Beside them stands the speed while all N texts run.
HTTP apart from the engine is the CPU time per token of a server whose scheduler computes nothing:
it gives each stream the same token every 5 ms, so each token is a write of its own (Linux). Beside
it stands a bare program: a thread that sleeps 5 ms and lets an event loop write 300 bytes a stream.
Each stream has another prompt, so that no prefix is shared. Start to first token is the time from
the start of the program to the first token of the first request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import numpy as np

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig
from glasslm.data.tokenizers import CharTokenizer
from glasslm.inference.request import Request, Token
from glasslm.inference.sampling import Sampling
from glasslm.inference.stream import Stream
from glasslm.inference.trained_model import Model, load_model
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.record import build_record
from paired import Times, heading, print_speeds, take_turns

# A server whose scheduler computes nothing.
IDLE_SERVER = """
import sys, time
from glasslm.cli import main
from glasslm.inference.request import Finished, Token
from glasslm.inference.scheduler import SchedulerCounts
from glasslm.inference.stream import Stream
from glasslm.inference.trained_model import Model

class IdleScheduler:
    def __init__(self, tokenizer):
        self.tokenizer, self.streams = tokenizer, []
    has_work = property(lambda self: bool(self.streams))
    counts = SchedulerCounts(0, 0, 0.0, 0, 0, 0)
    def submit(self, request):
        self.streams.append(Stream(request, self.tokenizer))
        return self.streams[-1]
    def cancel(self, stream):
        self.streams.remove(stream)
    def step(self):
        time.sleep(0.005)
        events = []
        for stream in list(self.streams):
            stream.ids.append(5)
            events.append((stream, Token(5, "a", -1.0, [], stream.new_tokens)))
            if stream.new_tokens == stream.request.max_new_tokens:
                self.streams.remove(stream)
                events.append((stream, Finished("length", stream.usage, "", stream.new_tokens)))
        return events

Model.scheduler = lambda model, slots: IdleScheduler(model.tokenizer)
sys.exit(main(sys.argv[1:]))
"""

# A program that only wakes its event loop every 5 ms to write 300 bytes to each stream.
BARE_SERVER = """
import asyncio, sys, threading, time

async def main(port, streams, tokens):
    writers, loop = [], asyncio.get_running_loop()
    end = asyncio.Event()

    def write_all():
        for writer in writers:
            writer.write(b"x" * 300)

    def wake():
        for _ in range(tokens):
            time.sleep(0.005)
            loop.call_soon_threadsafe(write_all)
        loop.call_soon_threadsafe(end.set)

    async def connected(reader, writer):
        writers.append(writer)
        if len(writers) == streams:
            threading.Thread(target=wake).start()

    await asyncio.start_server(connected, "127.0.0.1", port)
    print("ready", flush=True)
    await end.wait()
    print(time.process_time(), flush=True)

asyncio.run(main(*map(int, sys.argv[1:])))
"""

TOKENIZER = CharTokenizer("\n" + "".join(map(chr, range(32, 96))))  # 65 characters
PROMPT_TOKENS = 32
SAMPLING = Sampling(temperature=0.8, seed=1)


def make_run(folder: Path, preset: str, **flags: Any) -> Path:
    """An untrained run of a preset."""
    config = with_flags(PRESETS[preset](), flags).resolve()
    data: dict[str, Any] = {"files": [], "sha256": "0" * 64}
    data |= dict.fromkeys(("train_tokens", "train_bytes", "val_tokens", "val_bytes"), 0)
    compute: Any = {"engine": "numpy", "device": "cpu", "precision": "fp32"}
    record = build_record(config, TOKENIZER, data, compute, preset=preset, command="")
    run_folder.create_run(folder, record, TOKENIZER.to_json())
    table = parameter_table(config.model, TOKENIZER.vocab_size)
    position = checkpoint.TrainingPosition(0, 0, 0, 0)
    checkpoint.save(folder, initial_weights(table, 1), position, run_folder.Run(folder).identity)
    return folder


def prompts(count: int) -> list[str]:
    """Prompts of PROMPT_TOKENS characters that have no common prefix."""
    draw = np.random.default_rng(0)
    alphabet = list(TOKENIZER.alphabet[1:])
    return ["".join(draw.choice(alphabet, PROMPT_TOKENS)) for _ in range(count)]


class EngineAlone:
    """Generates texts with a scheduler of this process, and notes when tokens come."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.first_token_s: list[float] = []
        self.full_speeds: list[float] = []  # tokens/s while all texts of a call run

    def run(self, texts: list[str], tokens: int) -> None:
        """Generate all texts at once."""
        scheduler, start = self.model.scheduler(slots=32), time.perf_counter()
        for text in texts:
            ids = self.model.tokenizer.encode(text).tolist()
            scheduler.submit(Request(ids, max_new_tokens=tokens, sampling=SAMPLING))
        begun: set[Stream] = set()
        full_start, n_full = 0.0, 0
        while scheduler.has_work:
            new = [stream for stream, event in scheduler.step() if isinstance(event, Token)]
            now = time.perf_counter()
            self.first_token_s += [now - start for _ in set(new) - begun]
            if full_start and scheduler.counts.running == len(texts):
                n_full += len(new)
                full_end = now
            begun.update(new)
            if not full_start and len(begun) == len(texts):
                full_start = now
        if n_full:
            self.full_speeds.append(n_full / (full_end - full_start))


def run_generate(model: Model, texts: list[str], tokens: int) -> None:
    """Generate as many samples of one prompt as `glasslm generate --num-samples` does."""
    for _ in model.pieces(texts[:1], tokens, sampling=SAMPLING, samples=len(texts)):
        pass


class Client:
    """Streams texts from a server with OpenAI's API, and notes the time to each first token."""

    def __init__(self, port: int, model: str) -> None:
        self.port, self.model = port, model
        self.first_token_s: list[float] = []

    def run(self, texts: list[str], tokens: int) -> None:
        """Stream all texts at once."""
        asyncio.run(self._stream_all(texts, tokens))

    async def _stream_all(self, texts: list[str], tokens: int) -> None:
        await asyncio.gather(*(self._stream(text, tokens) for text in texts))

    async def _stream(self, text: str, tokens: int) -> None:
        content = json.dumps(
            {
                "model": self.model, "prompt": text, "max_tokens": tokens, "stream": True,
                "temperature": SAMPLING.temperature, "seed": SAMPLING.seed, "ignore_eos": True,
            }
        )  # fmt: skip
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write((head + content).encode())
        is_first, answer = True, b""
        while part := await reader.read(1 << 16):
            if is_first and b"data: " in part:
                self.first_token_s.append(time.perf_counter() - start)
                is_first = False
            answer = answer[-100:] + part
        assert b"[DONE]" in answer, answer
        writer.close()


@contextlib.contextmanager
def process(command: list[str], first_line: str = "") -> Iterator[subprocess.Popen[str]]:
    """A server under way; `first_line` is how its first line of output begins."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True) as server:
        try:
            assert server.stdout is not None
            if first_line:
                line = server.stdout.readline()
                assert line.startswith(first_line), line
            yield server
        finally:
            server.terminate()


def serve_command(
    run: Path, port: int, threads: int, program: tuple[str, str] = ("-m", "glasslm")
) -> list[str]:
    command = [sys.executable, *program, "serve", str(run), "--engine", "numpy"]
    return [*command, "--port", str(port), "--threads", str(threads), "--checkpoint", "0"]


def http_ms(run: Path, streams: int) -> float:
    """CPU milliseconds of the server for each streamed token, without an engine."""
    port = free_port()
    with process(serve_command(run, port, 1, ("-c", IDLE_SERVER)), "serving: ") as server:
        client, tokens = Client(port, run.name), 1000
        client.run(prompts(streams), 10)
        before = cpu_seconds(server.pid)
        client.run(prompts(streams), tokens)
        return (cpu_seconds(server.pid) - before) / (streams * tokens) * 1e3


def bare_ms(streams: int) -> float:
    """CPU milliseconds of the bare program for each write."""
    port, tokens = free_port(), 1000

    def command(count: int) -> list[str]:
        return [sys.executable, "-c", BARE_SERVER, str(port), str(streams), str(count)]

    def run(count: int) -> float:
        with process(command(count), "ready") as server:
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
            readers = [threading.Thread(target=read_all, args=(client,)) for client in clients]
            for reader in readers:
                reader.start()
            assert server.stdout is not None
            return float(server.stdout.readline())

    return (run(tokens) - run(0)) / (streams * tokens) * 1e3


def read_all(client: socket.socket) -> None:
    """Read to the end."""
    with contextlib.suppress(OSError):
        while client.recv(1 << 16):
            pass


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(port: int) -> None:
    """Wait until a server answers /health with 200, for at most a minute."""
    for _ in range(600):
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"the server at port {port} does not answer: run its command by hand")


def time_start(run: Path, threads: int) -> float:
    """Seconds from the start of the program to the first token."""
    port, start = free_port(), time.perf_counter()
    with process(serve_command(run, port, threads), "serving: "):
        client = Client(port, run.name)
        client.run(prompts(1), 1)
        return time.perf_counter() - start


def transformers_runner(folder: Path, threads: int) -> Callable[[list[str], int], None]:
    """`generate` of transformers, a batch of all texts."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(texts: list[str], tokens: int) -> None:
        ids = torch.tensor(np.array([TOKENIZER.encode(text) for text in texts]).astype(np.int64))
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=True, temperature=SAMPLING.temperature, top_k=0,
        )  # fmt: skip

    return generate


def export(run: Path, folder: Path, kind: str) -> Path:
    """The run in another program's format."""
    command = [sys.executable, "-m", "glasslm", "export", str(run), "--to", kind]
    subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True)
    return folder


def measure(preset: str, flags: argparse.Namespace, folder: Path) -> None:
    """Print the tables of one preset."""
    run = make_run(folder / preset, preset)
    starts = [time_start(run, flags.threads) for _ in range(3)]
    print(f"\n{preset}: start to first token {statistics.median(starts):.2f} s (median of 3)")
    model = load_model(run, 0, engine="numpy", threads=flags.threads)
    context = model.config.model.block_size
    tokens = min(flags.tokens, context - PROMPT_TOKENS)
    engine = EngineAlone(model)
    runners: dict[str, Callable[[list[str], int], None]] = {
        "scheduler": engine.run,
        "generate": lambda texts, tokens: run_generate(model, texts, tokens),
    }
    port = free_port()
    with contextlib.ExitStack() as servers:
        servers.enter_context(process(serve_command(run, port, flags.threads), "serving: "))
        served = {"serve": Client(port, run.name)}
        if flags.peers and importlib.util.find_spec("transformers"):
            hf = export(run, folder / f"{preset}-hf", "hf")
            runners["transformers"] = transformers_runner(hf, flags.threads)
        if flags.llama_server:
            gguf = export(run, folder / f"{preset}.gguf", "gguf")
            other = free_port()
            command = [flags.llama_server, "-m", str(gguf), "--port", str(other), "-np", "32"]
            command += ["-c", str(32 * context), "-t", str(flags.threads)]
            servers.enter_context(process(command))
            wait_until_ready(other)
            served["llama.cpp"] = Client(other, preset)
        runners |= {name: client.run for name, client in served.items()}
        singles: dict[str, float] = {}
        for count in flags.streams:
            clients: dict[str, EngineAlone | Client] = {"scheduler": engine, **served}
            for each in clients.values():
                each.first_token_s.clear()
            engine.full_speeds.clear()
            times = take_all(runners, prompts(count), tokens, flags.seconds)
            amount = count * tokens
            print(f"\n{count} stream(s) of {tokens} tokens after {PROMPT_TOKENS}")
            print_speeds(times, amount, ("scheduler", "generate"))
            for name, each in clients.items():
                first_ms = statistics.median(each.first_token_s) * 1e3
                speed = amount / statistics.median(times[name])
                ratio = speed / singles.setdefault(name, speed)
                print(
                    f"{name}: first token after {first_ms:.1f} ms (median), {ratio:.1f} times the "
                    f"tokens/s of {flags.streams[0]} stream(s)"
                )
            if engine.full_speeds:
                full = statistics.median(engine.full_speeds)
                share = full / (amount / statistics.median(times["generate"]))
                print(f"scheduler while all run: {full:,.0f} tokens/s, {share:.2f} of generate")


def take_all(
    runners: dict[str, Callable[[list[str], int], None]],
    texts: list[str],
    tokens: int,
    seconds: float,
) -> Times:
    """Time all variants in turns, after one call each."""
    variants = {
        name: (lambda runner=runner: runner(texts, tokens)) for name, runner in runners.items()
    }
    for variant in variants.values():
        variant()
    return take_turns(variants, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["tiny", "nanogpt"], choices=PRESETS)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=ComputeConfig().threads or os.cpu_count())
    parser.add_argument("--llama-server", default="")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    flags = parser.parse_args()
    libraries = ["numpy", "starlette", "uvicorn"]
    print(heading(*libraries, threads=flags.threads))
    with tempfile.TemporaryDirectory() as folder:
        for preset in flags.presets:
            measure(preset, flags, Path(folder))
        if sys.platform == "linux":
            run = make_run(Path(folder) / "idle", "tiny")
            print("\nHTTP apart from the engine, CPU ms a token; the bare program; difference")
            for n in flags.streams:
                ours, bare = http_ms(run, n), bare_ms(n)
                print(f"{n:3} stream(s) {ours:8.3f} {bare:8.3f} {ours - bare:8.3f}")


if __name__ == "__main__":
    main()
