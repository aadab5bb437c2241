"""Curve files: logs of many programs are read alike, and a file without a loss is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from glasslm.errors import InputError
from glasslm.lab.diagnosis.curve_comparison import compare_curves
from glasslm.lab.diagnosis.curve_files import read_curve
from glasslm.lab.diagnosis.curves import judge_curve


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


def test_an_empty_cell_is_missing_and_nan_is_an_event(tmp_path: Path) -> None:
    text = "\ufeffstep,loss,val_loss\n1,4,4\n2,nan,\n3,inf,\n4,,\n5,,3.9\n6,3,\n7,1.#IND,\n"
    text += "8,-,\n9,NA,\n"
    curve = read_curve(write(tmp_path / "x.csv", text))
    assert curve.train.steps.tolist() == [1, 2, 3, 6, 7]
    assert np.isnan(curve.train.values).tolist() == [False, True, False, False, True]
    assert curve.train.values[2] == np.inf
    assert curve.validation.steps.tolist() == [1, 5]
    assert (curve.rows_read, curve.rows_dropped) == (6, 3)
    text = '{"step": 1, "loss": 4}\n{"step": 2, "loss": null}\n{"step": 3, "lo'
    assert read_curve(write(tmp_path / "x.jsonl", text)).train.steps.tolist() == [1]


def test_null_in_a_log_of_glasslm_is_nan(tmp_path: Path) -> None:
    lines = [
        {"kind": "plan", "max_steps": 2},
        {"kind": "step", "step": 1, "loss": None, "timing": {"elapsed_s": 1}},
        {"kind": "eval", "step": 1, "split": "test", "loss": 3},
        {"kind": "eval", "step": 1, "split": "val", "loss": 4},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    curve = read_curve(write(tmp_path / "metrics.jsonl", text))
    assert np.isnan(curve.train.values).tolist() == [True]
    assert curve.validation.values.tolist() == [4]


# Lines as these programs write them, with made-up numbers: the training loss is 4, 3.5, 3 and the
# validation loss 4.1, 3.2 at the first and last of the given steps.
LOGS = {
    "nanogpt": (
        [0, 250, 500],
        """number of parameters: 10.65M
