"""lm-evaluation-harness, through HTTP, measures what `glasslm evaluate` does.

The default test sends exactly the requests of its model `local-completions` (0.4.13) and reads the
answers as it does. The slow one runs the harness itself, where it is installed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from server_process import ServerProcess, serving

from glasslm.inference.trained_model import Model, load_model
from tuned_runs import make_base

BLOCK = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return load_model(run, engine="numpy", threads=1)


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    """A text of whole windows, of which the first token is only read."""
    return (run.parent / "old.txt").read_text(encoding="utf-8")[-(1 + 20 * BLOCK) :]


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[ServerProcess]:
    with serving(run) as process:
        yield process


def log_likelihoods(
    server: ServerProcess, windows: list[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation after its context, and whether it is greedy."""
    answer = server.complete(
        model=server.client.get("/v1/models").json()["data"][0]["id"],
        prompt=[context + continuation for context, continuation in windows],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    results = []
    for choice, (context, _) in zip(answer["choices"], windows):
        part = slice(len(context), -1)
        logprobs = choice["logprobs"]["token_logprobs"][part]
        tops = choice["logprobs"]["top_logprobs"][part]
        greedy = all(one == max(top.values()) for one, top in zip(logprobs, tops))
        results.append((sum(logprobs), greedy))
    return results


def test_the_loss_of_a_text_is_that_of_evaluate(
    server: ServerProcess, model: Model, text: str
) -> None:
    ids = model.tokenizer.encode(text).tolist()
    starts = range(0, len(ids) - 1, BLOCK)
    windows = [(ids[start : start + 1], ids[start + 1 : start + 1 + BLOCK]) for start in starts]
    results = log_likelihoods(server, windows)
    score = model.evaluate(text)
    assert -sum(value for value, _ in results) / score.tokens == pytest.approx(score.loss, rel=1e-5)


def test_choices_and_what_is_greedy(server: ServerProcess, model: Model) -> None:
    verbs = (" sees", " likes", " calls", " follows")
    starts = ("the cat", "a dog", "my sister")
    encode = model.tokenizer.encode
    pairs = [(start, verb) for start in starts for verb in verbs]
    windows = [(encode(start).tolist(), encode(verb).tolist()) for start, verb in pairs]
    for (value, greedy), (start, verb) in zip(log_likelihoods(server, windows), pairs):
        assert value == pytest.approx(-model.losses(start + verb)[-len(verb) :].sum(), rel=1e-5)
        assert greedy == (model.generate(start, len(verb), temperature=0) == verb)


TASK = """
task: a_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.mark.slow
def test_the_harness_itself(
    server: ServerProcess, run: Path, model: Model, text: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is installed by hand")
    from glasslm.interop import hf, model_export

    hf.write(model_export.load_export(str(run)), tmp_path / "hf")
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": text[1:]}) + "\n", encoding="utf-8")
    task = TASK.format(path=json.dumps(str(data)))
    (tmp_path / "a_text.yaml").write_text(task, encoding="utf-8")
    arguments: dict[str, Any] = {
        "model": run.name,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": tmp_path / "hf",
        "custom_prefix_token_id": int(model.tokenizer.encode(text[0])[0]),
        "max_length": BLOCK + 2,  # one token for the prefix, one that is generated
    }
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks", "a_text", "--include_path", str(tmp_path), "--batch_size", "8",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    offline["HF_HOME"] = str(tmp_path / "cache")
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | offline, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").glob("*/results_*.json")
    measured = json.loads(written.read_bytes())["results"]["a_text"]["bits_per_byte,none"]
    np.testing.assert_allclose(measured, model.evaluate(text).bpb, rtol=1e-5)
