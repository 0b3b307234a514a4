"""The web application: routes, and what they promise in /openapi.json."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer

from gptcli import __version__
from gptcli.generate import Engine
from gptcli.serve.answers import Answers
from gptcli.serve.errors import ModelNotFound, handle_errors
from gptcli.serve.gate import Gate
from gptcli.serve.schemas import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
)
from gptcli.serve.worker import Down, ModelThread, Worker

MAX_BODY = 1 << 20
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be answered as it is"},
    "5XX": {"model": ErrorResponse, "description": "The server cannot answer"},
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "Whole, or with stream"}
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    engine: Engine,
    name: str,
    *,
    thread: ModelThread | None = None,
    api_key: str | None = None,
    max_rows: int = 64,
    max_waiting: int = 256,
    timeout: float = 600.0,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """An ASGI app that serves one model, in the thread that has loaded it. Its worker lives from the app's startup to
    its shutdown."""
    worker = Worker(engine, thread or ModelThread(), max_rows, max_waiting)
    answers = Answers(worker, name, timeout)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "gptcli"}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(title=f"gpt serve: {name}", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.add_middleware(Gate, api_key=api_key, max_body=max_body)
    handle_errors(app)
    key = [Depends(HTTPBearer(auto_error=False))] if api_key is not None else []  # told in the schema; Gate checks it

    def check_name(model: str | None) -> None:
        if model not in (None, name):
            raise ModelNotFound(f"model {model!r} is not served here; this server has {name!r}")

    @app.post("/v1/completions", responses={**STREAMED, **ERRORS}, response_model=CompletionResponse, dependencies=key)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        check_name(body.model)
        return await answers.complete(request, body)

    @app.post("/v1/chat/completions", responses={**STREAMED, **ERRORS}, response_model=ChatResponse, dependencies=key)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        check_name(body.model)
        return await answers.chat(request, body)

    @app.get("/v1/models", responses=ERRORS, response_model=ModelList, dependencies=key)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{model:path}", responses=ERRORS, response_model=ModelCard, dependencies=key)
    async def one_model(model: str) -> Response:
        check_name(model)
        return JSONResponse(card)

    @app.get("/health", responses=ERRORS, response_model=Health)
    async def health() -> Response:
        if not worker.alive:
            raise Down(f"the model's thread has stopped: {worker.error}")
        running = min(worker.unfinished, max_rows)
        return JSONResponse({"status": "ok", "running": running, "waiting": worker.unfinished - running})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(files("gptcli.serve").joinpath("page.html").read_text("utf-8"), headers=PAGE_HEADERS)

    return app
