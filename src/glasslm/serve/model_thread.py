"""The one thread that computes: it steps the schedulers of all models and returns their events."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from glasslm.engines.memory_estimate import PRECISION_BYTES, cache_bytes
from glasslm.inference.request import Event, Finished, Request, Usage
from glasslm.inference.scheduler import Scheduler, SchedulerCounts
from glasslm.inference.stream import Stream
from glasslm.inference.trained_model import Model
from glasslm.serve.answer import Answer
from glasslm.serve.served_model import LoadedModel

SLOTS = 32  # texts of one model that are generated together,
MAX_CACHE_BYTES = 2 << 30  # unless their KV cache would take more than this

Owner = tuple[Answer, int]  # an answer, and the index of one of its choices
Delivery = list[tuple[Answer, int, Event]]


@dataclass
class _RunningModel:
    """The scheduler of a model, and whose text each of its streams is: an answer's choice."""

    scheduler: Scheduler
    owners: dict[Stream, Owner] = field(default_factory=dict)

    def submit(self, owner: Owner, request: Request) -> None:
        """Add a text of an answer to the queue."""
        self.owners[self.scheduler.submit(request)] = owner

    def drop(self, answer: Answer) -> None:
        """End the texts of an answer."""
        for stream, (owner, _) in list(self.owners.items()):
            if owner is answer:
                del self.owners[stream]
                self.scheduler.cancel(stream)

    def step(self) -> Delivery:
        """The events of one step of the scheduler, with their owners."""
        delivery = []
        for stream, event in self.scheduler.step():
            owner = self.owners.get(stream)
            if owner is None:
                continue
            text = owner[0].texts[owner[1]]
            if isinstance(event, Finished):
                del self.owners[stream]
                if stream.request is text.scoring and event.reason != "failed":
                    self.submit(owner, text.request)
                    continue
            delivery.append((*owner, event))
        return delivery


def count_slots(model: Model) -> int:
    """The number of texts that are generated together, at least one."""
    config, width = model.config.model, PRECISION_BYTES[model.engine.precision]
    row_bytes = cache_bytes(config, 1, config.block_size, width, model.engine.name)
    return max(1, min(SLOTS, MAX_CACHE_BYTES // row_bytes))


class ModelThread:
    """Generates the texts of answers. `deliver` is called in the thread, with the events of a step.

    The methods are called from the event loop, and all but `join` return at once.
    """

    def __init__(self, deliver: Callable[[Delivery], None]) -> None:
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._models: dict[LoadedModel, _RunningModel] = {}
        self._is_stopped = False
        self.counts: list[SchedulerCounts] = []  # of each scheduler, after its last step
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, answer: Answer) -> None:
        """Generate the texts of an answer."""
        self._commands.put(partial(self._submit, answer))

    def drop(self, answer: Answer) -> None:
        """Generate no more for an answer."""
        self._commands.put(partial(self._drop, answer))

    def retire(self, loaded: LoadedModel) -> None:
        """Free the cache of a model as soon as its texts are finished: newer weights are served."""
        self._commands.put(partial(self._retire, loaded))

    def stop(self) -> None:
        """End the thread after the step under way."""
        self._commands.put(self._stop)

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread, at most `timeout_s`."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._is_stopped:
            self.counts = [running.scheduler.counts for running in self._models.values()]
            has_work = any(running.scheduler.has_work for running in self._models.values())
            while not self._is_stopped and (not has_work or not self._commands.empty()):
                self._commands.get()()
                has_work = True
            self._step_all()

    def _step_all(self) -> None:
        """Compute a step of each model that has work, and free retired models without work."""
        for loaded, running in list(self._models.items()):
            if running.scheduler.has_work:
                self._step(loaded, running)
            if loaded.is_retired and not running.scheduler.has_work:
                self._models.pop(loaded, None)

    def _step(self, loaded: LoadedModel, running: _RunningModel) -> None:
        try:
            delivery = running.step()
        except Exception as error:  # whatever it is, the next request must work
            del self._models[loaded]
            failed = Finished("failed", Usage(0, 0, 0), error=error)
            delivery = [(*owner, failed) for owner in running.owners.values()]
        self._deliver(delivery)

    def _submit(self, answer: Answer) -> None:
        loaded = answer.loaded
        try:
            if loaded not in self._models:
                self._models[loaded] = _RunningModel(
                    loaded.model.scheduler(slots=count_slots(loaded.model))
                )
            for index, text in enumerate(answer.texts):
                self._models[loaded].submit((answer, index), text.scoring or text.request)
        except Exception as error:  # of a grammar, or no memory for the cache
            self._drop(answer)
            self._deliver([(answer, 0, Finished("failed", Usage(0, 0, 0), error=error))])

    def _retire(self, loaded: LoadedModel) -> None:
        loaded.is_retired = True

    def _drop(self, answer: Answer) -> None:
        if answer.loaded in self._models:
            self._models[answer.loaded].drop(answer)

    def _stop(self) -> None:
        self._is_stopped = True
