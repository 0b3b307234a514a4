"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gptcli.errors import GptError, UserError
from gptcli.serve.schemas import ContextError
from gptcli.serve.worker import INTERNAL, Busy, Down

log = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx's number; nobody reads it


class ModelNotFound(UserError):
    """A request for a model that is not served here."""


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, object]:
    message = message.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair may be quoted in it
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, str, str | None]:
    """(status, message, code) of what may befall a request."""
    match error:
        case ContextError():
            return 400, str(error), "context_length_exceeded"
        case ModelNotFound():
            return 404, str(error), "model_not_found"
        case UserError():
            return 400, str(error), None
        case Busy():
            return 429, str(error), "rate_limit_exceeded"
        case Down():
            return 503, str(error), None
        case TimeoutError():
            return 504, "the answer took longer than this server allows", "timeout"
    return 500, INTERNAL, None


def _names_a_type(part: int | str) -> bool:
    """Whether this step of a place is pydantic's own and not one of the request's."""
    return isinstance(part, str) and (part in ("body", "str") or "[" in part)


def handle_errors(app: FastAPI) -> None:
    """Give all of an app's errors this shape."""

    async def known(request: Request, error: Exception) -> Response:
        status, message, code = describe(error)
        return error_response(status, message, code=code, headers={"Retry-After": "1"} if status == 429 else None)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        # of several types that would do, the one that the value came nearest to
        nearest = max(error.errors(), key=lambda e: len(e["loc"]))
        place = ".".join(str(part) for part in nearest["loc"] if not _names_a_type(part)) or None
        message = nearest["msg"] if place is None else f"{place}: {nearest['msg']}"
        return error_response(400, message, param=place)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    for kind in (GptError, TimeoutError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)
