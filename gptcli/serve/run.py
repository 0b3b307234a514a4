"""Serving until a signal says stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptcli.errors import Stopped, UserError

GRACE_SECONDS = 5  # for answers under way once a signal has come
HEADER_SECONDS = 20  # for a new connection to say what it wants


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where host and port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        known = error.errno is not None and not isinstance(error, socket.gaierror)
        reason = os.strerror(error.errno or 0) if known else error.strerror
        raise UserError(f"cannot listen on {host} port {port}: {reason}; try another --port or --host") from None


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then let answers under way end for a while. Raises Stopped."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stopped)  # uvicorn raises the signal anew when it has shut down
    make_server(app).run(sockets=[listening])


def make_server(app: FastAPI) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        lifespan="on",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return uvicorn.Server(config)


class PatientProtocol(H11Protocol):
    """Lets go of a connection that never asks for anything, of which a few hundred would use up all there may be."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()  # or it holds on to all that the connection was
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def _stopped(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum, "stopped serving")
