"""Which address answers what."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sheepop import __version__
from sheepop.generation.request import Request
from sheepop.serving.choice import Piece
from sheepop.serving.errors import INTERNAL, TOO_MANY, UNAVAILABLE, ApiError
from sheepop.serving.metrics import Metrics
from sheepop.serving.protocol import (
    Body,
    BodyType,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse,
)
from sheepop.serving.responses import ChatAnswer, ChatCompletion, Completion, CompletionAnswer, token_name
from sheepop.serving.scheduler import Job, Scheduler
from sheepop.serving.served_model import ServedModel
from sheepop.utils.errors import CheckpointError, SheepopError

LARGEST_BODY = 2**22  # bytes
OPEN_PATHS = ("/", "/health")  # without a key
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nothing on the way shall keep tokens back
# The page has all that it needs in itself, and speaks with this server alone.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"description": "an error in OpenAI's shape"}}


class Gate:
    """Asks for the key, and counts requests by address and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, api_key: str | None) -> None:
        self._app, self._metrics, self._api_key = app, metrics, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                address = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(address, message["status"]).inc()
            await send(message)

        if self._lets_in(scope):
            await self._app(scope, receive, count)
        else:
            error = ApiError("This server asks for a key: send it as 'Authorization: Bearer KEY'.", status=401)
            await _refusal(error, {"WWW-Authenticate": "Bearer"})(scope, receive, count)

    def _lets_in(self, scope: Scope) -> bool:
        if self._api_key is None or scope["path"] in OPEN_PATHS:
            return True
        given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
        return secrets.compare_digest(given.encode(), self._api_key.encode())


def create_app(served: ServedModel, scheduler: Scheduler, metrics: Metrics, *, api_key: str | None = None) -> FastAPI:
    """Return the application that answers for one model.

    Args:
        served: the model.
        scheduler: is started.
        metrics: counts requests here, and tells `/metrics`.
        api_key: what clients have to send as `Authorization: Bearer KEY`; None lets all in.
    """
    # FastAPI's own pages about an API load scripts from the network.
    app = FastAPI(title="sheepop", version=__version__, docs_url=None, redoc_url=None)
    page = resources.files("sheepop.serving").joinpath("web", "index.html").read_text(encoding="utf-8")

    app.add_middleware(Gate, metrics=metrics, api_key=api_key)

    @app.exception_handler(SheepopError)
    async def refuse(_: HttpRequest, error: SheepopError) -> Response:
        if isinstance(error, ApiError):
            return _refusal(error)
        return _refusal(ApiError(str(error), status=INTERNAL if isinstance(error, CheckpointError) else 400))

    @app.exception_handler(HTTPException)
    async def refuse_by_http(request: HttpRequest, error: HTTPException) -> Response:
        what = {
            404: f"There is nothing at {request.url.path}. GET /openapi.json lists what there is.",
            405: f"{request.url.path} does not take {request.method}. GET /openapi.json lists what there is.",
        }.get(error.status_code, str(error.detail))
        return _refusal(ApiError(what, status=error.status_code), error.headers)

    @app.exception_handler(Exception)
    async def confess(_: HttpRequest, error: Exception) -> Response:
        return _refusal(ApiError(f"A defect of the server: {type(error).__name__}. Its log has more.", status=INTERNAL))

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        """Say whether requests are taken on: 200, or 503 while the server ends."""
        if scheduler.is_draining:
            return JSONResponse({"status": "shutting down"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def tell_metrics() -> Response:
        """Tell counts and times in Prometheus' text format."""
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        """List the one model there is."""
        return JSONResponse({"object": "list", "data": [_describe(served)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Describe it."""
        served.check_name(name)
        return JSONResponse(_describe(served))

    @app.post("/tokenize", openapi_extra=_takes(TokenizeBody), responses=ERRORS)
    async def tokenize(request: HttpRequest) -> Response:
        """Return the tokens of a text."""
        body = await _body_of(request, TokenizeBody, served)
        token_ids = await run_in_threadpool(served.prompt_tokens, body.prompt)
        if not body.add_special_tokens:
            token_ids = token_ids[len(served.tokenizer.start_ids) :]
        return JSONResponse(
            {
                "count": len(token_ids),
                "max_model_len": served.engine.max_seq_len,
                "tokens": token_ids,
                "token_strs": [token_name(served.tokenizer, token_id) for token_id in token_ids],
            }
        )

    @app.post("/detokenize", openapi_extra=_takes(DetokenizeBody), responses=ERRORS)
    async def detokenize(request: HttpRequest) -> Response:
        """Return the text of tokens."""
        body = await _body_of(request, DetokenizeBody, served)
        served.check_tokens(body.tokens, "tokens")
        known = [token_id for token_id in body.tokens if token_id < served.tokenizer.vocab_size]
        return JSONResponse({"prompt": served.tokenizer.decode(known)})

    @app.post("/v1/completions", openapi_extra=_takes(CompletionBody), responses=ERRORS | {200: {"model": Completion}})
    async def complete(request: HttpRequest) -> Response:
        """Continue texts."""
        body = await _body_of(request, CompletionBody, served)
        requests = await run_in_threadpool(served.completion_requests, body)
        answer = CompletionAnswer(served.name, served.tokenizer, requests, body)
        return await _answer(request, scheduler, requests, body, answer)

    @app.post(
        "/v1/chat/completions", openapi_extra=_takes(ChatBody), responses=ERRORS | {200: {"model": ChatCompletion}}
    )
    async def chat(request: HttpRequest) -> Response:
        """Answer a conversation."""
        body = await _body_of(request, ChatBody, served)
        requests = await run_in_threadpool(served.chat_requests, body)
        answer = ChatAnswer(served.name, served.tokenizer, requests, body)
        return await _answer(request, scheduler, requests, body, answer)

    return app


def _describe(served: ServedModel) -> dict[str, object]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "sheepop",
        "max_model_len": served.engine.max_seq_len,
        "max_new_tokens": served.max_new_tokens,
        "vocab_size": served.engine.model.config.vocab_size,
        "has_chat_template": served.chat_template is not None,
    }


def _takes(kind: type[Body]) -> dict[str, Any]:
    """Return what the schema says of a body, which is read by `parse`, whose errors say more than FastAPI's."""
    schema = kind.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema, schema)}}}}


