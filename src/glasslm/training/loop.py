"""The training loop: batch, loss, gradients, update, and what is written on the way.

The loop uses only the methods of an engine. Step n means n batches consumed. Everything the next
step depends on is a function of the step, the weights and the moments, so a resumed run continues
as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

from glasslm.data.batch_sampler import make_sampler
from glasslm.data.dataset import Dataset, Split
from glasslm.engines.protocol import Batch, Engine, Losses, Update
from glasslm.inference import evaluation
from glasslm.inference.evaluation import split_windows
from glasslm.inference.exact_answers import score_windows
from glasslm.runs import checkpoint
from glasslm.runs.checkpoint import Best, TrainingPosition
from glasslm.runs.metrics import Line, MetricsLog, Status, StepLine, Timing
from glasslm.runs.run_folder import Run
from glasslm.training import evaluation_windows as windows
from glasslm.training import guard
from glasslm.training.display import Display
from glasslm.training.eval_line import NO_MEASURES, eval_line
from glasslm.training.final_measurement import TOO_SLOW, load_checkpoint, score_last_and_best
from glasslm.training.guard import Guard, Limits
from glasslm.training.interruption import Interruption, SignalEvent, catch_signals
from glasslm.training.learning_rate import lr_at
from glasslm.training.long_call import EngineCalls
from glasslm.training.loop_state import LoopState
from glasslm.training.memory import peak_memory_bytes
from glasslm.training.preference.opening import open_objective
from glasslm.training.preference.warning_signs import PreferenceMonitor
from glasslm.training.run_files import RunFiles
from glasslm.training.sample_line import first_question, sample_line
from glasslm.training.spikes import record_spike
from glasslm.training.step_line import step_line
from glasslm.training.time_limit import TimeLimit, no_limit
from glasslm.training.training_batch import count_targets, require_known_tokens, training_batch

SKIP_ALL = -1.0  # every gradient norm is above it
EVALUATION_BATCH = 16  # micro-batches that one call of Engine.losses gets


class Loop:
    """A run in training, whose lines go to `metrics` and to `display`."""

    def __init__(
        self,
        run: Run,
        engine: Engine,
        dataset: Dataset,
        metrics: MetricsLog,
        display: Display,
        position: TrainingPosition | None = None,
        old_text: Split | None = None,
        limit: TimeLimit | None = None,
    ) -> None:
        """`old_text`: the validation split of the base run, to measure forgetting."""
        self.limit = limit or no_limit()
        # Made once: packing conversations into rows and counting their answers takes long.
        self.val_windows = split_windows(dataset.val, run.config.model)
        self.old_windows = split_windows(old_text, run.config.model) if old_text else None
        self.engine, self.dataset, self.metrics, self.display = engine, dataset, metrics, display
        self.run_dir, self.config, self.identity = run.path, run.config, run.identity
        self.run_files = RunFiles(run, dataset, metrics)
        self.engine_calls = EngineCalls(engine, self.config, dataset.tokenizer.vocab_size)
        self.max_steps = self.config.train.max_steps
        self.sampler = make_sampler(self.config, dataset)
        n_tokens, n_final = len(dataset.val.tokens), run.record.get("final_windows")
        self.max_windows = windows.evaluation_windows(self.config, n_tokens)
        self.final_windows = windows.second_measurement_windows(self.config, n_tokens, n_final)
        # Of preference tuning; None: the text is learned.
        self.objective = open_objective(run, engine, dataset)
        self.measures = NO_MEASURES  # of the last step
        if self.objective:
            self.final_windows = None  # an evaluation takes all that is held out
        self.monitor = PreferenceMonitor(run.metrics() if position else ())
        self.step = position.step if position else 0
        self.tokens = self.tokens_logged = position.tokens if position else 0
        self.best = position.best if position else None
        state = LoopState.from_json(position.loop if position else {})
        self.patience_used, self.evaluated_at = state.patience_used, state.evaluated_at
        self.sampled_at, self.full_split_measured = state.sampled_at, state.full_split_measured
        self.guard = Guard(self.config, dataset.tokenizer.vocab_size, state.guard)
        self.rollback_step = self.step if state.rollback_step is None else state.rollback_step
        self.saved_at = self.step if position else -1
        self.interrupt = SignalEvent()  # `run` connects it with the signals
        self.signal: int | None = None  # the signal that interrupted the run
        self.started = time.perf_counter()
        self.seconds_training, self.steps_timed = 0.0, 0  # since the last logged step

    def run(self, stop_at: int | None = None) -> Status:
        """Train to the end, to a signal, or to step `stop_at`; returns the status of the run.

        The status is "finished", "stopped" (by stop_at_loss or patience), "time" (the time limit
        came before the last step) or "interrupted".
        """
        with catch_signals() as self.interrupt:
            try:
                self._measure_step()  # a new run, or one that a signal interrupted before this
                while not (self._is_over() or self.interrupt.is_set() or self.step == stop_at):
                    self.do_step()
                if self._is_over():
                    return self._finish()
            except Interruption:
                pass  # A resumed run makes the measurement.
            self.save(planned=False)
            self.signal = self.interrupt.received
            return "interrupted"

    def do_step(self) -> None:
        """Make one step and everything that is due after it."""
        train = self.config.train
        step_started = time.perf_counter()
        batch, losses, update, limits = self.advance()
        self.limit.record_step(step_s := time.perf_counter() - step_started)
        self.seconds_training += step_s
        self.steps_timed += 1
        is_last = self.step == self.max_steps
        if is_due(self.step, train.log_interval) or is_last or not update.applied:
            self.log(self._step_line(losses, update))
        self.judge_step(batch, losses, update, limits)
        self._measure_step()
        self.display.tick(self.step)

    def _measure_step(self) -> None:
        """Evaluate, sample and save where it is due at this step and not done yet."""
        train, is_new = self.config.train, self.evaluated_at < 0
        if (is_due(self.step, train.eval_interval) or is_new) and self.evaluated_at != self.step:
            self.limit.measure("evaluation", self.evaluate)
        if is_due(self.step, train.sample_interval) and self.sampled_at != self.step:
            self.limit.measure("sample", self.sample)
        # The checkpoint comes last, so that a resumed run repeats no line of this step and misses
        # none. `_finish` saves the last checkpoint, after its evaluation.
        is_planned = is_due(self.step, train.checkpoint_interval) or self._is_best() or is_new
        if is_planned and not self._is_over():
            self.limit.measure("checkpoint", self.save)

    def advance(self) -> tuple[Batch, Losses, Update, Limits]:
        """Send one batch through the engine.

        A non-finite loss or gradient never reaches the weights; a spike does unless --on-spike says
        otherwise.
        """
        batch, loss = self._next_batch()
        require_known_tokens(batch, self.dataset.tokenizer.vocab_size)
        limits = self.guard.limits
        n_tokens = batch.targets.size
        accumulate = partial(self.engine.accumulate, batch, 1 / count_targets(batch))
        losses = self.engine_calls.run(accumulate, n_tokens, self.interrupt.check)
        if loss is not None:
            losses = losses._replace(cross_entropy=loss)
        enforced_limits = guard.NO_LIMITS if self.config.train.on_spike == "log" else limits
        loss = losses.cross_entropy
        skip = not math.isfinite(loss) or loss > enforced_limits.loss
        rate = lr_at(self.step, self.config.optimizer, self.max_steps)
        update = self.engine.update(rate, SKIP_ALL if skip else enforced_limits.norm)
        self.step += 1
        self.tokens += n_tokens
        return batch, losses, update, limits

    def _next_batch(self) -> tuple[Batch, float | None]:
        """The next batch, and what it minimizes where that is not the cross-entropy."""
        if self.objective is None:
            return self.batch(self.step), None
        prepared = self.objective.prepare_step(self.step, self.interrupt.check)
        self.measures = prepared.measures
        return prepared.batch, prepared.loss

    def batch(self, step: int) -> Batch:
        """The training batch of a step, counted from 0."""
        rows = self.config.train.batch_size
        return training_batch(self.sampler, self.dataset.train.tokens, step, rows)

    def judge_step(self, batch: Batch, losses: Losses, update: Update, limits: Limits) -> None:
        """Let the guard judge the numbers of a step, and act on its verdict."""
        verdict = self.guard.judge_step(self.step, losses.cross_entropy, update, limits)
        if verdict == "nonfinite" and self.guard.nonfinite == 1:
            self.warn("nonfinite", self.guard.nonfinite_warning(self.engine, batch))
        if verdict == "spike":
            action = self.config.train.on_spike
            message = record_spike(
                self.run_dir, self.step, batch, self.dataset.tokenizer, losses.cross_entropy,
                update.norm, limits, action, self.rollback_step, can_replay=self.objective is None,
            )  # fmt: skip
            self.warn("spike", message)
            if action == "rollback":
                load_checkpoint(self.engine, self.run_dir, self.rollback_step)

    def evaluate(self) -> None:
        """Measure and log the validation loss."""
        self.run_files.require_unchanged()
        measures, old_score = NO_MEASURES, None
        if self.objective:
            score, measures = self.objective.evaluate(self.interrupt.check)
        else:
            score = self.score(self.val_windows, self.max_windows)
        if self.old_windows is not None:
            old_score = self.score(self.old_windows, windows.max_evaluation_windows(self.config))
        is_best = math.isfinite(score.loss) and (self.best is None or score.loss < self.best.loss)
        self.log(eval_line(self.step, score, is_best, "val", self._clock(), measures))
        if old_score is not None:
            self.log(eval_line(self.step, old_score, False, "old", self._clock()))
        self.evaluated_at, self.saved_at = self.step, -1
        if is_best:
            self.best, self.patience_used = Best(self.step, score.loss), 0
        else:
            self.patience_used += 1
        is_last = self.step == self.max_steps
        if warning := self.guard.record_evaluation(
            self.step, score.loss, self.best, self.patience_used, is_last
        ):
            self.warn("overfit", warning)
        for code, message in self.monitor.new_signs():
            self.warn(code, message)

    def _is_best(self) -> bool:
        """Whether the current step has the best validation loss."""
        return self.best is not None and self.best.step == self.step

    def _is_over(self) -> bool:
        """Whether all steps are done, or an evaluation or the time limit ended the run early."""
        return self._is_complete() or not self.limit.has_time_for_step()

    def _is_complete(self) -> bool:
        """Whether all steps are done or an evaluation ended the run early."""
        goal, patience = self.config.train.stop_at_loss, self.config.train.patience
        if self.step >= self.max_steps or self.full_split_measured:
            return True
        if goal is not None and self.best is not None and self.best.loss <= goal:
            return True
        return patience is not None and self.patience_used >= patience

    def _finish(self) -> Status:
        """Evaluate and save the last weights; measure them and the best ones on more windows."""
        status: Status = "finished" if self.step == self.max_steps else "stopped"
        if not self._is_complete():
            status = "time"
            self.warn("time", self.limit.describe_stop(self.step, self.max_steps))
        if self.evaluated_at != self.step:
            self.evaluate()
        if self.sampled_at != self.step and self.config.train.sample_interval:
            self.sample()
        self.save()
        if self.final_windows is not None and not self.full_split_measured:
            self._measure_again(self.limit.fit_windows(self.final_windows))
        return status

    def _measure_again(self, n_windows: int) -> None:
        """Measure the last and the best weights on equal windows, and choose the best ones.

        A time limit has reduced the windows; it ends a measurement that takes even longer.
        """
        score = partial(self.score, self.val_windows, n_windows, self.limit.require_time)
        scores: dict[int, evaluation.Score] = {}
        if n_windows > (self.max_windows or 0):
            scores = score_last_and_best(
                self.engine, self.run_dir, self.step, score, partial(self.warn, "damaged")
            )
        if not scores:
            self.warn("time", TOO_SLOW)
            return
        finite = {step: score.loss for step, score in scores.items() if math.isfinite(score.loss)}
        if finite:
            self.best = Best(*min(finite.items(), key=lambda pair: pair[1]))
        best_step = self.best.step if finite and self.best else None
        for step in sorted(scores, key=lambda step: step == best_step):
            self.log(eval_line(step, scores[step], step == best_step, "val", self._clock()))
        self.full_split_measured = True
        self.save(again=True)  # state.json names the best step of this measurement

    def score(
        self,
        measured: evaluation.Windows,
        max_windows: int | None,
        require_time: Callable[[], None] = lambda: None,
    ) -> evaluation.Score:
        """The loss over at most `max_windows` of the windows `measured`; None takes all."""

        def check_interrupt() -> None:
            self.interrupt.check()
            require_time()

        T, rows = self.config.model.block_size, self.engine.micro_batch_size * EVALUATION_BATCH
        train_tokens = self.dataset.train.tokens if measured is self.val_windows else None
        score = partial(
            score_windows, self.engine, measured, self.dataset.tokenizer.scored_bytes,
            train_tokens=train_tokens, rows=rows, max_windows=max_windows,
            check_interrupt=check_interrupt, notify=self.display.note,
        )  # fmt: skip
        # One of its batches takes a third of a training step, which has a backward pass.
        return self.engine_calls.run(score, rows * T / 3, self.interrupt.check)

    def sample(self) -> None:
        """Generate and log a text."""
        prompt = first_question(self.dataset)
        tokenizer, check_interrupt = self.dataset.tokenizer, self.interrupt.check
        line = sample_line(self.step, self.engine, tokenizer, self.config, check_interrupt, prompt)
        self.sampled_at, self.saved_at = self.step, -1
        self.log(line)

    def save(self, again: bool = False, planned: bool = True) -> None:
        """Write a checkpoint of this step, unless it exists already and `again` is false.

        An interruption's checkpoint is not planned: an uninterrupted run would not have it, so no
        roll-back uses it.
        """
        if self.saved_at == self.step and not again:
            return
        self.run_files.require_unchanged()
        if planned:
            self.rollback_step = self.step
        state = LoopState(
            patience_used=self.patience_used,
            evaluated_at=self.evaluated_at,
            sampled_at=self.sampled_at,
            full_split_measured=self.full_split_measured,
            guard=self.guard.state,
            rollback_step=self.rollback_step,
        )
        position = TrainingPosition(
            step=self.step,
            updates=self.engine.updates,
            loss_scale=self.engine.loss_scale,
            tokens=self.tokens,
            metrics_bytes=self.metrics.bytes,
            metrics_sha256=self.metrics.sha256,
            best=self.best,
            loop=state.to_json(),
        )
        path = checkpoint.save(
            self.run_dir,
            self.engine.state(),
            position,
            self.identity,
            keep=self.config.train.keep,
            protect_step=self.rollback_step,
        )
        self.saved_at = self.step
        self.log(
            {
                "kind": "checkpoint",
                "step": self.step,
                "path": path.relative_to(self.run_dir).as_posix(),
                "best": self._is_best(),
                "timing": self._clock(),
            }
        )

    def _step_line(self, losses: Losses, update: Update) -> StepLine:
        """The metrics line of the step just made; its speed is the mean since the line before."""
        line = step_line(
            self.step, losses, update, self.config.optimizer, self.max_steps, self.measures
        )
        line["tokens"] = self.tokens
        line["epoch"] = (self.objective or self.sampler).epoch(self.step)
        line["timing"] = {
            **self._clock(),
            "tokens_per_s": (self.tokens - self.tokens_logged) / self.seconds_training,
            "remaining_s": self.seconds_training / self.steps_timed * (self.max_steps - self.step),
            "memory_bytes": peak_memory_bytes(),
        }
        self.seconds_training, self.steps_timed, self.tokens_logged = 0.0, 0, self.tokens
        return line

    def log(self, line: Line) -> None:
        """Write a line to metrics.jsonl, then show it."""
        self.metrics.write(line)
        self.monitor.add(line)
        self.display.show(line)

    def warn(self, code: str, message: str) -> None:
        """Log a warning."""
        self.log({"kind": "warning", "step": self.step, "code": code, "message": message})

    def _clock(self) -> Timing:
        """Seconds since this part of the run started."""
        return {"elapsed_s": round(time.perf_counter() - self.started, 3)}


def is_due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens after this one."""
    return interval > 0 and step % interval == 0
