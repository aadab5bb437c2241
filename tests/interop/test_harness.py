"""A model that glasslm trained and exported, judged by lm-evaluation-harness: the numbers are
glasslm's own.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is installed by hand")

from glasslm.inference import trained_model
from glasslm.interop import hf, model_export
from tuned_runs import make_base

pytestmark = pytest.mark.slow

BLOCK = 32
VERBS = [
    " sees",
    " likes",
    " calls",
    " follows",
]  # spaces that end a question are moved to its choices there

TEXT = """
task: a_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""

CHOICES = """
task: a_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def questions(text: str) -> list[dict[str, Any]]:
    """Which of the verbs a text goes on with, at several of its places."""
    draw = random.Random(0)
    items = []
    for match in re.finditer(r"(the cat|a dog|my sister)( sees| likes| calls| follows)", text):
        ends = draw.sample(VERBS, 4)
        items.append({"start": match[1], "ends": ends, "right": ends.index(match[2])})
    return items[:40]


def write_task(folder: Path, form: str, name: str, documents: list[dict[str, Any]]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text(
        "".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8"
    )
    (folder / f"{name}.yaml").write_text(form.format(path=json.dumps(str(data))), encoding="utf-8")


def harness(
    model: Path, tasks: Path, out: Path, first: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results by task, and the answers to the questions; `first` is the token before each text."""
    arguments = f"pretrained={model},dtype=float32,prefix_token_id={first}"
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        arguments,
        "--device",
        "cpu",
    ]
    command += ["--tasks", "a_text", "a_choice", "--include_path", str(tasks), "--batch_size", "8"]
    command += ["--output_path", str(out), "--log_samples"]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(out / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | offline, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = out.glob("*/results_*.json")
    (samples,) = out.glob("*/samples_a_choice_*.jsonl")
    answers = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return json.loads(written.read_bytes())["results"], sorted(
        answers, key=lambda sample: sample["doc_id"]
    )


def test_the_harness_measures_what_evaluate_does(tmp_path: Path) -> None:
    run = make_base(tmp_path)
    exported = model_export.load_export(str(run))
    hf.write(exported, tmp_path / "hf")
    # Of glasslm, whose first token is only read, and of whole windows: the harness gives its last
    # window more context.
    text = (tmp_path / "old.txt").read_text(encoding="utf-8")[-(1 + 20 * BLOCK) :]
    choices = questions((tmp_path / "old.txt").read_text(encoding="utf-8"))
    (tmp_path / "tasks").mkdir()
    write_task(tmp_path / "tasks", TEXT, "a_text", [{"text": text[1:]}])
    write_task(tmp_path / "tasks", CHOICES, "a_choice", choices)
    first = int(exported.tokenizer.encode(text[0])[0])
    results, answers = harness(tmp_path / "hf", tmp_path / "tasks", tmp_path / "out", first)

    model = trained_model.load_model(str(run), engine="numpy")
    nats = model.losses(text)
    assert len(nats) == len(text) - 1 == 20 * BLOCK
    score = model.score(model.tokenizer.encode(text))
    close = {"rel": 1e-5}
    assert results["a_text"]["bits_per_byte,none"] == pytest.approx(score.bpb, **close)
    assert results["a_text"]["byte_perplexity,none"] == pytest.approx(2**score.bpb, **close)
    words = len(re.split(r"\s+", text[1:]))
    assert results["a_text"]["word_perplexity,none"] == pytest.approx(
        np.exp(nats.sum() / words), rel=1e-4
    )

    nats_of = [
        [model.losses(q["start"] + end)[-len(end) :].sum() for end in q["ends"]] for q in choices
    ]
    assert len(choices) == len(answers) == 40
    for sample, expected in zip(answers, nats_of):
        logarithms = [float(answer[0]) for answer in sample["filtered_resps"]]
        np.testing.assert_allclose(logarithms, -np.array(expected), rtol=1e-4)
    for metric, lengths in (
        ("acc", [[1] * len(q["ends"]) for q in choices]),
        ("acc_norm", [[*map(len, q["ends"])] for q in choices]),
    ):
        chosen = [int(np.argmin(np.array(nats) / size)) for nats, size in zip(nats_of, lengths)]
        share = np.mean([choice == q["right"] for choice, q in zip(chosen, choices)])
        assert results["a_choice"][f"{metric},none"] == pytest.approx(share, abs=1e-9)
        assert 0 < share < 1
