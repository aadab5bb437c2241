"""Whether two source trees train to the same bits: small runs of many configurations, compared.

    python benchmarks/same_bits.py --against CHECKOUT [--only NAME]

Each configuration is trained twice by `python -m glasslm`, with the same Python and libraries: once
with the source of this repository and once with that of CHECKOUT. Two things are compared: the
SHA-256 of every *.safetensors file (weights, moments, frozen weights), and the step, eval and
sample lines of metrics.jsonl without `timing` (docs/formats.md, "When two runs are equal"). Each
configuration prints one line: `same`, `differs` with the first differences, or `failed` with the
error. The exit code is 1 if any configuration differs or fails.

The script uses only commands and files, and imports no module of glasslm, so the two trees may be
laid out differently. Without --against the repository is compared with itself, which shows whether
runs repeat on this machine.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  (loads the BLAS that threadpoolctl reports)
import threadpoolctl

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT_S, POLL_S = 300.0, 0.2  # of one command; between two reads of its metrics
COMPARED_KINDS = ("step", "eval", "sample")

# Flags of every run; a configuration's own flags come after these and override them.
TRAIN_FLAGS = """
    --preset tiny --text-file text.txt --d-model 32 --n-layers 2 --n-heads 4 --block-size 32
    --batch-size 4 --max-steps 12 --warmup-steps 2 --eval-interval 6 --log-interval 1
    --sample-interval 12 --checkpoint-interval 4 --keep 100 --device cpu --precision fp32
    --threads 1 --compile off
"""
# Flags of a run that is fine-tuned from a trained one, whose sizes it takes over.
FINETUNE_FLAGS = """
    --text-file other.txt --max-steps 8 --warmup-steps 2 --eval-interval 4 --log-interval 1
    --sample-interval 8 --checkpoint-interval 4 --keep 100 --device cpu --precision fp32 --threads 1
    --compile off
"""


@dataclass(frozen=True)
class Configuration:
    """The commands of one comparison: `train`, then those whose field is given."""

    train: str = ""  # flags of `glasslm train` beside TRAIN_FLAGS
    resume_from: int = 0  # the step from which `glasslm resume` trains the rest once more
    finetune: str = ""  # flags of `glasslm finetune` of that run beside FINETUNE_FLAGS
    merge: bool = False  # whether `glasslm merge` merges the adapters of the fine-tuned run


CONFIGURATIONS = {
    "adamw": Configuration("--optimizer adamw"),
    "muon": Configuration("--optimizer muon"),
    "sgd": Configuration("--optimizer sgd --lr 0.1"),
    "moe": Configuration("--n-experts 4 --experts-per-token 2 --shared-expert"),
    "dropout": Configuration("--dropout 0.2 --attention-dropout 0.2"),
    "lora": Configuration(
        "--max-steps 4",
        finetune="--lora-rank 4 --lora-targets q,k,v,o,gate,up,down --dropout 0.1",
        merge=True,
    ),
    "full-finetune": Configuration("--max-steps 4", finetune="--full"),
    "resume": Configuration("--dropout 0.1 --ema 0.9", resume_from=4),
    "flash": Configuration("--attention flash --block-size 160 --batch-size 2"),
    "flash-window-alibi": Configuration(
        "--attention flash --block-size 160 --batch-size 2 --window 40 --position alibi"
    ),
    "window-alibi": Configuration("--window 8 --position alibi"),
    "ema": Configuration("--ema 0.9"),
    "gpt2": Configuration(
        "--norm layernorm --position learned --feedforward gelu --bias --no-tie-embeddings"
    ),
    "post-norm": Configuration(
        "--norm-position post --position sinusoidal --feedforward geglu --scale-embeddings"
    ),
    "multi-query": Configuration("--n-kv-heads 1 --feedforward relu2 --norm none --position none"),
    "qk-norm-gqa": Configuration("--qk-norm --n-kv-heads 2"),
    "rope-ntk": Configuration("--rope-scaling ntk --rope-factor 2 --rope-base 5000"),
    "epochs": Configuration("--epochs 1.5 --batch-size 16 --test-fraction 0.1"),
    "auxiliary-losses": Configuration("--z-loss 0.0001 --label-smoothing 0.1"),
    "bpe": Configuration("--tokenizer bpe --vocab-size 300"),
    "byte": Configuration("--tokenizer byte --schedule constant --grad-clip 0"),
    "wsd": Configuration("--schedule wsd --min-lr 0.001"),
    "micro-batches": Configuration("--micro-batch-size 1 --threads 2"),
    "float64": Configuration("--precision fp64"),
}
ENGINES = ("numpy", "torch")

Hashes = dict[str, str]  # SHA-256 by the path below the working folder
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """The output of a configuration's commands: hashes, and metrics by the path of their file."""

    hashes: Hashes
    metrics: dict[str, Lines]


