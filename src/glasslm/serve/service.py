"""What the endpoints use: the models by name, the answers under way, and their limits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from glasslm.inference.scheduler import SchedulerCounts
from glasslm.serve.answer import Answer
from glasslm.serve.api_error import SHUTTING_DOWN, ApiError
from glasslm.serve.limits import Limits
from glasslm.serve.metrics import ServerMetrics
from glasslm.serve.model_thread import Delivery, ModelThread
from glasslm.serve.prompts import PreparedText
from glasslm.serve.request_log import RequestLog
from glasslm.serve.served_model import LoadedModel, ModelSource

LOADING_RETRY_S = 2
FOLLOW_S = 2.0  # between two looks for a newer checkpoint
SECONDS_PER_TEXT = 0.05  # for the guess in Retry-After


class Service:
    """The models of a server and their thread. Made and used in the event loop."""

    def __init__(self, sources: Sequence[ModelSource], limits: Limits) -> None:
        self.sources = {source.name: source for source in sources}
        self.models: dict[str, LoadedModel] = {}
        self.limits = limits
        self.metrics, self.log = ServerMetrics(), RequestLog()
        self.answers: set[Answer] = set()
        self.is_stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = ModelThread(self._deliver_from_thread)
        self._reloads: dict[str, asyncio.Lock] = {name: asyncio.Lock() for name in self.sources}
        self._add_gauges()

    def _add_gauges(self) -> None:
        thread = self._thread

        def add(name: str, text: str, value: Callable[[SchedulerCounts], float]) -> None:
            self.metrics.add_gauge(name, text, lambda: sum(map(value, thread.counts)))

        add("running", "Texts in generation.", lambda of: of.running)
        add("queued", "Texts that wait.", lambda of: of.queued)
        self.metrics.add_gauge(
            "queue_age_seconds",
            "How long the oldest waiting text has waited.",
            lambda: max((of.oldest_wait_s for of in thread.counts), default=0.0),
        )

    @property
    def is_ready(self) -> bool:
        """Whether all models are loaded."""
        return len(self.models) == len(self.sources)

    async def load(self) -> None:
        """Load all models, one after the other. Raises the errors of load_model."""
        for name, source in self.sources.items():
            self.models[name] = await asyncio.to_thread(source.load)
        self._thread.start()

    async def reload(self, name: str) -> LoadedModel:
        """Take up the newest checkpoint, also of a run that was trained again in the same folder.

        Answers under way finish with the old weights.
        """
        async with self._reloads[name]:
            old, source = self.models[name], self.sources[name]
            if await asyncio.to_thread(source.newest_hash) in ("", old.hash):
                return old
            new = await asyncio.to_thread(source.load_newest)
            if not new.replaces(old):
                return old
            self.models[name] = new
            self._thread.retire(old)
            self.log.add(f"{name}: step {new.model.step:,} is served")
            return new

    async def follow(self) -> None:
        """Load each new checkpoint of every model, until it is cancelled."""
        tried = {name: loaded.hash for name, loaded in self.models.items()}
        while True:
            await asyncio.sleep(FOLLOW_S)
            for name, source in self.sources.items():
                try:
                    newest_hash = await asyncio.to_thread(source.newest_hash)
                    if newest_hash not in ("", tried[name]):
                        tried[name] = newest_hash
                        await self.reload(name)
                except Exception as error:  # the next checkpoint may be better
                    self.log.add(f"{name}: the newest checkpoint is not served: {error}")

    def find_model(self, name: str | None) -> LoadedModel:
        """The model that a request names; the only one if it names none."""
        if not self.is_ready:
            raise ApiError(503, "the models are being loaded", retry_after_s=LOADING_RETRY_S)
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise ApiError(
                400, f"model is missing: expected one of {', '.join(self.models)}", param="model",
                code="missing_parameter",
            )  # fmt: skip
        if name not in self.models:
            raise ApiError(
                404,
                f"there is no model '{name[:100]}': expected one of {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    def submit(
        self, loaded: LoadedModel, texts: list[PreparedText], *, with_logprobs: bool, stream: bool
    ) -> Answer:
        """Start an answer. Raises ApiError 429 where too many texts wait, 503 while stopping."""
        if self.is_stopping:
            raise stopping_error()
        n_texts = sum(len(answer.texts) for answer in self.answers)
        n_tokens = sum(answer.total_prompt_tokens for answer in self.answers)
        n_new_tokens = sum(len(text.request.ids) for text in texts)
        if (
            n_texts + len(texts) > self.limits.queued_texts
            or n_tokens + n_new_tokens > self.limits.queued_tokens
        ):
            raise ApiError(
                429,
                f"{n_texts:,} texts wait already: try again later",
                code="queue_full",
                retry_after_s=max(1, math.ceil(n_texts * SECONDS_PER_TEXT)),
            )
        answer = Answer(
            loaded, texts, with_logprobs=with_logprobs,
            max_waiting=self.limits.waiting_tokens if stream else None,
        )  # fmt: skip
        self.answers.add(answer)
        self._thread.submit(answer)
        return answer

    def close(self, answer: Answer) -> None:
        """End an answer, whether it is complete or not, and count its tokens."""
        self.answers.discard(answer)
        if not answer.is_complete:
            self._thread.drop(answer)
        if answer.has_left:
            self.metrics.cancelled.inc()
        if answer.first_token_s is not None:
            self.metrics.first_token_seconds.observe(answer.first_token_s)
        name = answer.loaded.name
        self.metrics.tokens.labels(name, "prompt").inc(answer.prompt_tokens)
        self.metrics.tokens.labels(name, "completion").inc(answer.n_generated)

    def stop(self) -> None:
        """Refuse new requests, and end the answers under way with an error."""
        self.is_stopping = True
        for answer in self.answers:
            answer.fail(stopping_error())

    async def close_thread(self) -> None:
        """End the model thread and write the rest of the log."""
        if self.is_ready:
            self._thread.stop()
            await asyncio.to_thread(self._thread.join, 1.0)
        await asyncio.to_thread(self.log.close)

    def _deliver_from_thread(self, delivery: Delivery) -> None:
        if delivery:
            self._loop.call_soon_threadsafe(_put_events, delivery)


def _put_events(delivery: Delivery) -> None:
    for answer, index, event in delivery:
        if not answer.is_closed:
            answer.put(index, event)


def stopping_error() -> ApiError:
    """The error of requests that the end of the server ends."""
    return ApiError(503, "the server stops", code=SHUTTING_DOWN, retry_after_s=5)
