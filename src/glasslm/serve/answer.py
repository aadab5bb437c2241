"""An answer under way: the choices of one request, and the events that arrive for them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from glasslm.errors import InputError
from glasslm.inference.request import Event, Finished, PromptLogprobs, Token
from glasslm.serve.answers import Usage
from glasslm.serve.api_error import ApiError
from glasslm.serve.choice_text import ChoiceText, Delta, scored_prompt
from glasslm.serve.prompts import PreparedText
from glasslm.serve.served_model import LoadedModel

MAX_JOINED_EVENTS = 64  # in one write, which a slow client must take within Limits.write_s


class Answer:
    """The choices of one request. Events come from the model thread, Deltas go to the client.

    All methods are called in the event loop. Once `is_closed`, because the client is gone, an error
    came or all choices are finished, further events are dropped.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        texts: Sequence[PreparedText],
        *,
        with_logprobs: bool,
        max_waiting: int | None,
    ) -> None:
        """`max_waiting`: events that may wait for a slow client; None: any number."""
        self.loaded, self.texts = loaded, texts
        self.error: ApiError | None = None
        self.has_left = False
        self.n_generated = 0
        self.first_token_s: float | None = None  # from the request to its first token
        self._started_s = time.monotonic()
        self.total_prompt_tokens = sum(len(text.request.ids) for text in texts)
        self._tokenizer = loaded.model.tokenizer
        self._with_logprobs, self._max_waiting = with_logprobs, max_waiting
        self._choices = [
            ChoiceText(self._tokenizer, text.request.ids, len(text.echo.text), with_logprobs)
            for text in texts
        ]
        self.unfinished = set(range(len(texts)))  # indices of choices
        self._unopened = set(range(len(texts)))  # choices whose echo is not sent yet
        self._events: deque[tuple[int, Event]] = deque()
        self._wake = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        """Whether all choices are finished."""
        return not self.unfinished

    @property
    def is_closed(self) -> bool:
        """Whether no more events are wanted."""
        return self.has_left or self.error is not None or self.is_complete

    @property
    def prompt_tokens(self) -> int:
        """The tokens of the prompts, each counted once."""
        return sum(len(text.request.ids) for text in self.texts if text.request.sample == 0)

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(self.prompt_tokens, self.n_generated)

    def put(self, index: int, event: Event) -> None:
        """An event of the choice `index` has arrived."""
        self._events.append((index, event))
        if self._max_waiting is not None and len(self._events) > self._max_waiting:
            self.fail(ApiError(503, "the answer is read too slowly", code="slow_client"))
        self._wake.set()

    def leave(self) -> None:
        """The client is gone."""
        self.has_left = True
        self._events.clear()
        self._wake.set()

    def fail(self, error: ApiError) -> None:
        """End the answer with an error."""
        if not self.is_closed:
            self.error = error
            self._events.clear()
        self._wake.set()

    async def wake_every(self, seconds: float) -> None:
        """Wake `next_deltas` every `seconds`, even without new events, until it is cancelled."""
        while True:
            await asyncio.sleep(seconds)
            self._wake.set()

    async def next_deltas(self) -> dict[int, Delta]:
        """What the choices gain, by index; empty when it was woken, or the answer is closed.

        Events that arrived together are joined. Raises the ApiError with which the answer failed.
        """
        if not self._events and not self.is_closed:
            await self._wake.wait()
        self._wake.clear()
        deltas: dict[int, Delta] = {}
        for _ in range(min(len(self._events), MAX_JOINED_EVENTS)):
            index, event = self._events.popleft()
            deltas.setdefault(index, Delta()).extend(self._take(index, event))
            if self.error is not None:
                break
        if self.error is not None:
            raise self.error
        return deltas

    def _take(self, index: int, event: Event) -> Delta:
        """What one event adds to its choice."""
        prepared, choice = self.texts[index], self._choices[index]
        delta = Delta()
        if index in self._unopened:
            self._unopened.remove(index)
            delta.text = prepared.echo.text
        match event:
            case PromptLogprobs():
                delta.tokens = scored_prompt(prepared.request.ids, event, prepared.echo.offsets)
            case Token():
                self.n_generated += 1
                if self.first_token_s is None:
                    self.first_token_s = time.monotonic() - self._started_s
                delta.extend(choice.push(event))
            case Finished(reason="failed", error=error):
                self.fail(explain_failure(error))
            case Finished():
                self.unfinished.discard(index)
                delta.extend(choice.finish(event))
        return delta


def explain_failure(error: Exception | None) -> ApiError:
    """The error of a text whose generation failed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error), code="invalid_value")
    kind = type(error).__name__
    return ApiError(500, f"generating the text failed ({kind}): {error}", code="generation_failed")
