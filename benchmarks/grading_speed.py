"""How long it takes to grade a class: 100 submissions of 5 exercises, 2 processes.

    python benchmarks/grading_speed.py [--students 100] [--workers 2]

Each student hands in a variant of a right solution, or one with a fault; one in 50 has an endless
loop, which costs the limit of CPU time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from glasslm.course.grading.class_folder import Class
from glasslm.course.grading.grading import grade_class
from glasslm.course.grading.result_files import sum_points
from glasslm.text import format_duration, notify

SOLUTIONS = {
    "softmax": """
import numpy as np

def softmax(x):
    y = np.exp(x - x.max(-1, keepdims=True))
    y = y / y.sum(-1, keepdims=True)
    return y, lambda dy: y * (dy - (dy * y).sum(-1, keepdims=True))
""",
    "linear": """
def linear(x, w):
    return x @ w.T, lambda dy: (dy @ w, dy.T @ x)
""",
    "silu": """
import numpy as np

def silu(x):
    s = 0.5 * (1 + np.tanh(0.5 * x))
    return x * s, lambda dy: dy * (s + x * s * (1 - s))
""",
    "rms_norm": """
import numpy as np

def rms_norm(x, gain, eps=1e-5):
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    unit = x * rstd

    def backward(dy):
        du = dy * gain
        dx = rstd * (du - unit * (du * unit).mean(-1, keepdims=True))
        return dx, (dy * unit).sum(0)

    return gain * unit, backward
""",
    "attention": """
import numpy as np

def attention(q, k, v):
    T, Q = q.shape[1], q.shape[-1]
    group = q.shape[2] // k.shape[2]
    scale = float(Q) ** -0.5
    keys, values = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("bthq,bshq->bhts", q, keys) * scale
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y = np.einsum("bhts,bshq->bthq", p, values)

    def backward(dy):
        dp = np.einsum("bthq,bshq->bhts", dy, values)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
        dq = np.einsum("bhts,bshq->bthq", ds, keys)
        dk = np.einsum("bhts,bthq->bshq", ds, q).reshape(*k.shape[:3], group, Q).sum(3)
        dv = np.einsum("bhts,bthq->bshq", p, dy).reshape(*k.shape[:3], group, Q).sum(3)
        return dq, dk, dv

    return y, backward
""",
}
FAULTS = {
    "softmax": ("(dy - (dy * y).sum(-1, keepdims=True))", "dy"),
    "linear": ("dy.T @ x", "x.T @ dy"),
    "silu": ("(s + x * s * (1 - s))", "(s + s * (1 - s))"),
    "rms_norm": ("rstd * (du - unit * (du * unit).mean(-1, keepdims=True))", "rstd * du"),
    "attention": ("(dp - (p * dp).sum(-1, keepdims=True))", "dp"),
}
ENDLESS = "def {name}(*arguments):\n    while True:\n        pass\n"
ENDLESS_EVERY = 50  # submissions


def write_submissions(folder: Path, students: list[str]) -> None:
    """A third right, two thirds with a fault, and one endless loop in ENDLESS_EVERY files."""
    count = 0
    for number, student in enumerate(students):
        (folder / student).mkdir(parents=True)
        for index, (name, source) in enumerate(SOLUTIONS.items()):
            count += 1
            text = source if (number + index) % 3 == 0 else source.replace(*FAULTS[name])
            text = ENDLESS.format(name=name) if count % ENDLESS_EVERY == 0 else text
            (folder / student / f"{name}.py").write_text(text, encoding="utf-8")


def main() -> None:
    """Write submissions, grade them, and print the minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    flags = parser.parse_args()
    students = [f"student{number:03}" for number in range(flags.students)]
    with tempfile.TemporaryDirectory() as folder:
        submissions = Path(folder) / "submissions"
        write_submissions(submissions, students)
        course = Class(tuple(SOLUTIONS), tuple(students), 1)
        begin = time.perf_counter()
        records, _ = grade_class(
            course, submissions, Path(folder) / "grades", flags.workers, 10, notify
        )
        seconds = time.perf_counter() - begin
    right = sum(record["verdict"] == "right" for record in records)
    print(f"{len(records)} files of {len(students)} students: {right} right")
    print(f"{sum_points(records):g} of {sum_points(records, 'possible'):g} points")
    print(f"{seconds / 60:.2f} minutes ({format_duration(seconds)}), {flags.workers} processes")


if __name__ == "__main__":
    main()
