"""The loop: text in batches, loss, gradients, update, and what is written down on the way.

It asks nothing about the engine but its verbs. Step n means n batches consumed. Everything the next step depends on is
a function of the step, the weights and the moments, so a run goes on from a checkpoint as if it had never stopped.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from glasslm import checkpoint, evaluation, generation
from glasslm.checkpoint import Best, Progress
from glasslm.config import RunConfig
from glasslm.engines import Batch, Engine, Update
from glasslm.errors import DivergedError
from glasslm.metrics import Line
from glasslm.sampling import Sampling
from glasslm.schedule import lr_at
from glasslm.tokens import Dataset, Order

NONFINITE_LIMIT = 10  # steps in a row without a finite gradient: nothing will change any more
EVALUATION_SHARE = 0.02  # of a run's FLOPs, for one pass over the validation split
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 200, 0.8


class Loop:
    """One run under way. `log` takes every line of metrics.jsonl; `tick` is told of every step.

    `run` returns the status for the last line: finished, stopped (stop_at_loss or patience) or interrupted.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        dataset: Dataset,
        run_dir: Path,
        hashes: dict[str, str],
        log: Callable[[Line], None],
        log_bytes: Callable[[], int],
        tick: Callable[[int], None],
        progress: Progress | None = None,
    ) -> None:
        self.config, self.engine, self.dataset = config, engine, dataset
        self.run_dir, self.hashes = run_dir, hashes
        self.log, self.log_bytes, self.tick = log, log_bytes, tick
        self.max_steps = config.train.max_steps
        self.order = make_order(config, len(dataset.train.tokens))
        self.max_windows = evaluation_windows(config, len(dataset.val.tokens))
        self.step = progress.step if progress else 0
        self.tokens = progress.tokens if progress else 0
        self.best = progress.best if progress else None
        self.best_line: Line | None = None  # the eval line of the best, for the summary
        memory = progress.loop if progress else {}
        self.nonfinite: int = memory.get("nonfinite", 0)  # steps in a row
        self.patience_used: int = memory.get("patience_used", 0)  # evaluations since the best
        self.evaluated_at: int = memory.get("evaluated_at", -1)
        self.sampled_at: int = memory.get("sampled_at", -1)
        self.saved_at = self.step if progress else -1
        self.signal: int | None = None  # that interrupted the run
        self.started = time.perf_counter()
        self.seconds_training, self.steps_timed = 0.0, 0  # since the last logged step

    def run(self) -> str:
        train = self.config.train
        with interruptible() as interrupted:
            if self.evaluated_at < 0:  # a new run
                self.evaluate()
                if train.sample_interval:
                    self.sample()
                self.save()
            while not self.is_over():
                began = time.perf_counter()
                loss, update = self.advance()
                self.seconds_training += time.perf_counter() - began
                self.steps_timed += 1
                if due(self.step, train.log_interval) or self.step == self.max_steps or not update.finite:
                    self.log(self.step_line(loss, update))
                if self.nonfinite >= NONFINITE_LIMIT:
                    raise DivergedError(
                        f"the gradients of {NONFINITE_LIMIT} steps in a row, up to step {self.step}, are not finite: "
                        f"lower --lr (now {self.config.optimizer.lr:g}) or lengthen --warmup-steps"
                    )
                if due(self.step, train.eval_interval):
                    self.evaluate()
                if due(self.step, train.sample_interval):
                    self.sample()
                # After all else that this step writes, so that a resumed run repeats none of it and misses none.
                if due(self.step, train.checkpoint_interval) or self.is_best():
                    self.save()
                self.tick(self.step)
                if interrupted.is_set() and not self.is_over():
                    self.save()
                    self.signal = interrupted.received
                    return "interrupted"
        stopped = self.step < self.max_steps
        self.finish()
        return "stopped" if stopped else "finished"

    def advance(self) -> tuple[float, Update]:
        """One step: a batch through the engine."""
        rows = np.arange(self.config.train.batch_size)
        tokens, targets = self.order.batch(self.dataset.train.tokens, self.step, rows)
        loss = self.engine.accumulate(Batch(tokens, targets, self.step, rows), 1 / targets.size)
        update = self.engine.update(lr_at(self.step, self.config.optimizer, self.max_steps))
        self.step += 1
        self.tokens += targets.size
        self.nonfinite = 0 if update.finite else self.nonfinite + 1
        if self.nonfinite == 1:
            message = f"the gradient of step {self.step} is not finite: the step was skipped"
            self.log({"kind": "warning", "step": self.step, "code": "nonfinite", "message": message})
        return loss, update

    def evaluate(self) -> None:
        """The validation loss now."""
        score = self.score(self.max_windows)
        is_best = math.isfinite(score.loss) and (self.best is None or score.loss < self.best.loss)
        line = eval_line(self.step, score, is_best) | {"timing": self.clock()}
        self.log(line)
        self.evaluated_at = self.step
        if is_best:
            self.best, self.best_line, self.patience_used = Best(self.step, score.loss), line, 0
        else:
            self.patience_used += 1

    def is_best(self) -> bool:
        return self.best is not None and self.best.step == self.step

    def is_over(self) -> bool:
        """Whether all steps are done or the evaluations end the run early; the same before and after a resume."""
        goal, patience = self.config.train.stop_at_loss, self.config.train.patience
        if self.step >= self.max_steps:
            return True
        if goal is not None and self.best is not None and self.best.loss <= goal:
            return True
        return patience is not None and self.patience_used >= patience

    def finish(self) -> None:
        """The last weights and the best ones, measured on the whole split."""
        if self.evaluated_at != self.step:
            self.evaluate()
        if self.sampled_at != self.step and self.config.train.sample_interval:
            self.sample()
        self.save()
        if self.max_windows is None or self.best is None:
            return
        last = eval_line(self.step, self.score(None), is_best=False) | {"timing": self.clock()}
        chosen = last
        if self.best.step != self.step:
            moments = [(name, array.copy()) for name, array in self.engine.state()]
            self.engine.load(checkpoint.load(self.run_dir, self.best.step).weights().items())
            chosen = eval_line(self.best.step, self.score(None), is_best=True) | {"timing": self.clock()}
            self.engine.load(moments, self.engine.updates)
            self.log(last)
        chosen["best"] = True
        self.log(chosen)
        self.best, self.best_line = Best(self.best.step, chosen["loss"]), chosen

    def score(self, max_windows: int | None) -> evaluation.Score:
        return evaluation.evaluate(
            self.engine,
            self.dataset.val.tokens,
            self.dataset.tokenizer.byte_lengths,
            self.config.model.block_size,
            rows=self.config.train.micro_batch_size * 16,
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
            max_new_tokens=SAMPLE_TOKENS,
            sampling=sampling,
        )
        text = "".join(piece.text for piece in pieces)
        self.sampled_at = self.step
        line = {"kind": "sample", "step": self.step, "prompt": "", "text": text}
        self.log(line | {"temperature": SAMPLE_TEMPERATURE, "seed": seed})

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_at == self.step:
            return
        progress = Progress(
            step=self.step,
            updates=self.engine.updates,
            tokens=self.tokens,
            metrics_bytes=self.log_bytes(),
            best=self.best,
            loop={
                "nonfinite": self.nonfinite,
                "patience_used": self.patience_used,
                "evaluated_at": self.evaluated_at,
                "sampled_at": self.sampled_at,
            },
        )
        path = checkpoint.save(self.run_dir, self.engine, progress, keep=self.config.train.keep, **self.hashes)
        self.saved_at = self.step
        where = path.relative_to(self.run_dir).as_posix()
        self.log(
            {"kind": "checkpoint", "step": self.step, "path": where, "best": self.is_best(), "timing": self.clock()}
        )

    def step_line(self, loss: float, update: Update) -> Line:
        clip = self.config.optimizer.grad_clip
        per_step = self.seconds_training / self.steps_timed
        self.seconds_training, self.steps_timed = 0.0, 0
        return {
            "kind": "step",
            "step": self.step,
            "loss": loss,
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

    def clock(self) -> dict[str, Any]:
        return {"elapsed_s": round(time.perf_counter() - self.started, 3)}


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def eval_line(step: int, score: evaluation.Score, is_best: bool) -> Line:
    return {"kind": "eval", "step": step, "split": "val", **score._asdict(), "best": is_best}


def make_order(config: RunConfig, n_tokens: int) -> Order:
    train = config.train
    epochs = train.epochs is not None
    return Order(n_tokens, config.model.block_size, train.batch_size, train.seed, epochs)


def evaluation_windows(config: RunConfig, val_tokens: int) -> int | None:
    """How many validation windows an evaluation during training takes; None: the whole split, where that is cheap.

    A forward pass costs a third of a training step's FLOPs.
    """
    affordable = 3 * EVALUATION_SHARE * config.train.max_steps * config.train.batch_size  # windows
    taken = max(32, int(affordable))
    return None if val_tokens - 1 <= taken * config.model.block_size else taken


def peak_memory_bytes() -> int | None:
    """The most memory this process has held; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    import sys

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
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        self.set()