class CommandError(Exception):
    """A command that did not exit with 0."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, default=REPOSITORY, metavar="CHECKOUT")
    parser.add_argument(
        "--only",
        default="*",
        metavar="NAME",
        help="one configuration, or those that match a pattern such as 'moe-*' or '*-numpy': "
        + ", ".join(CONFIGURATIONS)
        + "; each ends in -numpy or -torch",
    )
    flags = parser.parse_args()
    names = [f"{name}-{engine}" for engine in ENGINES for name in CONFIGURATIONS]
    selected = fnmatch.filter(names, flags.only)
    if not selected:
        parser.error(f"no configuration is called {flags.only}: there are {', '.join(names)}")
    checkouts = (REPOSITORY, flags.against.resolve())
    for checkout in checkouts:
        if problem := find_import_problem(checkout):
            parser.error(problem)
    print(describe_machine())
    for checkout in checkouts:
        print(f"source: {checkout} ({describe_commit(checkout)})")

    width = max(map(len, selected))
    counts = dict.fromkeys(("same", "differs", "failed", "skipped"), 0)
    for name in selected:
        verdict, details = compare_checkouts(name, checkouts)
        counts[verdict] += 1
        print(f"{name:{width}}  {verdict}{details}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    return 1 if counts["differs"] or counts["failed"] else 0


def compare_checkouts(name: str, checkouts: tuple[Path, Path]) -> tuple[str, str]:
    """The verdict of a configuration, one of those that `main` counts, and its reason."""
    variant, _, engine = name.rpartition("-")
    if engine == "torch" and installed_version("torch") is None:
        return "skipped", ": PyTorch is not installed"
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ThreadPoolExecutor(max_workers=2) as pool,
    ):
        runs = [
            pool.submit(train, CONFIGURATIONS[variant], engine, checkout, Path(folder, side))
            for checkout, side in zip(checkouts, ("here", "there"))
        ]
        try:
            differences = list(find_differences(*(run.result() for run in runs)))
        except CommandError as error:
            return "failed", f": {error}"
    if not differences:
        return "same", ""
    shown, rest = differences[:3], len(differences) - 3
    return "differs", ": " + "; ".join(shown) + (f"; and {rest} more" if rest > 0 else "")


def train(configuration: Configuration, engine: str, checkout: Path, folder: Path) -> Result:
    """Execute the commands in a new folder with a checkout's source; its hashes and metrics.

    Raises CommandError where a command fails.
    """
    folder.mkdir()
    write_texts(folder)

    def execute(*words: str, run: str = "") -> None:
        run_command(["-m", "glasslm", *words], checkout, folder, folder / run if run else None)

    on_engine = ["--engine", engine]
    flags = combine_flags(TRAIN_FLAGS, configuration.train)
    execute("train", "--run-dir", "run", *on_engine, *flags, run="run")
    if configuration.resume_from:
        undo_steps(folder / "run", configuration.resume_from)
        execute("resume", "run", *on_engine, "--threads", "1", run="run")
    if configuration.finetune:
        flags = combine_flags(FINETUNE_FLAGS, configuration.finetune)
        execute("finetune", "run", "--run-dir", "tuned", *on_engine, *flags, run="tuned")
    if configuration.merge:
        execute("merge", "tuned", "--run-dir", "merged")
    return read_result(folder)


def read_result(folder: Path) -> Result:
    """Hashes of all safetensors files below a folder, and the compared lines of all metrics."""
    hashes = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    metrics = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        metrics[path.relative_to(folder).as_posix()] = [
            {key: value for key, value in line.items() if key != "timing"}
            for line in lines
            if line["kind"] in COMPARED_KINDS
        ]
    if not hashes or not any(metrics.values()):
        raise CommandError("the commands wrote no weights or no metrics")
    return Result(hashes, metrics)


def find_differences(here: Result, there: Result) -> Iterator[str]:
    """One phrase for each metrics file and each safetensors file that is not the same."""
    for path in sorted(here.metrics.keys() | there.metrics.keys()):
        ours, theirs = here.metrics.get(path, []), there.metrics.get(path, [])
        different = (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
        first = next(different, min(len(ours), len(theirs)))
        if first < max(len(ours), len(theirs)):
            yield f"{path} {describe_difference(ours[first:], theirs[first:])}"
    for path in sorted(here.hashes.keys() | there.hashes.keys()):
        if path not in here.hashes or path not in there.hashes:
            yield f"{path} is only {'here' if path in here.hashes else 'there'}"
        elif here.hashes[path] != there.hashes[path]:
            yield path


def describe_difference(ours: Lines, theirs: Lines) -> str:
    """The place of the first difference of two lists of lines that begin with one."""
    if not ours or not theirs:
        return f"has {len(ours or theirs)} more lines {'here' if ours else 'there'}"
    a, b = ours[0], theirs[0]
    field = next(key for key in [*a, *b] if a.get(key) != b.get(key) or (key in a) != (key in b))
    pair = f"{shorten(a.get(field))} here, {shorten(b.get(field))} there"
    return f"{a['kind']} line of step {a['step']}: {field} {pair}"


def shorten(value: Any) -> str:
    """A value as JSON of at most 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def write_texts(folder: Path) -> None:
    """Two texts of the same characters: sums in digits, and the same lines backwards."""
    lines = [f"{n} + {n * 7 % 83} = {n + n * 7 % 83}; so {n} is less" for n in range(300)]
    reversed_lines = [line[::-1] for line in lines]
    for name, content in (("text.txt", lines), ("other.txt", reversed_lines)):
        text = "\n".join(content) + "\n"
        Path(folder, name).write_text(text, encoding="utf-8", newline="\n")


