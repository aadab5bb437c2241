"""Each benchmark runs at its smallest size, except the slow ones and those that need nanoGPT."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LIBRARIES = {"jax_peer", "nanogpt", "paired"}
# These are not run here; mypy checks them.
NEED_NANOGPT = {"gpu_speed", "time_to_loss", "torch_speed"}
NEED_CHROMIUM = {"page_speed"}  # the same
NEED_LLAMA_CPP = {"llama_cpp_speed"}  # the same
NEED_RAY = {"runner_speed"}  # the same
# A minute and more, or only a picture
SLOW = {"ablation_memory", "cookbook_figure", "extrapolation", "terminal_figure"}
SMALLEST_FLAGS = {
    "attention_memory": "--lengths 256 --seconds 0.1",
    "bits_per_byte": "--text-file text.txt --max-steps 4 --d-model 32",
    "cache_speed": "--lengths 64 --seconds 0.1",
    "course_speed": "--pairs 1 --seconds 0.2",
    "engine_thresholds": "--sizes tiny --batch-size 2 --seconds 0.1 --no-compile",
    "expert_collapse": "--text-file text.txt --max-steps 4 --seeds 0 --experts-per-token 1",
    "generate_against": "--preset tiny --tokens 16 --seconds 0.1 --rounds 1",
    "generation_speed": "--seconds 0.1",
    "grading_speed": "--students 4",
    "growth": "--parts batch corpus --largest 1 --seconds 0.1",
    "import_speed": "--scale 16 --tokens 4 --rounds 1",
    "look_speed": "--presets tiny --tokens 16 --rounds 1 --watch-seconds 3",
    "matmul": "--preset tiny --seconds 0.1",
    "moe_speed": "--d-model 64 --batch-size 2 --seconds 0.1",
    "no_op_tries": "--text-file text.txt --tries 1 --seeds 3 --max-steps 4",
    "overhead": "--preset tiny --steps 8 --text-file text.txt",
    "same_bits": "--only sgd-numpy",
    "serve_engine_speed": "--presets tiny --rounds 1 --tokens 64",
    "serve_speed": "--presets tiny --streams 2 --tokens 4 --seconds 0.1 --no-peers",
    "train_speed": "--batch-size 4 --seconds 0.1",
    "verdict_accuracy": "--seeds 1 --exercises silu relu",
}


def test_every_benchmark_is_known() -> None:
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    not_run = LIBRARIES | NEED_NANOGPT | NEED_CHROMIUM | NEED_LLAMA_CPP | NEED_RAY | SLOW
    assert names == not_run | set(SMALLEST_FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST_FLAGS)
def test_benchmark_runs(name: str, tmp_path: Path) -> None:
    text = "".join(f"the {n} brown foxes jump over {n * 7} lazy dogs\n" for n in range(2000))
    Path(tmp_path, "text.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *SMALLEST_FLAGS[name].split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert any(character.isdigit() for character in result.stdout)
