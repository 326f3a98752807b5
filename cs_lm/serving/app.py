"""The web application: OpenAI's endpoints and the page, on Starlette."""

import asyncio
import contextlib
import functools
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cs_lm.serving.engine import Engine, EngineStoppedError, Event, Job, QueueFullError
from cs_lm.serving.playground import playground
from cs_lm.serving.requests import Asked, RequestError, parse_json, parse_request
from cs_lm.serving.responses import Answers, error_body, server_sent

_SHORT_BYTES = 1 << 14


@dataclass(frozen=True)
class Limits:
    """What one client may take.

    body_bytes  size of a request
    body_s      time to send it [s]
    request_s   time until its last token [s]
    """

    body_bytes: int = 1 << 20
    body_s: float = 10.0
    request_s: float = 300.0


def build_app(
    engines: Mapping[str, Engine],
    limits: Limits,
    api_key: str | None = None,
    hosts: Sequence[str] | None = None,
) -> Starlette:
    """The application. Its lifespan starts and stops the engines.

    engines  name of a model -> its engine
    api_key  what clients must send as a bearer token; None: nothing
    hosts    names that a request's Host header may have; None: any. On a loopback address it keeps
             web pages of other sites away, which could give their own name this address
    """
    endpoints = _Endpoints(engines, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for engine in engines.values():
            engine.start()
        yield
        for engine in engines.values():
            await asyncio.to_thread(engine.stop)

    def route(path: str, call, method: str, needs_key: bool = True) -> Route:
        async def endpoint(request: Request) -> Response:
            if hosts is not None and _host_of(request) not in hosts:
                raise RequestError(403, "the Host header names another server")
            if needs_key and api_key is not None and not _has_key(request, api_key):
                raise RequestError(401, "the API key is missing or wrong", None, "invalid_api_key")
            return await call(request)

        return Route(path, endpoint, methods=[method])

    return Starlette(
        routes=[
            route("/", endpoints.page, "GET", needs_key=False),
            route("/health", endpoints.health, "GET", needs_key=False),
            route("/v1/models", endpoints.models, "GET"),
            route("/v1/models/{name}", endpoints.model, "GET"),
            route("/v1/completions", endpoints.completions, "POST"),
            route("/v1/chat/completions", endpoints.chat, "POST"),
        ],
        exception_handlers={
            RequestError: _refused,
            HTTPException: _not_found,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
        lifespan=lifespan,
    )


def _host_of(request: Request) -> str:
    host = request.headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name.strip("[]").lower()


def _has_key(request: Request, api_key: str) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode("utf-8", "replace"), api_key.encode("utf-8"))


async def _refused(request: Request, error: RequestError) -> Response:
    body = error_body(error.status, str(error), error.field, error.code)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(body, error.status, headers)


async def _not_found(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(error.status_code, message), error.status_code)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, "the server failed"), 500)


class _Endpoints:
    def __init__(self, engines: Mapping[str, Engine], limits: Limits):
        self._engines, self._limits = engines, limits
        self._since = int(time.time())

    async def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(playground(list(self._engines), nonce), headers=headers)

    async def health(self, request: Request) -> Response:
        engines = self._engines.values()
        return JSONResponse(
            {
                "status": "ok",
                "active": sum(engine.num_active for engine in engines),
                "waiting": sum(engine.num_waiting for engine in engines),
            }
        )

    async def models(self, request: Request) -> Response:
        data = [self._described(name) for name in self._engines]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._engines:
            raise RequestError(404, f"model: got {name!r}, which is not served", "model")
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict:
        context = self._engines[name].model.config.context_length
        return {"id": name, "object": "model", "created": self._since, "owned_by": "cs_lm",
                "context_length": context}  # fmt: skip

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, is_chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, is_chat=True)

    async def _answer(self, request: Request, is_chat: bool) -> Response:
        body = await self._body(request)
        # the tokens of a long text are made beside the event loop, which others wait for
        parse = functools.partial(self._parsed, body, is_chat)
        asked = await asyncio.to_thread(parse) if len(body) > _SHORT_BYTES else parse()
        engine = self._engines[asked.model]
        job, events = self._submitted(asked, engine)
        answers = Answers(asked, engine.tokenizer.vocab)
        try:
            first = await _next_events(request, events)
            if asked.stream:
                stream = _stream(job, events, answers, first)
                return StreamingResponse(stream, media_type="text/event-stream", headers={
                    "Cache-Control": "no-store", "X-Accel-Buffering": "no"})  # fmt: skip
            answers.add(first)
            while not answers.done:
                answers.add(await _next_events(request, events))
        except BaseException:
            job.cancelled = True
            raise
        return JSONResponse(answers.whole())

    def _parsed(self, body: bytes, is_chat: bool) -> Asked:
        max_rows = max(engine.max_rows for engine in self._engines.values())
        return parse_request(parse_json(body), self._engines, is_chat, max_rows)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site cannot send it without asking
            raise RequestError(415, f"Content-Type: got {kind!r}, need application/json")
        most, parts, size = self._limits.body_bytes, [], 0
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise RequestError(413, f"the request has more than {most:,} bytes")
                    parts.append(part)
        except TimeoutError:
            message = f"the request did not arrive within {self._limits.body_s:g} s"
            raise RequestError(408, message) from None
        return b"".join(parts)

    def _submitted(self, asked: Asked, engine: Engine) -> tuple[Job, asyncio.Queue]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[list[Event]] = asyncio.Queue()

        def emit(new: list[Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, new)

        job = Job(asked.prompts, asked.config, emit, self._limits.request_s)
        try:
            engine.submit(job)
        except QueueFullError:
            raise RequestError(429, "too many requests wait; try again later") from None
        except EngineStoppedError:
            raise RequestError(503, "the server stops") from None
        return job, events


async def _next_events(request: Request, events: asyncio.Queue) -> list[Event]:
    """Raises: ClientDisconnect if the client goes away first, RequestError for an error event."""
    wanted = asyncio.ensure_future(events.get())
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise ClientDisconnect
        new = wanted.result()
    finally:
        wanted.cancel()
        gone.cancel()
    if error := _error_among(new):
        raise RequestError(error.status, error.text)
    return new


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_among(events: Sequence[Event]) -> Event | None:
    return next((event for event in events if event.finish_reason == "error"), None)


async def _stream(
    job: Job, events: asyncio.Queue, answers: Answers, first: list[Event]
) -> AsyncIterator[bytes]:
    """The parts of the stream. A client that goes away cancels it, which frees its rows."""
    try:
        yield answers.first_chunks() + answers.chunks(first)
        while not answers.done:
            new = await events.get()
            while not events.empty():  # a slow reader gets several tokens at once
                new = new + events.get_nowait()
            if error := _error_among(new):
                yield server_sent(error_body(error.status, error.text))
                return
            yield answers.chunks(new)
        yield answers.last_chunks()
    finally:
        job.cancelled = True
