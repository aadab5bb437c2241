"""The loop: text in batches, loss, gradients, update, and what is written down on the way.

It asks nothing about the engine but its verbs. Step n means n batches consumed. Everything the next step depends on is
a function of the step, the weights and the moments, so a run goes on from a checkpoint as if it had never stopped.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np

from glasslm import files
from glasslm.config.schema import RunConfig
from glasslm.data.batch_sampler import Order, Shard
from glasslm.data.shards import Dataset
from glasslm.engines.protocol import Batch, Engine, Losses, Update
from glasslm.errors import DamagedError
from glasslm.inference import evaluation, generation
from glasslm.inference.sampling import Sampling
from glasslm.runs import checkpoint
from glasslm.runs.checkpoint import Best, Progress
from glasslm.runs.metrics import Line, Log
from glasslm.runs.run_folder import Run
from glasslm.training import guard
from glasslm.training.display import Display
from glasslm.training.guard import Guard, Limits
from glasslm.training.interruption import Interrupt, interruptible
from glasslm.training.learning_rate import lr_at

SKIP = -1.0  # no norm is below it
EVALUATION_SHARE = 0.02  # of a run's FLOPs, for one pass over the validation split
SPIKES, MOST_SPIKES = (
    "spikes",
    100,
)  # the folder of their batches, and how many of these are written down
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
        self.patience_used: int = memory.get("patience_used", 0)  # evaluations since the best
        self.evaluated_at: int = memory.get("evaluated_at", -1)
        self.sampled_at: int = memory.get("sampled_at", -1)
        self.measured: bool = memory.get("measured", False)  # on the whole split, at the end
        self.guard = Guard(self.config, dataset.tokenizer.vocab_size, memory.get("guard"))
        self.safe_at: int = memory.get(
            "safe_at", self.step
        )  # the last planned checkpoint, to roll back to
        self.saved_at = self.step if progress else -1
        self.signal: int | None = None  # that interrupted the run
        self.started = time.perf_counter()
        self.seconds_training, self.steps_timed = 0.0, 0  # since the last logged step

    def run(self, stop_at: int | None = None) -> str:
        """Train to the end, to a signal, or to the step `stop_at`; the status for the last line.

        That is finished, stopped (by stop_at_loss or patience) or interrupted: something is left for a resumed run.
        """
        with interruptible() as interrupted:
            if self.evaluated_at < 0:  # a new run
                self.evaluate()
                if self.config.train.sample_interval:
                    self.sample()
                self.save()
            while not (self.is_over() or interrupted.is_set() or self.step == stop_at):
                self.do_step()
            if not self.is_over():
                self.save(planned=False)
            elif self.finish(interrupted):
                return "finished" if self.step == self.max_steps else "stopped"
            self.signal = interrupted.received
            return "interrupted"

    def do_step(self) -> None:
        """One step and all that is due after it."""
        train = self.config.train
        began = time.perf_counter()
        batch, losses, update, limits = self.advance()
        self.seconds_training += time.perf_counter() - began
        self.steps_timed += 1
        if due(self.step, train.log_interval) or self.step == self.max_steps or not update.applied:
            self.log(self.step_line(losses, update))
        self.judge(batch, losses, update, limits)
        if due(self.step, train.eval_interval):
            self.evaluate()
        if due(self.step, train.sample_interval):
            self.sample()
        # After all else that this step writes, so that a resumed run repeats none of it and misses none. `finish` saves
        # the last one, when it has evaluated.
        if (due(self.step, train.checkpoint_interval) or self.is_best()) and not self.is_over():
            self.save()
        self.display.tick(self.step)

    def advance(self) -> tuple[Batch, Losses, Update, Limits]:
        """One step: a batch through the engine. What is not finite never reaches the weights; a spike may."""
        rows = np.arange(self.config.train.batch_size)
        tokens, targets = self.order.batch(self.dataset.train.tokens, self.step, rows)
        largest, known = int(targets.max()), self.dataset.tokenizer.vocab_size
        if (
            largest >= known
        ):  # an index into the embedding that would end in a traceback, or on a GPU in worse
            raise DamagedError(
                f"the batch of step {self.step + 1} holds token {largest}, of {known}: the tokens in the cache were "
                "altered while the run went on. Go on with `glasslm resume`, which makes them again"
            )
        batch = Batch(tokens, targets, self.step, rows)
        limits = self.guard.limits
        losses = self.engine.accumulate(batch, 1 / targets.size)
        allowed = guard.NO_LIMITS if self.config.train.on_spike == "log" else limits
        hold = not math.isfinite(losses.cross_entropy) or losses.cross_entropy > allowed.loss
        rate = lr_at(self.step, self.config.optimizer, self.max_steps)
        update = self.engine.update(rate, SKIP if hold else allowed.norm)
        self.step += 1
        self.tokens += targets.size
        return batch, losses, update, limits

    def judge(self, batch: Batch, losses: Losses, update: Update, limits: Limits) -> None:
        """What the numbers of a step say about the run, and what follows."""
        verdict = self.guard.judge(self.step, losses.cross_entropy, update, limits)
        if verdict == "nonfinite" and self.guard.nonfinite == 1:
            self.warn("nonfinite", self.guard.nonfinite_text(self.engine, batch))
        if verdict == "spike":
            self.spike(batch, losses.cross_entropy, update.norm, limits)

    def spike(self, batch: Batch, loss: float, norm: float, limits: Limits) -> None:
        """Noted, with its batch; and if that is wished the weights are those of the last planned checkpoint."""
        action = self.config.train.on_spike
        done = {
            "log": "",
            "skip": ": it was skipped",
            "rollback": f": back to the weights of step {self.safe_at}",
        }
        self.warn("spike", guard.spike_text(self.step, loss, norm, limits, done[action]))
        path = self.run_dir / SPIKES / f"{self.step:06d}.json"
        if len(list(path.parent.glob("*.json"))) < MOST_SPIKES:
            files.make_folder(path.parent)
            texts = [self.dataset.tokenizer.decode(row) for row in batch.tokens]
            record = {
                "step": self.step,
                "loss": loss,
                "grad_norm": norm,
                "limits": limits._asdict(),
                "action": action,
            }
            files.write_json(path, record | {"tokens": batch.tokens.tolist(), "texts": texts})
        if action == "rollback":
            held = checkpoint.load(self.run_dir, self.safe_at)
            self.engine.load(held.state(), held.progress.updates, held.progress.loss_scale)

    def evaluate(self) -> None:
        """The validation loss now."""
        score = self.score(self.dataset.val.tokens, self.max_windows)
        is_best = math.isfinite(score.loss) and (self.best is None or score.loss < self.best.loss)
        self.log(self.eval_line(self.step, score, is_best))
        if self.old_text is not None:
            windows = evaluation_windows(self.config, len(self.old_text))
            self.log(
                self.eval_line(
                    self.step, self.score(self.old_text, windows), is_best=False, split="old"
                )
            )
        self.evaluated_at = self.step
        if is_best:
            self.best, self.patience_used = Best(self.step, score.loss), 0
        else:
            self.patience_used += 1
        last = self.step == self.max_steps
        if warning := self.guard.evaluated(
            self.step, score.loss, self.best, self.patience_used, last
        ):
            self.warn("overfit", warning)

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
        lines = [
            self.eval_line(self.step, self.score(self.dataset.val.tokens, None), is_best=False)
        ]
        best = checkpoint.load(self.run_dir, "best", lambda message: self.warn("damaged", message))
        if best.step != self.step:
            if interrupted.is_set():
                return None
            self.engine.load(best.weights().items())
            lines.append(
                self.eval_line(best.step, self.score(self.dataset.val.tokens, None), is_best=False)
            )
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

    def save(self, again: bool = False, planned: bool = True) -> None:
        """A checkpoint of this step, unless there is one and it need not be written again.

        One that is not planned is an interruption's: a run without would not have it, so nothing rolls back to it.
        """
        if self.saved_at == self.step and not again:
            return
        if planned:
            self.safe_at = self.step
        progress = Progress(
            step=self.step,
            updates=self.engine.updates,
            loss_scale=self.engine.loss_scale,
            tokens=self.tokens,
            metrics_bytes=self.metrics.bytes,
            best=self.best,
            loop={
                "patience_used": self.patience_used,
                "evaluated_at": self.evaluated_at,
                "sampled_at": self.sampled_at,
                "measured": self.measured,
                "guard": self.guard.memory,
                "safe_at": self.safe_at,
            },
        )
        keep = self.config.train.keep
        path = checkpoint.save(
            self.run_dir, self.engine, progress, keep=keep, spare=self.safe_at, **self.hashes
        )
        self.saved_at = self.step
        where = path.relative_to(self.run_dir).as_posix()
        self.log(
            {
                "kind": "checkpoint",
                "step": self.step,
                "path": where,
                "best": self.is_best(),
                "timing": self.clock(),
            }
        )

    def step_line(self, losses: Losses, update: Update) -> Line:
        clip = self.config.optimizer.grad_clip
        per_step = self.seconds_training / self.steps_timed
        self.seconds_training, self.steps_timed = 0.0, 0
        further: Line = {} if update.applied else {"skipped": True}
        if losses.auxiliary:
            further["auxiliary"] = losses.auxiliary
        if losses.experts is not None:  # the share of the choices that each layer's experts got
            further["experts"] = (
                (losses.experts / losses.experts.sum(-1, keepdims=True)).round(4).tolist()
            )
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
                "tokens_per_s": self.config.train.batch_size
                * self.config.model.block_size
                / per_step,
                "remaining_s": per_step * (self.max_steps - self.step),
                "memory_bytes": peak_memory_bytes(),
            },
        }

    def eval_line(
        self, step: int, score: evaluation.Score, is_best: bool, split: str = "val"
    ) -> Line:
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
