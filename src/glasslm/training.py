"""The loop: text in batches, loss, gradients, update, and what is written down on the way.

It asks nothing about the engine but its verbs. Step n means n batches consumed. Everything the next step depends on is
a function of the step, the weights and the moments, so a run goes on from a checkpoint as if it had never stopped.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np

from glasslm import checkpoint, evaluation, generation
from glasslm.checkpoint import Best, Progress
from glasslm.config import RunConfig
from glasslm.display import Display
from glasslm.engines import Batch, Engine, Losses, Update
from glasslm.errors import DivergedError
from glasslm.metrics import Line, Log
from glasslm.runs import Run
from glasslm.sampling import Sampling
from glasslm.schedule import lr_at
from glasslm.tokens import Dataset, Order, Shard

NONFINITE_LIMIT = 10  # steps in a row without a finite gradient: nothing will change any more
EVALUATION_SHARE = 0.02  # of a run's FLOPs, for one pass over the validation split
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 200, 0.8


class Loop:
    """One run under way, whose lines go to `metrics` and to `display`."""

    def __init__(
        self,
        run: Run,
        engine: Engine,
        dataset: Dataset,
        metrics: Log,
        display: Display,
        progress: Progress | None = None,
        old_text: Shard | None = None,
    ) -> None:
        """`old_text`: validation tokens of the run that this one starts from, to see what is forgotten."""
        self.old_text = old_text
        self.engine, self.dataset, self.metrics, self.display = engine, dataset, metrics, display
        self.run_dir, self.config = run.path, run.config
        self.hashes = hashes(run, dataset)
        self.max_steps = self.config.train.max_steps
        self.order = make_order(self.config, len(dataset.train.tokens))
        self.max_windows = evaluation_windows(self.config, len(dataset.val.tokens))
        self.step = progress.step if progress else 0
        self.tokens = progress.tokens if progress else 0
        self.best = progress.best if progress else None
        memory = progress.loop if progress else {}
        self.nonfinite: int = memory.get("nonfinite", 0)  # steps in a row
        self.patience_used: int = memory.get("patience_used", 0)  # evaluations since the best
        self.evaluated_at: int = memory.get("evaluated_at", -1)
        self.sampled_at: int = memory.get("sampled_at", -1)
        self.measured: bool = memory.get("measured", False)  # on the whole split, at the end
        self.saved_at = self.step if progress else -1
        self.signal: int | None = None  # that interrupted the run
        self.started = time.perf_counter()
        self.seconds_training, self.steps_timed = 0.0, 0  # since the last logged step

    def run(self) -> str:
        """Train to the end, or to a signal; the status for the last line.

        That is finished, stopped (by stop_at_loss or patience) or interrupted: something is left for a resumed run.
        """
        with interruptible() as interrupted:
            if self.evaluated_at < 0:  # a new run
                self.evaluate()
                if self.config.train.sample_interval:
                    self.sample()
                self.save()
            while not (self.is_over() or interrupted.is_set()):
                self.do_step()
            if not self.is_over():
                self.save()
            elif self.finish(interrupted):
                return "finished" if self.step == self.max_steps else "stopped"
            self.signal = interrupted.received
            return "interrupted"

    def do_step(self) -> None:
        """One step and all that is due after it."""
        train = self.config.train
        began = time.perf_counter()
        losses, update = self.advance()
        self.seconds_training += time.perf_counter() - began
        self.steps_timed += 1
        if due(self.step, train.log_interval) or self.step == self.max_steps or not update.finite:
            self.log(self.step_line(losses, update))
        if self.nonfinite >= NONFINITE_LIMIT:
            raise DivergedError(
                f"the gradients of {NONFINITE_LIMIT} steps in a row, up to step {self.step}, are not finite: "
                f"lower --lr (now {self.config.optimizer.lr:g}) or lengthen --warmup-steps"
            )
        if due(self.step, train.eval_interval):
            self.evaluate()
        if due(self.step, train.sample_interval):
            self.sample()
        # After all else that this step writes, so that a resumed run repeats none of it and misses none. `finish` saves
        # the last one, when it has evaluated.
        if (due(self.step, train.checkpoint_interval) or self.is_best()) and not self.is_over():
            self.save()
        self.display.tick(self.step)

    def advance(self) -> tuple[Losses, Update]:
        """One step: a batch through the engine."""
        rows = np.arange(self.config.train.batch_size)
        tokens, targets = self.order.batch(self.dataset.train.tokens, self.step, rows)
        losses = self.engine.accumulate(Batch(tokens, targets, self.step, rows), 1 / targets.size)
        update = self.engine.update(lr_at(self.step, self.config.optimizer, self.max_steps))
        self.step += 1
        self.tokens += targets.size
        self.nonfinite = 0 if update.finite else self.nonfinite + 1
        if self.nonfinite == 1:
            self.warn("nonfinite", f"the gradient of step {self.step} is not finite: the step was skipped")
        return losses, update

    def evaluate(self) -> None:
        """The validation loss now."""
        score = self.score(self.dataset.val.tokens, self.max_windows)
        is_best = math.isfinite(score.loss) and (self.best is None or score.loss < self.best.loss)
        self.log(self.eval_line(self.step, score, is_best))
        if self.old_text is not None:
            windows = evaluation_windows(self.config, len(self.old_text))
            self.log(self.eval_line(self.step, self.score(self.old_text, windows), is_best=False, split="old"))
        self.evaluated_at = self.step
        if is_best:
            self.best, self.patience_used = Best(self.step, score.loss), 0
        else:
            self.patience_used += 1

    def is_best(self) -> bool:
        return self.best is not None and self.best.step == self.step

    def is_over(self) -> bool:
        """Whether all steps are done or the evaluations end the run early; the same before and after a resume."""
        goal, patience = self.config.train.stop_at_loss, self.config.train.patience
        if self.step >= self.max_steps or self.measured:
            return True
        if goal is not None and self.best is not None and self.best.loss <= goal:
            return True
        return patience is not None and self.patience_used >= patience

    def finish(self, interrupted: Interrupt) -> bool:
        """The last weights evaluated and saved, and measured on the whole split, with the best ones, if need be.

        False when a signal came before the measurements: they are skipped, and a resumed run makes them.
        """
        if self.evaluated_at != self.step:
            self.evaluate()
        if self.sampled_at != self.step and self.config.train.sample_interval:
            self.sample()
        self.save()
        if self.max_windows is not None and not self.measured:
            lines = self.whole_lines(interrupted)
            if lines is None:
                return False
            finite = [line for line in lines if math.isfinite(line["loss"])]
            if finite:
                best = min(finite, key=lambda line: line["loss"])
                best["best"] = True
                self.best = Best(best["step"], best["loss"])
            for line in sorted(lines, key=lambda line: line["best"]):
                self.log(line)
            self.measured = True
            self.save(again=True)  # what came out best, too, is for the checkpoint to know
        return True

    def whole_lines(self, interrupted: Interrupt) -> list[Line] | None:
        """The losses of the last and of the best weights on the whole split; None when a signal came before."""
        if interrupted.is_set():
            return None
        lines = [self.eval_line(self.step, self.score(self.dataset.val.tokens, None), is_best=False)]
        best = checkpoint.load(self.run_dir, "best", lambda message: self.warn("damaged", message))
        if best.step != self.step:
            if interrupted.is_set():
                return None
            self.engine.load(best.weights().items())
            lines.append(self.eval_line(best.step, self.score(self.dataset.val.tokens, None), is_best=False))
            last = checkpoint.load(self.run_dir, self.step)  # saved a moment ago, moments and all
            self.engine.load(last.state(), last.progress.updates, last.progress.loss_scale)
        return lines

    def score(self, tokens: Shard, max_windows: int | None) -> evaluation.Score:
        return evaluation.evaluate(
            self.engine,
            tokens,
            self.dataset.tokenizer.byte_lengths,
            self.config.model.block_size,
            rows=self.engine.micro_batch_size * 16,
            max_windows=max_windows,
        )

    def sample(self) -> None:
        """A passage in the model's own words, from the same random numbers each time."""
        seed = self.config.train.seed
        sampling = Sampling(temperature=SAMPLE_TEMPERATURE, seed=seed)
        pieces = generation.generate(
            self.engine,
            self.dataset.tokenizer,
            [""],
            block_size=self.config.model.block_size,
            rolling=self.config.model.rolling,
            max_new_tokens=SAMPLE_TOKENS,
            sampling=sampling,
        )
        text = "".join(piece.text for piece in pieces)
        self.sampled_at = self.step
        line = {"kind": "sample", "step": self.step, "prompt": "", "text": text}
        self.log(line | {"temperature": SAMPLE_TEMPERATURE, "seed": seed})

    def save(self, again: bool = False) -> None:
        """A checkpoint of this step, unless there is one and it need not be written again."""
        if self.saved_at == self.step and not again:
            return
        progress = Progress(
            step=self.step,
            updates=self.engine.updates,
            loss_scale=self.engine.loss_scale,
            tokens=self.tokens,
            metrics_bytes=self.metrics.bytes,
            best=self.best,
            loop={
                "nonfinite": self.nonfinite,
                "patience_used": self.patience_used,
                "evaluated_at": self.evaluated_at,
                "sampled_at": self.sampled_at,
                "measured": self.measured,
            },
        )
        path = checkpoint.save(self.run_dir, self.engine, progress, keep=self.config.train.keep, **self.hashes)
        self.saved_at = self.step
        where = path.relative_to(self.run_dir).as_posix()
        self.log(
            {"kind": "checkpoint", "step": self.step, "path": where, "best": self.is_best(), "timing": self.clock()}
        )

    def step_line(self, losses: Losses, update: Update) -> Line:
        clip = self.config.optimizer.grad_clip
        per_step = self.seconds_training / self.steps_timed
        self.seconds_training, self.steps_timed = 0.0, 0
        further: Line = {"auxiliary": losses.auxiliary} if losses.auxiliary else {}
        if losses.experts is not None:  # the share of the choices that each layer's experts got
            further["experts"] = (losses.experts / losses.experts.sum(-1, keepdims=True)).round(4).tolist()
        return {
            "kind": "step",
            "step": self.step,
            "loss": losses.cross_entropy,
            **further,
            "lr": lr_at(self.step - 1, self.config.optimizer, self.max_steps),
            "grad_norm": update.norm,
            "clipped": bool(clip and update.norm > clip),
            "tokens": self.tokens,
            "epoch": self.order.epoch(self.step),
            "timing": self.clock()
            | {
                "tokens_per_s": self.config.train.batch_size * self.config.model.block_size / per_step,
                "remaining_s": per_step * (self.max_steps - self.step),
                "memory_bytes": peak_memory_bytes(),
            },
        }

    def eval_line(self, step: int, score: evaluation.Score, is_best: bool, split: str = "val") -> Line:
        line = {"kind": "eval", "step": step, "split": split, **score._asdict(), "best": is_best}
        return line | {"timing": self.clock()}

    def log(self, line: Line) -> None:
        """A line into metrics.jsonl, and then before people's eyes."""
        self.metrics.write(line)
        self.display.show(line)

    def warn(self, code: str, message: str) -> None:
        self.log({"kind": "warning", "step": self.step, "code": code, "message": message})

    def clock(self) -> dict[str, Any]:
        return {"elapsed_s": round(time.perf_counter() - self.started, 3)}


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def hashes(run: Run, dataset: Dataset) -> dict[str, str]:
    """What a checkpoint belongs to."""
    return {
        "config_sha256": run.config_sha256,
        "tokenizer_sha256": dataset.tokenizer.sha256,
        "data_sha256": dataset.sha256,
    }


def make_order(config: RunConfig, n_tokens: int) -> Order:
    train = config.train
    epochs = train.epochs is not None
    return Order(n_tokens, config.model.block_size, train.batch_size, train.seed, epochs)


def evaluation_windows(config: RunConfig, val_tokens: int) -> int | None:
    """How many validation windows an evaluation during training takes; None: the whole split, where that is cheap.

    A forward pass costs a third of a training step's FLOPs.
    """
    taken = most_windows(config)
    return None if val_tokens - 1 <= taken * config.model.block_size else taken


def most_windows(config: RunConfig) -> int:
    """How many windows an evaluation may take."""
    return max(32, int(3 * EVALUATION_SHARE * config.train.max_steps * config.train.batch_size))


def peak_memory_bytes() -> int | None:
    """The most memory this process has held; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """An event that Ctrl-C (SIGINT) or SIGTERM sets; a second signal ends the process at once.

    The handlers are installed explicitly, because a job that a shell starts in the background ignores SIGINT.
    """
    event = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread only
        yield event
        return
    before = {which: signal.signal(which, event.receive) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


class Interrupt(threading.Event):
    """Set by a signal, and remembers which."""

    received: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_set():
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the live display has hidden the cursor
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        self.set()
