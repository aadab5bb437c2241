"""Malicious files: each is an error within a second and in little memory, and none runs code.

They are given to the public commands. This file is also the program of the child, which forks a
process for each: `python test_crafted.py FOLDER`.
"""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import cli, files, strict_json
from glasslm.interop import hf, model_export
from glasslm.runs import run_folder
from small_runs import read_json, shorten_runs, train, without_report, write_text

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="needs resource limits that bind, as Linux has them"
)
ROOM = 250 << 20  # bytes of address space beside what the small run has taken
SECOND = 1.0
LAST = "checkpoints/000004"
SENTINEL = "sentinel"  # a file that crafted code would make in the working directory


class Payload:
    """What does its harm when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (SENTINEL, "w")


def pickle_bytes() -> bytes:
    return pickle.dumps({"model": Payload()})


def zip_bytes(**entries: bytes) -> bytes:
    """As torch.save writes it, or an archive that climbs out of its folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, body in entries.items():
            archive.writestr(name.replace("__", "/").replace("UP", ".."), body)
    return buffer.getvalue()


def object_array_bytes() -> bytes:
    """A .npy file of objects, which NumPy pickles."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload()], object), allow_pickle=True)
    return buffer.getvalue()


def tensors(header: Any, body: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor_entry(shape: list[int], start: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


DEEP = b"[" * 200_000
ARRAYS: dict[str, bytes] = {
    "nothing": b"",
    "a pickle": pickle_bytes(),
    "a pickle of PyTorch": zip_bytes(archive__data_pkl=pickle_bytes()),
    "an archive that climbs": zip_bytes(UP__UP__sentinel=b"x"),
    "objects of NumPy": object_array_bytes(),
    "a header of an exabyte": (1 << 60).to_bytes(8, "little") + b"{}",
    "a header longer than the file": (90_000_000).to_bytes(8, "little") + b"{",
    "a header without an end": tensors(DEEP),
    "a tensor of a yottabyte": tensors({"a": tensor_entry([1 << 40, 1 << 40], 0, 8)}),
    "a shape whose product overflows": tensors({"a": tensor_entry([1 << 32, 1 << 32, 2], 0, 8)}),
    "an end beyond the file": tensors({"a": tensor_entry([2], 0, 1 << 62)}),
    "an end before the beginning": tensors({"a": tensor_entry([2], 8, 0)}),
    "overlapping tensors": tensors({name: tensor_entry([2], 0, 8) for name in "ab"}),
    "a hole": tensors({"a": tensor_entry([1], 0, 4)}),
    "objects": tensors({"a": tensor_entry([1], 0, 8, "O")}),
    "a name that climbs": tensors({"../../sentinel": tensor_entry([2], 0, 8)}),
}


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> bytes:
    values = read_json(path)
    change(values)
    return strict_json.json_bytes(values)


def write_checkpoint_file(run: Path, name: str, data: bytes) -> None:
    """The file in the newest checkpoint, with a manifest that agrees."""
    folder = run / LAST
    entries = {
        path.name: [path.read_bytes()] for path in folder.iterdir() if path.name != files.MANIFEST
    }
    files.write_folder(folder, entries | {name: [data]})


def manifest_bytes(run: Path, name: str) -> bytes:
    listed = {name: {"bytes": 1, "sha256": ""}}
    return edit_json(run / LAST / "manifest.json", lambda values: values["files"].update(listed))


def write_large_file(path: Path, size: int) -> None:
    """A sparse file."""
    with open(path, "r+b") as file:
        file.truncate(size)


def write_model_config(run: Path, **changes: Any) -> None:
    """Another architecture, to which the newest checkpoint says that it belongs."""
    (run / "run.json").write_bytes(
        edit_json(run / "run.json", lambda record: record["config"]["model"].update(changes))
    )
    now = run_folder.config_sha256(read_json(run / "run.json")["config"])
    state = edit_json(run / LAST / "state.json", lambda values: values.update(config_sha256=now))
    write_checkpoint_file(run, "state.json", state)


CRAFTED: dict[str, Callable[[Path], Any]] = {
    **{
        f"model.safetensors: {what}": lambda run, data=data: write_checkpoint_file(
            run, "model.safetensors", data
        )
        for what, data in ARRAYS.items()
    },
    "optimizer.safetensors: a pickle": lambda run: write_checkpoint_file(
        run, "optimizer.safetensors", pickle_bytes()
    ),
    "a checkpoint of torch.distributed": lambda run: (
        write_checkpoint_file(run, ".metadata", pickle_bytes())
        or (run / LAST / "model.safetensors").unlink()
    ),
    "state.json: no end": lambda run: write_checkpoint_file(run, "state.json", DEEP),
    "state.json: a pickle": lambda run: write_checkpoint_file(run, "state.json", pickle_bytes()),
    "state.json: a loss beyond all numbers": lambda run: write_checkpoint_file(
        run,
        "state.json",
        edit_json(
            run / LAST / "state.json",
            lambda values: values.update(best={"step": 0, "loss": 10**400}),
        ),
    ),
    "state.json: a log of an exabyte": lambda run: write_checkpoint_file(
        run,
        "state.json",
        edit_json(run / LAST / "state.json", lambda values: values.update(metrics_bytes=1 << 60)),
    ),
    "manifest.json: a gigabyte": lambda run: write_large_file(
        run / LAST / "manifest.json", 1 << 30
    ),
    "manifest.json: a file elsewhere": lambda run: (run / LAST / "manifest.json").write_bytes(
        manifest_bytes(run, "../../run.json")
    ),
    "manifest.json: no end": lambda run: (run / LAST / "manifest.json").write_bytes(DEEP),
    "run.json: no end": lambda run: (run / "run.json").write_bytes(DEEP),
    "run.json: a pickle": lambda run: (run / "run.json").write_bytes(pickle_bytes()),
    "run.json: a gigabyte": lambda run: write_large_file(run / "run.json", 1 << 30),
    "run.json: a model of an exabyte": lambda run: write_model_config(
        run, d_model=1 << 30, d_ff=1 << 30
    ),
    "run.json: the widest model that may be": lambda run: write_model_config(
        run, d_model=1 << 20, d_ff=1 << 20, n_layers=100
    ),
    "run.json: a billion layers": lambda run: write_model_config(run, n_layers=10**9),
    "run.json: a context of a terabyte": lambda run: write_model_config(run, block_size=1 << 40),
    "tokenizer.json: a pickle": lambda run: (run / "tokenizer.json").write_bytes(pickle_bytes()),
    "tokenizer.json: no end": lambda run: (run / "tokenizer.json").write_bytes(DEEP),
    "tokenizer.json: another": lambda run: (run / "tokenizer.json").write_text(
        '{"kind": "byte"}', encoding="utf-8"
    ),
    "metrics.jsonl: no end": lambda run: (run / "metrics.jsonl").write_bytes(DEEP + b"\n"),
    "metrics.jsonl: a pickle": lambda run: (run / "metrics.jsonl").write_bytes(
        pickle_bytes() + b"\n"
    ),
}


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_bytes(
        edit_json(folder / "config.json", lambda values: values.update(changes))
    )


def write_shard_index(folder: Path, name: str) -> None:
    """The weights are said to be in the file of this name."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {
        "weight_map": {"model.embed_tokens.weight": name, "model.norm.weight": "a.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_own_code(folder: Path) -> None:
    write_config(
        folder, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    )
    (folder / "evil.py").write_text(f"open({SENTINEL!r}, 'w')", encoding="utf-8")


FOLDERS: dict[str, Callable[[Path], Any]] = {
    **{
        f"model.safetensors: {what}": lambda folder, data=data: (
            folder / "model.safetensors"
        ).write_bytes(data)
        for what, data in ARRAYS.items()
    },
    "pytorch_model.bin": lambda folder: (
        (folder / "model.safetensors")
        .rename(folder / "pytorch_model.bin")
        .write_bytes(pickle_bytes())
    ),
    "code of its own": write_own_code,
    "an index that climbs": lambda folder: write_shard_index(folder, "../a.safetensors"),
    "an index to the root": lambda folder: write_shard_index(folder, "/dev/zero"),
    "an index without an end": lambda folder: (
        write_shard_index(folder, "a.safetensors"),
        (folder / "model.safetensors.index.json").write_bytes(DEEP),
    ),
    "config.json: no end": lambda folder: (folder / "config.json").write_bytes(DEEP),
    "config.json: a pickle": lambda folder: (folder / "config.json").write_bytes(pickle_bytes()),
    "config.json: a gigabyte": lambda folder: write_large_file(folder / "config.json", 1 << 30),
    "config.json: a list": lambda folder: (folder / "config.json").write_bytes(b"[]"),
    "config.json: the widest model": lambda folder: write_config(
        folder, hidden_size=1 << 20, head_dim=1 << 19, intermediate_size=1 << 20
    ),
    "config.json: a billion layers": lambda folder: write_config(folder, num_hidden_layers=10**9),
    "config.json: ten thousand layers": lambda folder: write_config(
        folder, num_hidden_layers=10_000
    ),
    "config.json: a vocabulary of a billion": lambda folder: write_config(folder, vocab_size=10**9),
    "config.json: a vocabulary of an exabyte": lambda folder: write_config(
        folder, vocab_size=1 << 60
    ),
    "config.json: a context of an exabyte": lambda folder: write_config(
        folder, max_position_embeddings=1 << 60
    ),
    "config.json: a context of a gigabyte": lambda folder: write_config(
        folder, max_position_embeddings=1 << 30
    ),
    "config.json: a number beyond all": lambda folder: write_config(folder, rope_theta=10**400),
    "tokenizer.json: a pickle": lambda folder: (folder / "tokenizer.json").write_bytes(
        pickle_bytes()
    ),
    "tokenizer.json: no end": lambda folder: (folder / "tokenizer.json").write_bytes(DEEP),
    "tokenizer.json: a gigabyte": lambda folder: write_large_file(
        folder / "tokenizer.json", 1 << 30
    ),
}
FALLBACK_CASES = (
    "state.json",
    "manifest.json",
    "a checkpoint of torch.distributed",
)  # to the checkpoint before it
COMMANDS = {
    "resume": ["--threads", "1"],
    "generate": [
        "--prompt",
        "the",
        "--max-new-tokens",
        "2",
        "--checkpoint",
        "latest",
        "--engine",
        "numpy",
    ],
    "verify": [],
}
IMPORT = {"import": ["--run-dir", "new"]}
CASES = [(crafted, command) for crafted in CRAFTED for command in COMMANDS] + [
    (name, "import") for name in FOLDERS
]
ERRORS = {2, 4, 6}


@linux
def test_crafted_files_are_errors_and_nothing_else(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | alone, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(end["crafted"], end["command"]) for end in ends] == CASES
    assert len(CRAFTED) >= 30
    assert len(FOLDERS) >= 30
    for end in ends:
        assert not end["executed"], end
        assert end["seconds"] < SECOND, end
        assert "Traceback" not in end["said"], end
        assert end["code"] in allowed_exit_codes(**end), end


def allowed_exit_codes(crafted: str, command: str, **_: Any) -> set[int]:
    if command == "verify":
        return {1}
    if command == "import":
        return ERRORS
    if crafted.startswith("metrics.jsonl") and command == "generate":  # which does not read it
        return {0}
    if crafted == "state.json: a log of an exabyte" and command == "generate":
        return {0}
    if crafted.startswith("optimizer.safetensors"):
        return ERRORS
    return ERRORS | {0} if crafted.startswith(FALLBACK_CASES) else ERRORS


def main(folder: Path) -> None:
    """Each command on each crafted run; what became of it as a line of JSON."""
    import resource

    text = write_text(folder / "text.txt")
    flags = {"max_steps": 6, "eval_interval": 4, "checkpoint_interval": 4, "sample_interval": 0}
    small = {"d_model": 16, "n_layers": 1, "block_size": 16, "batch_size": 2}
    whole = train(text, folder / "whole", **flags | small).run_dir
    shutil.rmtree(whole / "checkpoints" / "000006")
    exported = folder / "exported"
    hf.write(model_export.load_export(str(whole), "latest"), exported)
    for command, options in (
        COMMANDS | {"import": ["--run-dir", str(folder / "imported")]}
    ).items():
        whole_one = shutil.copytree(
            exported if command == "import" else whole, folder / f"whole-{command}"
        )
        with (
            redirect_stdout(io.StringIO()),
            without_report(),
        ):  # once, so that nothing is imported within the limits
            assert cli.main([command, str(whole_one), *options]) == 0, command
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + ROOM
    for number, (crafted, command) in enumerate(CASES):
        place = folder / f"{number}-{command}"
        from_outside = command == "import"
        run = shutil.copytree(exported if from_outside else whole, place / "run")
        (FOLDERS if from_outside else CRAFTED)[crafted](run)
        pid = os.fork()
        if pid == 0:
            os.chdir(place)
            output_file = os.open("said", os.O_CREAT | os.O_WRONLY)
            os.dup2(output_file, 1)
            os.dup2(output_file, 2)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.alarm(20)
            try:
                with without_report():
                    os._exit(cli.main([command, "run", *(COMMANDS | IMPORT)[command]]))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(99)
        _, status, used = os.wait4(pid, 0)
        end = {
            "crafted": crafted,
            "command": command,
            "code": os.waitstatus_to_exitcode(status),
            "seconds": used.ru_utime + used.ru_stime,  # others may be busy on this machine
            "executed": [str(path) for path in (folder / SENTINEL, *place.rglob(SENTINEL))
                         if path.exists()],
            "said": (place / "said").read_text(encoding="utf-8", errors="replace")[-2000:],
        }  # fmt: skip
        print(json.dumps(end), flush=True)
        shutil.rmtree(place)
    assert not list(folder.rglob(SENTINEL))


if __name__ == "__main__":
    shorten_runs(pytest.MonkeyPatch())
    main(Path(sys.argv[1]))