def _inlined(schema: Any, whole: dict[str, Any]) -> Any:
    """Put definitions where they are referred to: a schema in the middle of another cannot refer to its own."""
    if isinstance(schema, list):
        return [_inlined(each, whole) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    return {key: _inlined(each, whole) for key, each in schema.items() if key != "$defs"}


async def _body_of(request: HttpRequest, kind: type[BodyType], served: ServedModel) -> BodyType:
    """Read a body.

    A page of another site can let a browser send forms and plain text here, but not JSON; so nothing else is taken.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            "The body must be JSON, and say so: send the header 'Content-Type: application/json'.", status=415
        )
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LARGEST_BODY:
            raise ApiError(f"The body is larger than {LARGEST_BODY} bytes. Send a shorter prompt.", status=413)
    body = parse(kind, bytes(content))
    served.check_name(body.model)
    return body


async def _answer(
    request: HttpRequest,
    scheduler: Scheduler,
    requests: Sequence[Request],
    body: CompletionBody | ChatBody,
    answer: CompletionAnswer | ChatAnswer,
) -> Response:
    """Have requests computed, and answer with their parts as they come, or with all of them at once.

    An answer begins with the first part, so that what fails before it fails with its status.
    """
    job = scheduler.submit(requests, body.stop_strings)
    watcher = asyncio.create_task(_cancel_when_gone(request, scheduler, job))
    coming = job.pieces()
    try:
        pieces = await anext(coming)
        if body.stream:
            events = _events(coming, pieces, watcher, scheduler, job, answer, includes_usage=body.includes_usage)
            return EventSourceResponse(events, headers=STREAM_HEADERS)
        async for more in coming:
            pieces += more
    except BaseException:
        _let_go(watcher, scheduler, job)
        raise
    _let_go(watcher, scheduler, job)
    return JSONResponse(answer.whole(pieces).model_dump())


async def _events(
    coming: AsyncIterator[list[Piece]],
    pieces: list[Piece],
    watcher: asyncio.Task[None],
    scheduler: Scheduler,
    job: Job,
    answer: CompletionAnswer | ChatAnswer,
    *,
    includes_usage: bool,
) -> AsyncIterator[bytes]:
    """Yield an answer as server-sent events; the last says that it is the last, or what went wrong."""
    try:
        for part in answer.beginning():
            yield format_sse_event(data_str=part.model_dump_json())
        yield format_sse_event(data_str=answer.part(pieces).model_dump_json())
        async for pieces in coming:
            yield format_sse_event(data_str=answer.part(pieces).model_dump_json())
        for part in answer.end(includes_usage=includes_usage):
            yield format_sse_event(data_str=part.model_dump_json())
        yield format_sse_event(data_str="[DONE]")
    except ApiError as error:
        yield format_sse_event(data_str=json.dumps(error.body()))
    finally:
        _let_go(watcher, scheduler, job)


async def _cancel_when_gone(request: HttpRequest, scheduler: Scheduler, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scheduler.cancel(job)


def _let_go(watcher: asyncio.Task[None], scheduler: Scheduler, job: Job) -> None:
    watcher.cancel()
    scheduler.cancel(job)


def _refusal(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    again = {"Retry-After": "1"} if error.status in (TOO_MANY, UNAVAILABLE) else {}
    return JSONResponse(error.body(), status_code=error.status, headers={**again, **(headers or {})})