num decayed parameter tensors: 26, with 10,740,096 parameters
num non-decayed parameter tensors: 13, with 4,992 parameters
using fused AdamW: True
step 0: train loss 4.2, val loss 4.1
iter 0: loss 4.0, time 33690.00ms, mfu -100.00%
iter 250: loss 3.5, time 33.32ms, mfu 3.10%
step 500: train loss 3.1, val loss 3.2
saving checkpoint to out
iter 500: loss 3.0, time 33.30ms, mfu 3.11%
""",
    ),
    "llm.c main.log": (
        [1, 10, 20],
        "s:1 tel:4.1000\ns:1 trl:4.0000 lr:0.000012 norm:15.30\ns:10 trl:3.5 lr:0.1 norm:9\n"
        "s:20 eval:0.2504\ns:20 tel:3.2\ns:20 trl:3 lr:0.1 norm:1\n",
    ),
    "modded-nanogpt": (
        [1, 125, 250],
        "step:1/5100 val_loss:4.1000 train_time:0ms step_avg:nanms\n"
        "step:1/5100 train_loss:4.0 train_time:267ms step_avg:103.2ms\n"
        "step:125/5100 train_loss:3.5 train_time:1267ms step_avg:103.2ms\n"
        "step:250/5100 val_loss:3.2 train_time:2000ms step_avg:103ms\n"
        "step:250/5100 train_loss:3.0 train_time:2267ms step_avg:103.2ms\n",
    ),
    "transformers, printed": (
        [0.1, 0.2, 0.3],
        "  0%|          | 0/30 [00:00<?, ?it/s]\r  3%|3         | 1/30 [00:01<00:29]\n"
        "{'loss': 4.0, 'grad_norm': 2.5, 'learning_rate': 5e-05, 'epoch': 0.1}\n"
        "{'eval_loss': 4.1, 'eval_runtime': 1.2, 'epoch': 0.1}\n"
        "{'loss': 3.5, 'grad_norm': 1.5, 'learning_rate': 4e-05, 'epoch': 0.2}\n"
        "{'loss': 3.0, 'grad_norm': nan, 'learning_rate': 3e-05, 'epoch': 0.3}\n"
        "{'eval_loss': 3.2, 'eval_runtime': 1.2, 'epoch': 0.3}\n"
        "{'train_runtime': 30.1, 'train_loss': 3.5, 'epoch': 0.3}\n",
    ),
    "Lightning's CSV": (
        [49, 99, 149],
        "epoch,lr-AdamW,step,train_loss_epoch,train_loss_step,val_loss\n0,,49,,4.0,\n0,,49,,,4.1\n"
        "0,,99,,3.5,\n1,,149,,3.0,\n1,,149,,,3.2\n1,,149,3.4,,\n",
    ),
    "litgpt": (
        [25, 50, 75],
        "Epoch 1 | iter 100 step 25 | loss train: 4.000, val: n/a | iter time: 100.20 ms (step) "
        "remaining time: 1:02:03\nvalidating: iter 100: val loss 4.1000, val time: 10 ms\n"
        "Epoch 1 | iter 200 step 50 | loss train: 3.500, val: 4.100 | iter time: 100.20 ms (step)\n"
        "Epoch 2 | iter 300 step 75 | loss train: 3.000, val: 3.2 | iter time: 100.20 ms (step)\n",
    ),
    "torchtitan": (
        [1, 10, 20],
        "[rank0]:[titan] 2026-01-01 10:20:30,123 - root - INFO - Training starts at step 1.\n"
        "[rank0]:[titan] 2026-01-01 10:20:30,123 - root - INFO - \x1b[31mstep:  1  "
        "\x1b[32mloss:  4.0000  \x1b[38;2;180;60;0mgrad_norm:  1.2  \x1b[36mmemory: 9.20GiB(11.6%)"
        "  \x1b[34mtps: 1,234  \x1b[0m\n"
        "[rank0]:[titan] 2026-01-01 10:20:31,123 - root - INFO - validate step: 1  loss:  4.1\n"
        "[rank0]:[titan] 2026-01-01 10:20:32,123 - root - INFO - step: 10  loss:  3.5  tps: 1,234\n"
        "[rank0]:[titan] 2026-01-01 10:20:33,123 - root - INFO - step: 20  loss:  3.0  tps: 1,234\n"
        "[rank0]:[titan] 2026-01-01 10:20:33,123 - root - INFO - validate step: 20  loss:  3.2\n",
    ),
    "Megatron": (
        [100, 200, 300],
        " [2026-01-01 00:00:00] iteration      100/  500000 | consumed samples:        25600 | "
        "elapsed time per iteration (ms): 1234.5 | learning rate: 1.500E-05 | global batch size:   "
        "256 | lm loss: 4.000000E+00 | loss scale: 1.0 | grad norm: 1.234 |\n"
        " validation loss at iteration 100 | lm loss value: 4.1E+00 | lm loss PPL: 6.0E+01 | \n"
        " [2026-01-01 00:00:01] iteration      200/  500000 | consumed samples:        51200 | "
        "learning rate: 1.500E-05 | lm loss: 3.500000E+00 | loss scale: 1.0 | grad norm: 1.2 |\n"
        " [2026-01-01 00:00:02] iteration      300/  500000 | consumed samples:        76800 | "
        "learning rate: 1.500E-05 | lm loss: 3.000000E+00 | loss scale: 1.0 | grad norm: 1.2 |\n"
        " validation loss at iteration 300 | lm loss value: 3.2E+00 | lm loss PPL: 2.5E+01 | \n",
    ),
    "wandb's export": (
        [0, 50, 100],
        '"Step","run-3 - train/loss","run-3 - train/loss__MIN","run-3 - train/loss__MAX",'
        '"run-3 - val/loss"\n"0","4.0","4.0","4.0","4.1"\n"50","3.5","3.5","3.5",""\n'
        '"100","3","3","3","3.2"\n',
    ),
    "JSON lines after a config": (
        [1, 2, 3],
        '{"config": {"lr": 0.001, "steps": 900}, "seed": 1}\n{"step": 1, "train": {"loss": 4}, '
        '"val": {"loss": 4.1}}\n{"step": 2, "train": {"loss": 3.5}}\n{"step": 3, "train": {"loss": '
        '3.0}, "val": {"loss": 3.2}}\nDone.\n',
    ),
    "columns in JSON": (
        [1, 2, 3],
        '{"name": "x", "history": {"step": [1, 2, 3], "loss": [4, 3.5, 3], "val_loss": [4.1, null, '
        "3.2]}}",
    ),
    "a logging library": (
        [10, 20, 30],
        "2026-01-01 12:00:00,123 INFO train.py:33 step 10 loss 4.0 lr 1e-3\n"
        "2026-01-01 12:00:01,123 INFO train.py:44 step 10 validation loss 4.1\n"
        "2026-01-01 12:00:02,123 INFO train.py:33 step 20 loss 3.5 lr 1e-3\n"
        "2026-01-01 12:00:03,123 INFO train.py:33 step 30 loss 3.0 lr 1e-3\n"
        "2026-01-01 12:00:04,123 INFO train.py:44 step 30 validation loss 3.2\n",
    ),
    "a progress bar": (
        [100, 1000, 1500],
        "Epoch 0:  10%|#         | 100/1000 [00:10<01:30, 10.00it/s, loss=4.0, val_loss=4.1]\r"
        "Epoch 0: 100%|##########| 1000/1000 [01:40<00:00, 10.00it/s, loss=3.5]\n"
        "Epoch 1:  50%|#####     | 500/1000 [00:50<00:50, 10.00it/s, loss=3.0, val_loss=3.2]\n",
    ),
    "a comment and decimal commas": (
        [1, 2, 3],
        "# a laptop; two threads\nstep;train loss;val loss\n1;4,0;4,1\n2;3,5;\n3;3;3,2\n",
    ),
    "names in a comment": ([1, 2, 3], "# step loss val_loss\n1 4.0 4.1\n2 3.5 nan\n3 3.0 3.2\n"),
}


@pytest.mark.parametrize("program", LOGS)
def test_the_logs_of_programs(tmp_path: Path, program: str) -> None:
    steps, text = LOGS[program]
    curve = read_curve(write(tmp_path / "log.txt", text))
    assert curve.train.steps.tolist() == pytest.approx(steps)
    assert curve.train.values.tolist() == [4, 3.5, 3]
    validation = curve.validation.finite
    assert validation.steps.tolist()[-1] == steps[-1]
    assert validation.values.tolist()[0], validation.values.tolist()[-1] == (4.1, 3.2)


def test_a_line_without_a_step_renumbers_nothing(tmp_path: Path) -> None:
    lines = [
        "loaded 26 tensors with loss 9",
        *[f"step {s}: loss 4.0" for s in range(100, 2100, 100)],
    ]
    lines[7:7] = ["loss 7.5", "val loss 4.5"]
    curve = read_curve(write(tmp_path / "log.txt", "\n".join(lines)))
    assert curve.train.steps.tolist() == list(range(100, 2100, 100))
    assert set(curve.train.values) == {4.0}
    assert (curve.validation.steps.tolist(), curve.validation.values.tolist()) == ([600], [4.5])
    said = " ".join(curve.messages)
    assert "1 row with a loss and no step left out, the first in line 8" in said
    assert "the step of the line before is taken for 1 validation loss" in said


def test_what_was_taken_for_what_is_said_first(tmp_path: Path) -> None:
    text = (
        "iter,total,train_bpb,note\n1,4,1.2,a\nx,3,1.1,b\n3,2,1.0,c\n2,2,1.0,d\n4,2,1.0,e, and f\n"
    )
    path = write(tmp_path / "x.csv", text)
    curve = read_curve(path)
    assert curve.messages[0].startswith(
        "CSV: steps from `iter`, training loss from `train_bpb`; losses taken as bits per byte; "
        "4 rows read, 1 "
    )
    assert "1 step cannot be read, the first in line 3 ('x')" in curve.messages[1]
    assert "go back 1 time, first from 3 to 2 in line 5" in curve.messages[2]
    other = read_curve(path, ["loss=total"])
    assert other.train.values.tolist() == [4, 2, 2, 2]
    assert read_curve(path, ["loss=train_bpb*2,step=total"]).train.values.tolist() == [2, 2.2, 2.4]
    for words, message in (
        (["loss=nothing"], "no column 'nothing', but iter, total, train_bpb, note"),
        (["speed=total"], "expected step=COLUMN, loss=COLUMN"),
    ):
        with pytest.raises(InputError, match=message):
            read_curve(path, words)


def test_one_of_several_runs_is_read_and_said(tmp_path: Path) -> None:
    text = "Step,a - train/loss,b - train/loss\n1,4,9\n2,3,8\n"
    path = write(tmp_path / "x.csv", text)
    curve = read_curve(path)
    assert curve.train.values.tolist() == [4, 3]
    assert "the file has several runs: `a - train/loss` is read, not b - train/loss" in str(
        curve.messages
    )
    assert read_curve(path, ["loss=b - train/loss"]).train.values.tolist() == [9, 8]


@pytest.mark.parametrize(("tag", "is_validation"), [("train_loss", False), ("val_loss", True)])
def test_tensorboard_exports_have_their_tag_in_their_name(
    tmp_path: Path, tag: str, is_validation: bool
) -> None:
    path = write(tmp_path / f"run-1-tag-{tag}.csv", "Wall time,Step,Value\n1.7e9,5,4\n1.7e9,9,3\n")
    curve = read_curve(path)
    assert curve.train.steps.tolist() == [5, 9]
    assert ("validation" in curve.messages[0]) == is_validation


def test_tensorboard_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer import event_file_writer as writers

    writer = writers.EventFileWriter(str(tmp_path))
    for step, loss in ((10, 4.0), (20, 9.0), (20, 3.5)):
        value = summary_pb2.Summary.Value(tag="train/loss", simple_value=loss)
        writer.add_event(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value])))
    writer.close()
    (path,) = tmp_path.glob("*tfevents*")
    curve = read_curve(path)
    assert (curve.train.steps.tolist(), curve.train.values.tolist()) == ([10, 20], [4, 3.5])
    assert "1 row with another loss at the step of the row before" in curve.messages[1]


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
        ("step,accuracy\n1,20\n", r"\(CSV\) has the columns step, accuracy: expected a loss"),
        (
            "1,4.0\n2,3.9\n",
            "begins with numbers and no names: expected a first line .* `step,loss`",
        ),
        ("step,loss\n1,high\n2,low\n3,low\n", "no named numbers|no line with|no number in `loss`"),
        ('{"step": 1}\n', "has the columns step: expected"),
        ("%PDF-1.4\0", "is a PDF"),
        ("words\0", "is not a text file"),
        ('step,loss\n1,4\n2,"10,000",3\n', "line 3 .* has 3 cells, but there are 2 names"),
    ],
)
def test_an_unreadable_file_is_refused_with_the_reason(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read_curve(write(tmp_path / "x.csv", text))
    with pytest.raises(InputError, match="cannot be read"):
        read_curve(tmp_path / "nowhere.csv")


STEP_LOGS = {
    "fairseq counts epochs in update": (
        '23 | INFO | train_inner | {"epoch": 1, "update": 0.5, "loss": "4", "num_updates": "100"}\n'
        '23 | INFO | train_inner | {"epoch": 1, "update": 0.1, "loss": "3", "num_updates": "200"}\n'
        '23 | INFO | valid | {"epoch": 1, "valid_loss": "3.5", "valid_num_updates": "200"}\n',
        [100, 200],
    ),
    "blocks": (
        "[step=10/90]\n    train/CrossEntropyLoss=4.0\n    tokens_seen=80\n"
        "[step=20/90]\n    train/CrossEntropyLoss=3.0\n",
        [10, 20],
    ),
    "a step only in the header": ("warmup step: 100\nloss: 4\nloss: 3\n", [1, 2]),
    "_step counts the calls": (
        "_step,train/loss,train/global_step\n0,4,10\n1,3,20\n",
        [10, 20],
    ),
    "thousands with k": ("[step 0.5k] loss 4.0\n[step 1k] loss 3.0\n", [500, 1000]),
    "thousands points of a spreadsheet": (
        "\ufeffStep;Loss\r\n1.000;3,912\r\n20.000;3,105\r\n",
        [1000, 20_000],
    ),
    "decimal points beside semicolons": ("step;loss\n1;3.912\n20;3.105\n", [1, 20]),
    "epochs from 0 in brackets": (
        "Epoch: [0][ 10/500]\tLoss 4.0 (4.1)\nEpoch: [1][ 10/500]\tLoss 3.0 (3.1)\n",
        [10, 510],
    ),
    "epochs from 1 in brackets": (
        "Epoch [1/2], Step [100/200], Loss: 4\nEpoch [2/2], Step [100/200], Loss: 3\n",
        [100, 300],
    ),
    "it": ("it 1,000: loss 4.0, 350ms, 1.2k tok/s\nit 2,000: loss 3.0, 9ms\n", [1000, 2000]),
    "speeds are no steps": (
        "loss: 4 tokens/s: 9 ms/step: 12 train_loss_step: 4 max_steps: 50\n"
        "loss: 3 tokens/s: 8 ms/step: 13 train_loss_step: 3 max_steps: 50\n",
        [1, 2],
    ),
    "columns named train and val": ("iteration,train,val\n10,4.0,4.1\n20,3.0,3.1\n", [10, 20]),
    "a note with a comma": ('step,loss,note\n10,3.912,"1,2"\n20,3.105,\n', [10, 20]),
    "a Markdown table": ("| Step | Loss |\n|---:|:---:|\n| 10 | 4 |\n| 20 | 3 |\n", [10, 20]),
    "a table in a frame": (
        "+----+----+\n|step|loss|\n+----+----+\n| 10 | 4  |\n| 20 | 3  |\n+----+----+\n",
        [10, 20],
    ),
}


@pytest.mark.parametrize("case", STEP_LOGS)
def test_steps_are_those_that_the_program_wrote(tmp_path: Path, case: str) -> None:
    text, steps = STEP_LOGS[case]
    curve = read_curve(write(tmp_path / "log", text))
    assert curve.train.steps.tolist() == steps
    assert (curve.train.values > 3).any()
    assert (curve.train.values < 5).all()


def test_several_losses_of_a_step_and_impossible_losses_are_said(tmp_path: Path) -> None:
    ranks = "".join(
        f"rank{rank}: step {step} loss {4 - step / 10 + rank}\n"
        for step in (1, 2)
        for rank in (0, 1)
    )
    said = " ".join(read_curve(write(tmp_path / "ranks.log", ranks)).messages)
    assert "2 rows with another loss at the step of the row before, the first in line 2" in said
    sums = read_curve(write(tmp_path / "sums.csv", "step,loss\n1,3912\n2,3105\n"))
    assert "3,508 in the median, which cannot be nats per token" in " ".join(sums.messages)


def test_a_training_loss_of_unknown_name_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "step,my_loss_a,loss_scale,val_loss\n1,4,16,4.1\n2,3,16,3.1\n")
    assert "no training loss was found. It could be my_loss_a (--columns" in " ".join(
        read_curve(path).messages
    )


def test_losses_of_two_units_are_not_compared(tmp_path: Path) -> None:
    lines = [f"step {i:05}/01000 | loss: {5 - i / 20}\nStep {i} | Validation bpb: {2 - i / 30}\n"
             for i in range(20)]  # fmt: skip
    curve = read_curve(write(tmp_path / "a.log", "".join(lines)))
    assert (
        "training loss taken as nats per token, validation loss taken as bits per byte"
        in (curve.messages[0])
    )
    signals = {finding.signal for finding in judge_curve(curve)}
    assert "overfitting" in signals
    assert "generalization gap" not in signals
    nats = read_curve(write(tmp_path / "b.csv", "step,val_loss\n1,4\n2,3\n"))
    bpb = read_curve(write(tmp_path / "c.csv", "step,val_bpb\n1,1.4\n2,1.3\n"))
    with pytest.raises(InputError, match=r"different units, nats per token \(b.csv\), bits"):
        compare_curves([nats], [bpb])
