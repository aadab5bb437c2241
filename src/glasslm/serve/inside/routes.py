"""The addresses under /inside: runs, texts, and the views of a checkpoint on a text."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from glasslm.errors import GlasslmError
from glasslm.inference.microscope.ngrams import ORDER, ngram_nats
from glasslm.inference.microscope.recorded_pass import RecordedPass
from glasslm.serve.answers import AsciiJSONResponse, compact_json
from glasslm.serve.api_error import ApiError, wrong_value
from glasslm.serve.fields import Fields, as_integer
from glasslm.serve.inside.binary import encode_arrays, finite_json
from glasslm.serve.inside.checkpoints import CheckpointStore, InsideModel
from glasslm.serve.inside.query import Query
from glasslm.serve.inside.runs import InsideRun
from glasslm.serve.inside.several import answer_several
from glasslm.serve.inside.subject import Subject
from glasslm.serve.inside.texts import InsideText, TextStore, make_text
from glasslm.serve.inside.views import VIEWS
from glasslm.serve.inside.worker import Check, Worker
from glasslm.serve.limits import Limits
from glasslm.serve.request_body import read_request
from glasslm.serve.service import Service

# A view is a pure function of checkpoint, text and query, but not of the version of glasslm.
ID_ARRAYS = ("ids", "top_ids")  # of all views
VIEW_CACHE = "private, max-age=600"


class Answer(NamedTuple):
    """The arrays and facts of a view; `reason` is the fact of one that cannot be computed."""

    arrays: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]


class Inside:
    """The data of the microscope page over the runs of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = CheckpointStore(list(service.sources.values()))
        self._runs = {name: InsideRun(source) for name, source in service.sources.items()}
        self._texts, self._worker = TextStore(), Worker()
        self._slow_worker = Worker()  # for what belongs to a run and takes seconds the first time

    async def runs(self, request: Request) -> Response:
        """GET /inside/runs: the served runs; 304 where nothing has changed."""
        content = await asyncio.to_thread(self._describe_runs)
        body = compact_json(finite_json(content)).encode()
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {"ETag": etag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type="application/json", headers=headers)

    def _describe_runs(self) -> dict[str, Any]:
        runs: list[dict[str, Any]] = []
        for name, run in self._runs.items():
            try:
                runs.append(run.content(self._store))
            except (GlasslmError, OSError) as error:
                runs.append({"name": name, "error": str(error)})
        return {"runs": runs}

    async def texts(self, request: Request) -> Response:
        """POST /inside/texts: the tokens of a text, under a name for the views."""
        parsed = await read_request(request, self._service.limits, parse_text_request)
        loaded = self._service.find_model(parsed.run)
        ids = parsed.ids
        if ids is None:
            try:
                array = await asyncio.to_thread(loaded.model.tokenizer.encode, parsed.text)
            except GlasslmError as error:
                raise ApiError(400, str(error), param="text", code="invalid_value") from None
            ids = array.tolist()
        text = make_text(loaded.model, ids)
        self._texts.add(text)
        special = frozenset(loaded.model.tokenizer.special_tokens.values())
        return AsciiJSONResponse(text.content(loaded.names, special))

    async def view(self, request: Request) -> Response:
        """GET /inside/VIEW/CHECKPOINT/TEXT: the arrays of a view."""
        name = request.path_params["view"]
        if name not in VIEWS:
            raise ApiError(
                404, f"there is no view '{name[:60]}': expected one of {', '.join(VIEWS)}",
                code="not_found",
            )  # fmt: skip
        text = self._texts.find(request.path_params["text"])
        query = Query(request.query_params)
        checkpoint = request.path_params["checkpoint"]
        answer = await self._worker.compute(
            request, lambda check: self._compute(name, checkpoint, text, query, check)
        )
        return _binary_response(answer)

    async def ngram(self, request: Request) -> Response:
        """GET /inside/ngram/CHECKPOINT/TEXT: the surprise of n-grams of the training text.

        The first time they are counted, which takes seconds, so no other view waits for them.
        """
        text = self._texts.find(request.path_params["text"])
        checkpoint = self._store.find(request.path_params["checkpoint"])
        run = self._runs[checkpoint.source.name]
        return _binary_response(
            await self._slow_worker.compute(request, lambda check: compute_ngrams(run, text))
        )

    async def several(self, request: Request) -> Response:
        """POST /inside/several: the views at several addresses."""
        limits = self._service.limits
        return await answer_several(
            request, limits, lambda name: self.ngram if name == "ngram" else self.view
        )

    def _compute(
        self, name: str, checkpoint: str, text: InsideText, query: Query, check: Check
    ) -> Answer:
        """A view; what a model does not have is answered by its reason."""
        loaded = self._store.load(checkpoint)
        text.require_tokenizer(loaded.tokenizer_sha256)

        def find_other(text_id: str) -> RecordedPass:
            other = self._texts.find(text_id)
            other.require_tokenizer(loaded.tokenizer_sha256)
            return self._store.record(loaded, other)

        run = self._runs[loaded.name.source.name]
        subject = Subject(loaded, self._store.record(loaded, text), query, run, find_other, check)
        try:
            arrays, facts = VIEWS[name](subject)
        except GlasslmError as error:
            return Answer({}, {"reason": str(error)})
        return Answer(arrays, {"tokens": name_tokens(loaded, arrays), **facts})

    def stop(self) -> None:
        """End the threads that compute."""
        self._worker.stop()
        self._slow_worker.stop()


