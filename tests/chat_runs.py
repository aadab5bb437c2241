"""Small runs of conversations, for the tests of chat."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from doubles import make_record
from glasslm.cli import main
from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.data.chat.chat_vocabulary import make_chat_vocabulary
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines.state import state_without_moments
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.checkpoint import TrainingPosition
from small_runs import without_report
from tuned_runs import QUICK, flag_arguments, make_base

ALPHABET = "\n\x1b\x07abcdefghijklmnopqrstuvwxyz?. "
NOUNS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack"}


def make_byte_base(folder: Path, **flags: Any) -> Path:
    """A trained run over bytes, which can express any conversation."""
    return make_base(folder, tokenizer="byte", block_size=64, **flags)


def write_chat(path: Path, count: int = 60) -> Path:
    """Conversations of one or two short turns."""
    draw = random.Random(3)
    lines = []
    for _ in range(count):
        messages = []
        for noun in draw.sample(sorted(NOUNS), draw.choice((1, 1, 2))):
            messages += [
                {"role": "user", "content": f"{noun}?"},
                {"role": "assistant", "content": NOUNS[noun]},
            ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def learn_chat(base: Path, chat: Path, run_dir: Path, **flags: Any) -> Path:
    """`glasslm finetune --chat`, which must end well; the run's folder."""
    given = QUICK | {"chat": chat, "run_dir": run_dir, "full": True} | flags
    if not given["full"]:
        del given["full"]
    with without_report():
        assert main(["finetune", str(base), *flag_arguments(**given)]) == 0
    return run_dir


def make_random_chat(folder: Path, block_size: int) -> Path:
    """A run with random weights, a template, and control characters in its vocabulary."""
    config = RunConfig(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, block_size=block_size)
    ).resolve()
    chat = make_chat_vocabulary("chatml", (), CharTokenizer(ALPHABET), None)
    record = make_record(config, chat.tokenizer)
    record["tokenizer"]["transformers"] = chat.settings
    run_folder.create_run(folder, record, chat.tokenizer.to_json())
    run, size = run_folder.Run(folder), chat.tokenizer.vocab_size
    weights = dict(initial_weights(parameter_table(config.model, size), 0))
    weights["embedding.weight"] *= 20
    weights["embedding.weight"][-3:] = 0  # no special token is likely
    state = state_without_moments(weights, config, size, np.float32)
    checkpoint.save(folder, state.items(), TrainingPosition(0, 0, 0, 0), run.identity)
    return folder