def combine_flags(*texts: str) -> list[str]:
    """The words of all flags; a flag that is given again replaces the earlier one."""
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in " ".join(texts).split():
        if word.startswith("--"):
            values = flags[word] = []
        else:
            values.append(word)
    return [word for flag, values in flags.items() for word in (flag, *values)]


def undo_steps(run: Path, step: int) -> None:
    """Leave a finished run as if its process had been killed soon after `step`.

    The checkpoints after that step and the last line of metrics.jsonl, `end`, are deleted.
    """
    for path in Path(run, "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]), encoding="utf-8", newline="\n")


def run_command(words: list[str], checkout: Path, folder: Path, run: Path | None = None) -> str:
    """Standard output of Python with these arguments, in a folder, with a checkout's source.

    A command that trains is ended as soon as metrics.jsonl of its `run` says that it is finished:
    drawing the report takes longer than the training, and the report is not compared. Raises
    CommandError, with the last line of standard error, where the command fails.
    """
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment(checkout, folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    deadline = time.monotonic() + TIMEOUT_S
    has_trained = False
    while True:
        try:
            output, errors = process.communicate(timeout=POLL_S)
            break
        except subprocess.TimeoutExpired:
            has_trained = run is not None and is_finished(run)
            if has_trained or time.monotonic() > deadline:
                process.kill()
    if process.returncode and not has_trained:
        *_, last = ["no message", *errors.splitlines()]
        if time.monotonic() > deadline:
            last = f"not finished after {TIMEOUT_S:.0f} s"
        raise CommandError(f"{' '.join(words[1:3])} of {checkout} failed: {last}")
    return output


def is_finished(run: Path) -> bool:
    """Whether the last line of a run's metrics says that all steps are done."""
    try:
        lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return False
    if not lines or not lines[-1].endswith("\n"):
        return False
    last = json.loads(lines[-1])
    return bool(last["kind"] == "end" and last["status"] == "finished")


def environment(checkout: Path, folder: Path) -> Mapping[str, str]:
    """This process's environment with a checkout's source first, and a cache folder of its own."""
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(checkout / "src"), *([inherited] if inherited else [])]
    changes = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONIOENCODING": "utf-8",
        "GLASSLM_CACHE": str(folder / "cache"),
    }
    return os.environ | changes


def find_import_problem(checkout: Path) -> str | None:
    """Why `import glasslm` does not import a checkout's source; None where it does."""
    source = checkout / "src" / "glasslm"
    if not source.is_dir():
        return f"{checkout} is no checkout of glasslm: it has no folder src/glasslm"
    with tempfile.TemporaryDirectory() as folder:
        command = ["-c", "import glasslm; print(glasslm.__file__)"]
        try:
            imported = Path(run_command(command, checkout, Path(folder)).strip())
        except CommandError as error:
            return str(error)
    if imported.resolve().parent != source.resolve():
        return f"glasslm is imported from {imported.parent}, but {source} was expected"
    return None


def describe_machine() -> str:
    """Versions, processor and BLAS kernel: the bits of a run belong to these."""
    versions = [f"Python {platform.python_version()}"]
    for library in ("numpy", "torch"):
        versions.append(f"{library} {installed_version(library) or 'not installed'}")
    blas = [
        f"{info['internal_api']} {info['version']}, kernel {info.get('architecture', 'unknown')}"
        for info in threadpoolctl.threadpool_info()
        if info["user_api"] == "blas"
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{', '.join(versions)}; BLAS of NumPy: {'; '.join(blas) or 'unknown'}; {machine}"


def describe_commit(checkout: Path) -> str:
    """The commit of a checkout, with `-dirty` where files are changed."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit known"
    return f"commit {result.stdout.strip()}"


def installed_version(library: str) -> str | None:
    """The version of a library; None where it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
