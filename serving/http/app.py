"""The routes. Imports no jax."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxinfer.openai.bodies import URLS, Kind
from serving import metrics
from serving.frontend import Frontend
from serving.http import answering, reading
from serving.http.encoding import encode
from serving.http.receiving import read_body, while_connected
from serving.settings import package_version
from serving.tracing import note_caller

_T = TypeVar("_T")

PAGE_PATHS = frozenset({"/", "/page.js"})
HEALTH_PATHS = frozenset({"/health"})


def make_app(frontend: Frontend, counts: metrics.Metrics) -> ASGIApp:
    """All routes, without the checks of Gate around them."""
    routes = [Route(url, _Generate(frontend, kind), methods=["POST"]) for url, kind in URLS.items()]
    routes += [Route(path, _page(name, media), methods=["GET"]) for path, name, media in _PAGE]
    endpoints = _Endpoints(frontend, counts)
    for method, path, endpoint in (
        ("GET", "/v1/models", endpoints.models),
        ("GET", "/v1/models/{model:path}", endpoints.model),
        ("POST", "/tokenize", endpoints.tokenize),
        ("POST", "/detokenize", endpoints.detokenize),
        ("GET", "/health", endpoints.health),
        ("GET", "/version", endpoints.version),
        ("GET", "/metrics", endpoints.metrics),
    ):
        routes.append(Route(path, endpoint, methods=[method]))
    return Router(routes, redirect_slashes=False)


class _Generate:
    """/v1/completions and /v1/chat/completions, as an ASGI app: it has to hear that the client left."""

    def __init__(self, frontend: Frontend, kind: Kind) -> None:
        self._frontend = frontend
        self._kind: Kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, frontend = Request(scope, receive), self._frontend
        note_caller(request.headers.items())
        with frontend.counting_refusals():
            request_id = reading.read_request_id(request)
            query = await _understood(
                frontend,
                request,
                lambda body: reading.read_query(self._kind, body, request_id, frontend.admission.max_requests),
            )
        answer = self._stream if query.is_streamed else self._whole
        await while_connected(receive, answer(query, scope, receive, send))

    async def _whole(self, query: reading.Query, scope: Scope, receive: Receive, send: Send) -> None:
        body = await answering.whole(self._frontend, query)
        headers = {"x-request-id": query.request_id}
        await Response(body, 200, headers, "application/json")(scope, receive, send)

    async def _stream(self, query: reading.Query, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"x-request-id", query.request_id.encode()),
            (b"x-accel-buffering", b"no"),  # proxies must not wait for more
        ]
        has_begun = False

        async def write(piece: bytes) -> None:
            nonlocal has_begun
            if not has_begun:  # until now a refusal was a status of its own
                has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": piece, "more_body": True})

        await answering.stream(self._frontend, query, write)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Endpoints:
    """What is answered at once."""

    def __init__(self, frontend: Frontend, counts: metrics.Metrics) -> None:
        self._frontend = frontend
        self._counts = counts
        self._started = int(time.time())

    async def models(self, request: Request) -> Response:
        self._frontend.check_model(None)
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._frontend.check_model(request.path_params["model"])
        return _json(self._card())

    async def tokenize(self, request: Request) -> Response:
        with self._frontend.counting_refusals():
            model, prompt, add_special_tokens = await _understood(self._frontend, request, reading.read_tokenize)
            self._frontend.check_model(model)
            token_ids = await self._frontend.token_ids(prompt, add_special_tokens)
        limit = self._frontend.facts.max_model_len
        return _json({"count": len(token_ids), "max_model_len": limit, "tokens": list(token_ids)})

    async def detokenize(self, request: Request) -> Response:
        with self._frontend.counting_refusals():
            model, token_ids, skip_special_tokens = await _understood(self._frontend, request, reading.read_detokenize)
            self._frontend.check_model(model)
            text = await self._frontend.text_of(token_ids, skip_special_tokens)
        return _json({"prompt": text})

    async def health(self, request: Request) -> Response:
        healthy = self._frontend.healthy
        return _json({"status": "serving" if healthy else "not serving"}, 200 if healthy else 503)

    async def version(self, request: Request) -> Response:
        return _json({"version": package_version()})

    async def metrics(self, request: Request) -> Response:
        return Response(self._counts.exposition(), headers={"content-type": metrics.CONTENT_TYPE})

    def _card(self) -> dict[str, Any]:
        facts = self._frontend.facts
        return {
            "id": facts.name,
            "object": "model",
            "created": self._started,
            "owned_by": "jaxinfer",
            "max_model_len": facts.max_model_len,
        }


async def _understood(frontend: Frontend, request: Request, read: Callable[[bytes], _T]) -> _T:
    """What `read` makes of the request's body; what is wrong with either is raised."""
    limits = frontend.limits
    body = await read_body(request, limits.max_message_bytes, limits.stall_seconds)
    frontend.check_model(None)
    return await frontend.understand(len(body), lambda: read(body))


_PAGE = (("/", "page.html", "text/html; charset=utf-8"), ("/page.js", "page.js", "text/javascript; charset=utf-8"))


def _page(name: str, media: str) -> Any:
    content = files("serving.http").joinpath("page", name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, headers={"content-type": media})

    return page


def _json(value: Mapping[str, Any], status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")