def _binary_response(answer: Answer) -> Response:
    # A reason may pass: a text that was missing can be put back.
    headers = {"Cache-Control": "no-store" if "reason" in answer.facts else VIEW_CACHE}
    body = encode_arrays(*answer)
    return Response(body, media_type="application/octet-stream", headers=headers)


def compute_ngrams(run: InsideRun, text: InsideText) -> Answer:
    """The view `ngram`; where the training text is missing, its reason."""
    text.require_tokenizer(run.tokenizer_sha256)
    try:
        nats = ngram_nats(run.ngram_counts, run.tokenizer, np.array(text.ids))
    except (GlasslmError, OSError) as error:
        return Answer({}, {"reason": str(error)})
    return Answer({"nats": nats.astype(np.float32)}, {"order": ORDER})


def name_tokens(loaded: InsideModel, arrays: Mapping[str, NDArray[Any]]) -> dict[int, str]:
    """The texts of the tokens in the arrays that hold ids."""
    ids = {int(i) for name in ID_ARRAYS if name in arrays for i in np.unique(arrays[name])}
    return {i: loaded.token_names.name(i) for i in sorted(ids)}


class TextRequest:
    """The fields of POST /inside/texts: a text, or the tokens of one."""

    def __init__(self, content: object, limits: Limits) -> None:
        fields = Fields(content)
        self.run = fields.text("run")
        self.text = fields.text("text") or ""
        self.ids = _read_ids(fields.get("ids"), limits)


def parse_text_request(content: object, limits: Limits) -> TextRequest:
    """The request in a JSON body. Raises ApiError for a wrong field."""
    return TextRequest(content, limits)


def _read_ids(value: object, limits: Limits) -> list[int] | None:
    if value is None:
        return None
    expected = f"a list of at most {limits.prompt_tokens:,} token ids"
    if not isinstance(value, list) or len(value) > limits.prompt_tokens:
        raise wrong_value("ids", value, expected)
    ids = [number for item in value if (number := as_integer(item)) is not None]
    if len(ids) < len(value):
        raise wrong_value("ids", value, expected)
    return ids


def inside_routes(inside: Inside) -> Sequence[BaseRoute]:
    """The routes of the microscope page's data."""
    return [
        Route("/inside/runs", inside.runs, methods=["GET"]),
        Route("/inside/texts", inside.texts, methods=["POST"]),
        Route("/inside/several", inside.several, methods=["POST"]),
        Route("/inside/ngram/{checkpoint}/{text}", inside.ngram, methods=["GET"]),
        Route("/inside/{view}/{checkpoint}/{text}", inside.view, methods=["GET"]),
    ]
