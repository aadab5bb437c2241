"""Nearly every benchmark that needs no other program runs to its end, at its smallest.

What nobody runs breaks.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LIBRARIES = {"nanogpt", "paired"}
NEED_NANOGPT, TAKES_A_MINUTE = (
    {"gpu_speed", "time_to_loss", "torch_speed"},
    {"extrapolation"},
)  # mypy reads these
RUNS = {
    "attention_memory": "--lengths 256 --seconds 0.1",
    "cache_speed": "--lengths 64 --seconds 0.1",
    "course_speed": "--pairs 1 --seconds 0.2",
    "crossing": "--sizes tiny --batch-size 2 --seconds 0.1 --no-compile",
    "expert_collapse": "--text-file text.txt --max-steps 4 --seeds 0 --experts-per-token 1",
    "generate_against": "--preset tiny --tokens 16 --seconds 0.1 --rounds 1",
    "generation_speed": "--seconds 0.1",
    "matmul": "--preset tiny --seconds 0.1",
    "moe_speed": "--d-model 64 --batch-size 2 --seconds 0.1",
    "overhead": "--preset tiny --steps 8 --text-file text.txt",
    "same_bits": "--only sgd-numpy",
    "train_speed": "--batch-size 4 --seconds 0.1",
}


def test_every_benchmark_is_known() -> None:
    assert {
        path.stem for path in BENCHMARKS.glob("*.py")
    } == LIBRARIES | NEED_NANOGPT | TAKES_A_MINUTE | set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    words = "".join(f"the {n} brown foxes jump over {n * 7} lazy dogs\n" for n in range(2000))
    Path(tmp_path, "text.txt").write_text(words, encoding="utf-8")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *RUNS[name].split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert any(character.isdigit() for character in done.stdout)
