"""A small trained model and another text in its characters, for the tests of fine-tuning."""

from pathlib import Path
from typing import Any

from glasslm.cli import main
from small_runs import train, without_report, write_text

# Few steps, and all that is written comes often; a sample of 200 tokens would take longer than the
# steps.
QUICK: dict[str, Any] = {
    "max_steps": 12,
    "warmup_steps": 2,
    "eval_interval": 4,
    "checkpoint_interval": 4,
    "sample_interval": 0,
    "keep": 100,
    "threads": 1,
}


def make_base(folder: Path, **flags: Any) -> Path:
    """A run that has learned the sentences of write_text somewhat."""
    text = write_text(folder / "old.txt")
    settings = {
        "max_steps": 40,
        "eval_interval": 20,
        "checkpoint_interval": 20,
        "sample_interval": 0,
    }
    return train(text, folder / "base", **settings | flags).run_dir


def write_new_text(folder: Path) -> Path:
    """The same sentences with every word backwards: other text, no other characters."""
    old = write_text(folder / "forwards.txt").read_text(encoding="utf-8")
    lines = [
        " ".join(word[::-1] for word in line.rstrip(".").split()) + "." for line in old.splitlines()
    ]
    path = folder / "new.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return path


def flag_arguments(**flags: Any) -> list[str]:
    """Flags as they are typed; True stands for a flag without a value."""
    said = []
    for name, value in flags.items():
        said += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return said


def finetune(base: Path, new: Path, run_dir: Path, **flags: Any) -> Path:
    """`glasslm finetune`, which must end well; the run's folder."""
    with without_report():
        argv = [
            "finetune",
            str(base),
            *flag_arguments(text_file=new, run_dir=run_dir, **QUICK | flags),
        ]
        assert main(argv) == 0
    return run_dir
