"""The endpoints: each reads its request, asks the service and returns a response."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from glasslm.errors import GlasslmError
from glasslm.serve import metrics, schema
from glasslm.serve.answers import AsciiJSONResponse, ChatShape, CompletionShape, Head, Shape
from glasslm.serve.api_error import ApiError, wrong_value
from glasslm.serve.delivery import EventStream, send_whole
from glasslm.serve.prompts import PreparedText, prepare_chat, prepare_completion
from glasslm.serve.request_body import read_request
from glasslm.serve.served_model import LoadedModel
from glasslm.serve.service import LOADING_RETRY_S, Service

MAX_WARNING_CHARS = 500


class Endpoints:
    """The API over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        service = self._service
        parsed = await read_request(request, service.limits, schema.parse_completion)
        loaded = service.find_model(parsed.settings.model)
        texts = await asyncio.to_thread(prepare_completion, loaded, parsed, service.limits)
        shape = CompletionShape(loaded.names, parsed.settings.top_logprobs is not None)
        return await self._answer(request, loaded, texts, parsed.settings, shape)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        service = self._service
        parsed = await read_request(request, service.limits, schema.parse_chat)
        loaded = service.find_model(parsed.settings.model)
        texts = await asyncio.to_thread(prepare_chat, loaded, parsed, service.limits)
        shape = ChatShape(loaded.names, parsed.settings.top_logprobs is not None)
        return await self._answer(request, loaded, texts, parsed.settings, shape)

    async def _answer(
        self,
        request: Request,
        loaded: LoadedModel,
        texts: list[PreparedText],
        settings: schema.TextSettings,
        shape: Shape,
    ) -> Response:
        request.scope["warning"] = warning_header(settings.unknown)
        head = Head(
            f"{shape.id_prefix}-{secrets.token_hex(12)}",
            int(time.time()),
            loaded.name,
            loaded.fingerprint,
        )
        answer = self._service.submit(
            loaded,
            texts,
            with_logprobs=settings.top_logprobs is not None,
            stream=settings.stream,
        )
        if settings.stream:
            usage = settings.include_usage
            return EventStream(request, self._service, answer, shape, head, usage)
        return await send_whole(request, self._service, answer, shape, head)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the ids of a text, and the text and bytes of each."""
        parsed = await read_request(request, self._service.limits, schema.parse_tokenize)
        loaded = self._service.find_model(parsed.model)
        try:
            array = await asyncio.to_thread(loaded.model.tokenizer.encode, parsed.text)
        except GlasslmError as error:
            raise ApiError(400, str(error), param="text", code="invalid_value") from None
        ids, names = array.tolist(), loaded.names
        pieces = [{"text": names.name(i), "bytes": list(names.bytes[i])} for i in ids]
        return AsciiJSONResponse(
            {"ids": ids, "pieces": pieces}, headers=warning_header(parsed.unknown)
        )

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of ids."""
        parsed = await read_request(request, self._service.limits, schema.parse_detokenize)
        loaded = self._service.find_model(parsed.model)
        tokenizer = loaded.model.tokenizer
        outside = next((i for i in parsed.ids if i >= tokenizer.vocab_size), None)
        if outside is not None:
            raise wrong_value("ids", outside, f"token ids below {tokenizer.vocab_size:,}")
        text = await asyncio.to_thread(tokenizer.decode, parsed.ids)
        return AsciiJSONResponse({"text": text}, headers=warning_header(parsed.unknown))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        loaded = list(self._service.models.values())
        return AsciiJSONResponse(
            {"object": "list", "data": [model.description for model in loaded]}
        )

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return AsciiJSONResponse(self._service.find_model(request.path_params["name"]).description)

    async def reload(self, request: Request) -> Response:
        """POST /v1/models/NAME/reload: take up the newest checkpoint."""
        name = self._service.find_model(request.path_params["name"]).name
        try:
            loaded = await self._service.reload(name)
        except (GlasslmError, OSError) as error:
            raise ApiError(503, f"the newest checkpoint is not served: {error}") from None
        return AsciiJSONResponse(loaded.description)

    async def health(self, request: Request) -> Response:
        """GET /health: 200 once requests are answered, 503 before and while the server stops."""
        if self._service.is_stopping:
            return AsciiJSONResponse({"status": "stopping"}, 503)
        if not self._service.is_ready:
            retry = {"Retry-After": str(LOADING_RETRY_S)}
            return AsciiJSONResponse({"status": "loading"}, 503, headers=retry)
        return AsciiJSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(self._service.metrics.text(), media_type=metrics.CONTENT_TYPE)


def warning_header(unknown: Sequence[str]) -> dict[str, str]:
    """The header that names the fields that are ignored."""
    if not unknown:
        return {}
    names = json.dumps(", ".join(unknown))[1:-1]  # in ASCII, without control characters
    return {"Warning": f'299 glasslm "ignored: {names[:MAX_WARNING_CHARS]}"'}
