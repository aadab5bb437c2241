"""Logs as many programs write them, with made-up numbers: the losses and the steps are theirs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from glasslm.errors import InputError
from glasslm.lab.diagnosis.curve_files import read_curve
from glasslm.lab.diagnosis.curves import judge_curve
from glasslm.lab.tables.columns import split_unit

LN2 = math.log(2)
Points = dict[float, float]  # loss by step

# The content of a file; its training losses; its validation losses.
LOGS: dict[str, tuple[str, Points, Points]] = {
    "source code above the log": (
        "def newton_schulz(G, steps=10, eps=1e-7):\n    lr=0.02\n    loss = model(x)\n"
        '    print(f"step:{step}/{n} val_loss:{val_loss:.4f}")\n# loss 3\n====\n'
        "step:0/90 val_loss:10.8 train_time:0ms step_avg:nanms\n"
        "step:1/90 train_loss:10.7 train_time:10ms\nstep:2/90 train_loss:9.5 train_time:20ms\n",
        {1: 10.7, 2: 9.5},
        {0: 10.8},
    ),
    "words that could be names above a log": (
        "iter 10: loss 4.0\nResuming training from out\niter 20: loss 3.5\niter 30: loss 3.0\n",
        {10: 4.0, 20: 3.5, 30: 3.0},
        {},
    ),
    "a step before each name": (
        "0 val 10.9\n0 train 10.8\n1 train 10.2\n250 val 5.9\n250 train 5.8\n",
        {0: 10.8, 1: 10.2, 250: 5.8},
        {0: 10.9, 250: 5.9},
    ),
    "a step before a bar": (
        "10 | loss 4.2 | lr 1e-4 | 300.1ms\n20 | loss 4.1 | lr 1e-4 | 300.1ms\n",
        {10: 4.2, 20: 4.1},
        {},
    ),
    "a step of a total, and an epoch": (
        "1/900 (epoch 0.001), train_loss = 4.2, grad/param norm = 5e-1\n"
        "2/900 (epoch 0.002), train_loss = 4.1, grad/param norm = 5e-1\n",
        {1: 4.2, 2: 4.1},
        {},
    ),
    "a step in brackets after a prefix of absl": (
        "I0101 00:00:00.1 139 logging_writer.py:48] [10] learning_rate=0.1, train_loss=8.5\n"
        "I0101 00:00:00.1 139 logging_writer.py:48] [20] train_loss=7.5, eval_loss=7.6\n",
        {10: 8.5, 20: 7.5},
        {20: 7.6},
    ),
    "a header with another number of iterations": (
        "Starting training, iters: 1000\nIter 1: Val loss 2.9, Val took 10.1s\n"
        "Iter 10: Train loss 2.5, Tokens/sec 200.1\nBest loss: 2.2 at step 7\n",
        {10: 2.5},
        {1: 2.9},
    ),
    "batches that begin again in each epoch": (
        "| epoch   1 |   200/ 1000 batches | lr 20.00 | ms/batch 12 | loss  6.50 | ppl   665.14\n"
        "| epoch   1 |   400/ 1000 batches | lr 20.00 | ms/batch 12 | loss  6.10 | ppl   445.86\n"
        "| end of epoch   1 | time: 38.11s | valid loss  5.80 | valid ppl   330.30\n"
        "| epoch   2 |   200/ 1000 batches | lr 20.00 | ms/batch 12 | loss  5.70 | ppl   298.87\n",
        {200: 6.5, 400: 6.1, 1200: 5.7},
        {400: 5.8},
    ),
    "samples of an epoch": (
        "Train Epoch: 1 [0/60000 (0%)]\tLoss: 2.3\nTrain Epoch: 1 [640/60000 (1%)]\tLoss: 2.2\n"
        "Train Epoch: 2 [0/60000 (0%)]\tLoss: 1.3\n"
        "Test set: Average loss: 1.2, Accuracy: 4000/10000 (40%)\n",
        {0: 2.3, 640: 2.2, 60000: 1.3},
        {60000: 1.2},
    ),
    "bars of Keras": (
        "Epoch 1/2\n 50/100 [=====>.....] - ETA: 5s - loss: 4.2\x08\x08\x08"
        "100/100 [==========] - 12s 120ms/step - loss: 4.0 - val_loss: 4.1\n"
        "Epoch 2/2\n\x1b[1m100/100\x1b[0m \x1b[32m━━━━\x1b[0m 12s 120ms/step - loss: 3.5 - "
        "val_loss: 3.6\n",
        {50: 4.2, 100: 4.0, 200: 3.5},
        {100: 4.1, 200: 3.6},
    ),
    "a table of batches by epoch": (
        "epoch,batch,loss\n0,0,4\n0,50,3\n1,0,2.5\n1,50,2\n",
        {0: 4, 50: 3, 100: 2.5, 150: 2},
        {},
    ),
    "dictionaries beside a progress bar": (
        " 1%| | 10/900 [00:10<30:00, 7.3s/it]{'loss': 1.5, 'epoch': 0.01}\n"
        " 2%| | 20/900 [00:20<30:00, 7.3s/it]{'loss': 1.4, 'epoch': 0.01}\n"
        "100%|#| 50/50 [00:01<00:00, 50it/s]{'eval_loss': 1.45, 'eval_runtime': 10}\n",
        {10: 1.5, 20: 1.4},
        {20: 1.45},
    ),
    "a dictionary in a line": ("step=1 losses={'ce': 4.0, 'aux': 0.1}\n" * 1, {1: 4.0}, {}),
    "numbers as NumPy and PyTorch print them": (
        "{'step': 1, 'loss': np.float64(4.0)}\nstep 2 loss tensor(3.5, device='cuda:0')\n"
        "step 3 loss Array(3.0, dtype=float32)\n",
        {1: 4.0, 2: 3.5, 3: 3.0},
        {},
    ),
    "accuracy on the test text is no validation loss": (
        "loss:   4.12 test_accuracy: 11.2%:   1%|▏   | 1/70 [00:01<01:10]\r"
        "loss:   3.12 test_accuracy: 21.2%:   3%|▏   | 2/70 [00:01<01:10]\n",
        {1: 4.12, 2: 3.12},
        {},
    ),
    "a block of values with longer names": (
        "[step=1/90,epoch=1]\n    optim/total grad norm=12.3\n    train/CE loss=11.1\n"
        "[step=2/90,epoch=1]\n    optim/total grad norm=10.3\n    train/CE loss=10.9\n",
        {1: 11.1, 2: 10.9},
        {},
    ),
    "a block of metrics": (
        "[epoch=1][batch=100/500]:\n\t Train loss/train/total: 8.5\n\tTrain l2_norm/grad: 1\n"
        "[epoch=1][batch=200/500]:\n\t Train loss/train/total: 7.5\n"
        "Eval metrics/eval/LanguageCrossEntropy: 7.6\n",
        {100: 8.5, 200: 7.5},
        {200: 7.6},
    ),
    "seconds of a batch are no batches": (
        "INFO | Train Epoch: 0 [ 1024/100000 (1%)] Loss: 9.5 (9.9) Batch (t): 1.2, 800/s\n"
        "INFO | Train Epoch: 0 [ 2048/100000 (2%)] Loss: 8.5 (9.4) Batch (t): 1.3, 800/s\n",
        {1024: 9.5, 2048: 8.5},
        {},
    ),
    "bits by the perplexity beside them": (
        '{"loss": "3", "ppl": "8", "num_updates": "50"}\n'
        '{"loss": "2", "ppl": "4", "num_updates": "100"}\n',
        {50: 3 * LN2, 100: 2 * LN2},
        {},
    ),
    "nats by the perplexity beside them": (
        "step 1 loss 3.0 ppl 20.0855\nstep 2 loss 2.0 ppl 7.38906\n",
        {1: 3, 2: 2},
        {},
    ),
    "bits by their name": ("step,val_loss_bits\n1,3\n2,2\n", {1: 3 * LN2, 2: 2 * LN2}, {}),
    "perplexities": (
        "step 10: train ppl 60, val ppl 65\nstep 20: train ppl 50, val ppl 55\n",
        {10: math.log(60), 20: math.log(50)},
        {10: math.log(65), 20: math.log(55)},
    ),
    "logarithms of perplexities": ("step,log_perplexity\n1,3.2\n2,2.2\n", {1: 3.2, 2: 2.2}, {}),
    "a row for each metric": (
        "run_id,key,value,step\na,train_loss,4,0\na,val_loss,4.1,0\na,train_loss,3.5,10\n",
        {0: 4, 10: 3.5},
        {0: 4.1},
    ),
    "a row for each metric in JSON": (
        '[{"metricName":"train_loss","metricValue":"4.0","step":0},'
        '{"metricName":"train_loss","metricValue":"3.5","step":10}]',
        {0: 4, 10: 3.5},
        {},
    ),
    "a metric file of MLflow": (
        "1700000000000 4.0 0\n1700000001000 3.5 10\n",
        {0: 4, 10: 3.5},
        {},
    ),
    "a table printed by pandas": (
        "      step      loss  val_loss\n0        0  4.000000      4.10\n1      100  3.5  NaN\n"
        "..     ...       ...       ...\n10    1000  2.500000      2.60\n\n[11 rows x 3 columns]\n",
        {0: 4, 100: 3.5, 1000: 2.5},
        {0: 4.1, 1000: 2.6},
    ),
    "a table of a notebook": (
        "Step Training Loss Validation Loss\n500 2.31 2.20\n1000 2.11 2.05\n1500 No log 2.00\n",
        {500: 2.31, 1000: 2.11},
        {500: 2.2, 1000: 2.05, 1500: 2.0},
    ),
    "LaTeX": (
        "\\begin{tabular}{lrr}\n\\toprule\nstep & loss & val loss \\\\\n\\midrule\n"
        "0 & 4.0 & \\textbf{4.1} \\\\\n1{,}000 & $3.5 \\pm 0.1$ & 3.6 \\\\\n\\end{tabular}\n",
        {0: 4, 1000: 3.5},
        {0: 4.1, 1000: 3.6},
    ),
    "errors after the losses": ("step,loss\n1,4.52 ± 0.01\n2,4.3+-0.1\n", {1: 4.52, 2: 4.3}, {}),
    "rows of training and validation": (
        "split,step,loss\ntrain,10,4\nval,10,4.1\ntest,10,9\ntrain,20,3.5\nval,20,3.6\n",
        {10: 4, 20: 3.5},
        {10: 4.1, 20: 3.6},
    ),
    "lists of training and validation": (
        '{"train":[{"step":1,"loss":4.0},{"step":2,"loss":3.5}],"eval":[{"step":1,"loss":4.1},'
        '{"step":2,"loss":3.7},{"step":3,"loss":3.6}]}',
        {1: 4, 2: 3.5},
        {1: 4.1, 2: 3.7, 3: 3.6},
    ),
    "columns of training and validation": (
        '{"train":{"step":[1,2],"loss":[4.0,3.5]},"val":{"step":[2],"loss":[4.1]}}',
        {1: 4, 2: 3.5},
        {2: 4.1},
    ),
    "lines of training and validation in epochs": (
        '{"mode":"train","epoch":1,"iter":10,"loss":4}\n{"mode":"train","epoch":1,"iter":20,"loss":3}'
        '\n{"mode":"val","epoch":1,"iter":20,"loss":3.6}\n{"mode":"train","epoch":2,"iter":10,"loss":2}',
        {10: 4, 20: 3, 30: 2},
        {20: 3.6},
    ),
    "a count of iterations": (
        "After 100 iterations: loss 4.0\nstep_200: loss=3.5\niter-300 | loss=[3.0]\n",
        {100: 4, 200: 3.5, 300: 3},
        {},
    ),
    "an epoch and a batch in brackets": (
        "[1,  2000] loss: 2.2\n[1,  4000] loss: 1.9\n[2,  2000] loss: 1.5\n",
        {2000: 2.2, 4000: 1.9, 6000: 1.5},
        {},
    ),
    "thin spaces between thousands": (
        "Step: 1\u202f000 Loss: 4.0\nStep: 2\u00a0000 Loss: 3.5\n",
        {1000: 4, 2000: 3.5},
        {},
    ),
    "a table in a frame of boxes": (
        "┏━━━━━━┳━━━━━━┓\n┃ step ┃ loss ┃\n┡━━━━━━╇━━━━━━┩\n"
        "│ 10   │ 4.0  │\n│ 20   │ 3.5  │\n└──────┴──────┘\n",
        {10: 4, 20: 3.5},
        {},
    ),
    "delimiters at the end": ("step;loss;\n1;4;\n2;3;\n", {1: 4, 2: 3}, {}),
    "JSON with a comma too many": (
        '[{"step":1,"loss":4.0},{"step":2,"loss":3.5},]',
        {1: 4, 2: 3.5},
        {},
    ),
    "a dictionary that Python printed": (
        "{'losses': [4.0, 3.5], 'val_losses': [4.1, 3.6]}",
        {1: 4, 2: 3.5},
        {1: 4.1, 2: 3.6},
    ),
    "objects by step": ('{"100":{"loss":4.0},"200":{"loss":3.5}}', {100: 4, 200: 3.5}, {}),
    "tokens": ("tokens,loss\n1000000,4\n2000000,3.5\n", {1e6: 4, 2e6: 3.5}, {}),
    "an index of pandas": ("Unnamed: 0,step,loss\n0,10,4\n1,20,3.5\n", {10: 4, 20: 3.5}, {}),
}


@pytest.mark.parametrize("kind", LOGS)
def test_logs_of_any_program(tmp_path: Path, kind: str) -> None:
    text, train, validation = LOGS[kind]
    path = tmp_path / "log.txt"
    path.write_text(text, encoding="utf-8", newline="")
    curve = read_curve(path)
    assert dict(zip(curve.train.steps, curve.train.values)) == pytest.approx(train)
    assert dict(zip(curve.validation.steps, curve.validation.values)) == pytest.approx(validation)


@pytest.mark.parametrize(
    ("text", "unit", "words"),
    [
        ("epoch,loss\n1,4\n2,3\n", "epoch", "steps are epochs"),
        ("tokens_seen,loss\n100,4\n200,3\n", "token", "steps are `tokens_seen`"),
        ("loss\n4\n3\n", "row", "the 2 rows with a loss are numbered"),
        ("step,loss\n1,4\n2,3\n", "step", "steps from `step`"),
        ("epoch,batch,loss\n0,0,4\n0,9,3\n1,0,2\n", "step", "begin again in each epoch"),
        ("step,ppl,loss\n1,16,4\n2,8,3\n", "step", "`ppl` is 2 to the power of `loss`"),
        ("step,ppl\n1,16\n2,8\n", "step", "loss from the logarithm of `ppl`"),
        ("step,loss (bits)\n1,6\n2,5\n", "step", "bits per token, converted to nats per token"),
        ('{"loss": [4, 3, 2], "val_loss": [4, 3]}', "row", "JSON without val_loss, whose length"),
        (
            '{"train_log": [{"step": 1, "loss": 4}, {"step": 2, "loss": 3}], "b": [{"loss": 1}]}',
            "step",
            "JSON without b, other lists of records: steps",
        ),
        (
            "metric,step,value\nloss,1,4\nloss,2,3\nloss,1,9\nloss,2,8\n",
            "step",
            "the steps go back 1 time, first from 2 to 1 in line 4",
        ),
        (
            "metric,step,value\nloss,2,3\nval_loss,2,2.7\nval_loss,2,9.9\n",
            "step",
            "1 row with another loss at the step of the row before, the first in line 4",
        ),
        ("step,value\n1,6\n2,5\n", "step", "neither the column nor the name of the file says"),
    ],
)
def test_what_the_steps_and_losses_are_is_said(
    tmp_path: Path, text: str, unit: str, words: str
) -> None:
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    curve = read_curve(tmp_path / "log.csv")
    assert curve.step_unit == unit == curve.train.unit
    assert words in " ".join(curve.messages)


def test_validation_rows_after_training_rows_do_not_go_back(tmp_path: Path) -> None:
    rows = ["train,1,4", "train,2,3", "val,1,4.1", "val,2,3.1"]
    (tmp_path / "a.csv").write_text("\n".join(["split,step,loss", *rows]), encoding="utf-8")
    assert len(read_curve(tmp_path / "a.csv").messages) == 1


def test_a_letter_after_loss_names_a_run_and_is_no_unit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("step,loss_a,loss_b\n1,4,3\n", encoding="utf-8")
    with pytest.raises(InputError, match="has the columns step, loss_a, loss_b: expected a loss"):
        read_curve(tmp_path / "a.csv")
    assert split_unit("loss_b") == ("loss_b", 1)
    assert split_unit("Loss (T)") == ("loss_t", 1)
    assert split_unit("Loss (nats)") == ("loss", 1)


def test_epochs_are_called_epochs(tmp_path: Path) -> None:
    lines = [f"{epoch},{4 - 0.1 * epoch},{3 + abs(epoch - 9) / 10}" for epoch in range(1, 31)]
    (tmp_path / "a.csv").write_text("\n".join(["epoch,loss,val_loss", *lines]), encoding="utf-8")
    findings = judge_curve(read_curve(tmp_path / "a.csv"))
    (overfitting,) = [finding for finding in findings if finding.signal == "overfitting"]
    assert "best validation loss 3 at epoch 9" in overfitting.evidence
    assert overfitting.advice.startswith("Use the checkpoint of epoch 9.")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xlsx", b"PK\x03\x04", "an Excel workbook .* Save its table as CSV"),
        ("a.parquet", b"PAR1", "a Parquet file: .*to_csv"),
        ("a.log.gz", b"\x1f\x8b\x08", "a gzip file: .* gunzip"),
        (
            "run-tag-lr.csv",
            b"Wall time,Step,Value\n1,1,0.1\n2,2,0.1\n",
            "another metric, by its name",
        ),
        ("acc_val.csv", b"step,value\n1,0.1\n2,0.2\n", "--columns loss=value"),
        (
            "a.csv",
            b"run,metric,step,value\na,loss,1,4\nb,loss,1,4\n",
            "the values of 2 runs in `run`: expected those of one",
        ),
    ],
)
def test_what_cannot_be_read_has_a_cure(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_curve(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig"])
def test_encodings_of_spreadsheets(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("step\tloss\r\n1\t4,5\r\n2\t3,5\r\n".encode(encoding))
    assert read_curve(tmp_path / "a.txt").train.values.tolist() == [4.5, 3.5]
