"""Curve files: logs of many programs are read alike, and a file without a loss is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from glasslm.errors import InputError
from glasslm.lab.diagnosis.curve_files import read_curve


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "a.csv",
            "step,loss,val_loss,lr,grad_norm\n1,4.0,4.1,.1,2\n2,3.5,,.1,1\n4,3.0,3.2,.05,1.5\n",
        ),
        (
            "b.csv",
            "iter;train/loss;val/loss;lr;grad norm\n"
            "1;4,0;4,1;0,1;2\n2;3,5;;0,1;1\n4;3,0;3,2;0,05;1,5\n",
        ),
        (
            "c.tsv",
            "Global Step\tTraining Loss\teval/loss\tlearning_rate\tgrad_norm\n"
            "1\t4\t4.1\t.1\t2\n2\t3.5\t\t.1\t1\n4\t3\t3.2\t.05\t1.5\n",
        ),
        (
            "d.jsonl",
            '{"iter": 1, "train/loss": 4, "val/loss": 4.1, "lr": 0.1, "grad_norm": 2}\n'
            '{"iter": 2, "train/loss": 3.5, "lr": 0.1, "grad_norm": 1}\n'
            '{"iter": 4, "train/loss": 3, "val/loss": 3.2, "lr": 0.05, "grad_norm": 1.5}\n',
        ),
        (
            "e.json",
            json.dumps(
                {
                    "best_metric": None,
                    "log_history": [
                        {"loss": 4, "learning_rate": 0.1, "grad_norm": 2, "epoch": 0.1, "step": 1},
                        {"eval_loss": 4.1, "step": 1},
                        {
                            "loss": 3.5,
                            "learning_rate": 0.1,
                            "grad_norm": 1,
                            "epoch": 0.2,
                            "step": 2,
                        },
                        {
                            "loss": 3,
                            "learning_rate": 0.05,
                            "grad_norm": 1.5,
                            "epoch": 0.4,
                            "step": 4,
                        },
                        {"eval_loss": 3.2, "step": 4},
                        {"train_loss": 3.5, "train_runtime": 3, "step": 4},
                    ],
                }
            ),
        ),
        (
            "f.log",
            "step 1: train loss 4.0, val loss 4.1\niter 1: loss 4.0, lr 0.1, grad_norm 2\niter 2: "
            "loss 3.5, lr 1e-1, grad_norm 1\n"
            "step 4: train loss 3.0, val loss 3.2\niter 4: loss 3.0, lr 0.05, grad_norm 1.5\n",
        ),
    ],
)
def test_logs_of_many_makers_read_alike(tmp_path: Path, name: str, text: str) -> None:
    curve = read_curve(write(tmp_path / name, text))
    assert curve.train.steps.tolist() == [1, 2, 4]
    assert curve.train.values.tolist() == [4, 3.5, 3]
    assert curve.validation.steps.tolist() == [1, 4]
    assert curve.validation.values.tolist() == [4.1, 3.2]
    assert curve.rate.values.tolist() == [0.1, 0.1, 0.05]
    assert curve.grad_norm.values.tolist() == [2, 1, 1.5]


def test_a_value_that_is_no_number_becomes_nan(tmp_path: Path) -> None:
    text = "\ufeffstep,loss,val_loss\n1,4,4\n2,nan,\n3,inf,\n4,,\n5,,3.9\n6,3,\n"
    curve = read_curve(write(tmp_path / "x.csv", text))
    assert curve.train.steps.tolist() == [
        1,
        2,
        3,
        4,
        6,
    ]  # at 5 only the validation loss was written
    assert np.isnan(curve.train.values).tolist() == [False, True, False, True, False]
    assert curve.train.values[2] == np.inf
    assert curve.validation.steps.tolist() == [1, 5]
    null = read_curve(
        write(
            tmp_path / "x.jsonl",
            '{"step": 1, "loss": 4}\n{"step": 2, "loss": null}\n{"step": 3, "lo',
        )
    )
    assert np.isnan(null.train.values).tolist() == [False, True]  # the last line is cut short


def test_steps_are_read_numbered_or_sorted(tmp_path: Path) -> None:
    def steps(text: str) -> list[float]:
        return read_curve(write(tmp_path / "x.csv", text)).train.steps.tolist()

    assert steps("loss\n4\n3\n2\n") == [1, 2, 3]
    assert steps("epoch,loss\n1,4\n2,3\n") == [1, 2]
    assert steps("epoch,loss\n1,4\n1,3\n2,2\n") == [1, 2, 3]  # rows within an epoch
    assert steps("step,loss\n3,2\n1,4\n2,3\n") == [1, 2, 3]
    assert steps("step,loss\n1,4\n2,3\n3,9\n2,3\n3,2\n") == [1, 2, 3]  # went back and came by again
    assert read_curve(tmp_path / "x.csv").train.values.tolist() == [4, 3, 2]
    assert len(read_curve(write(tmp_path / "v.csv", "step,val_loss\n1,4\n2,3\n")).train) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("step,perplexity\n1,20\n", "found step, perplexity; expected"),
        ("1,4.0\n2,3.9\n", "no column with a loss"),
        ('{"step": 1, "loss": 4}\nnot json\n{"step": 3, "loss": 3}\n', "line 2"),
        ('{"step": 1}\n', "found step"),
    ],
)
def test_an_unreadable_file_is_refused_with_the_reason(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read_curve(write(tmp_path / "x.csv", text))
    with pytest.raises(InputError, match="cannot be read"):
        read_curve(tmp_path / "nowhere.csv")
