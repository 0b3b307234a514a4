"""gpt serve"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.api import LoadedModel

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    checkpoint: options.Checkpoint = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Whom to listen to; 0.0.0.0: everyone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="GPT_API_KEY", metavar="KEY", help="Answer only those who send it (Bearer)."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name for clients; left out: the run's.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, metavar="N", help="Texts written at the same time.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=0, metavar="N", help="Texts that may wait; then status 429.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="For one answer, waiting included.")] = 600,
    max_body: Annotated[int, typer.Option(min=1, metavar="BYTES", help="Of a request; then status 413.")] = 1 << 20,
    quiet: options.Quiet = False,
    int8: options.Int8 = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Serve a model over HTTP as OpenAI does, with a page to chat on. Needs `pip install 'gptcli[serve]'`.

    gpt serve --port 8000
    """
    # The model's threads would spin for the core that the requests' thread needs, and the reverse: where both cores
    # of two were spinning, nothing was answered any more. Read by OpenMP when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from gptcli.serve.app import create_app
        from gptcli.serve.run import listen, serve
        from gptcli.serve.worker import ModelThread
    except ModuleNotFoundError as error:
        raise UserError(f"gpt serve needs {error.name}: pip install 'gptcli[serve]'") from None
    if api_key == "":
        raise UserError("--api-key, GPT_API_KEY: is empty (a variable that is not set?); leave it out to ask for none")
    logging.basicConfig(format="gpt: %(message)s", level=logging.WARNING, stream=sys.stderr)

    def load() -> LoadedModel:
        loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)
        loaded.packed(int8=int8)
        return loaded

    thread = ModelThread()
    loaded = thread.submit(load).result()
    name = name or _name_of(loaded.path)
    app = create_app(
        loaded.engine,
        name,
        thread=thread,
        api_key=api_key,
        max_rows=max_rows,
        max_waiting=max_waiting,
        timeout=timeout,
        max_body=max_body,
    )
    with listen(host, port) as listening:
        if not quiet:
            _announce(name, host, listening.getsockname()[1], open_to_all=not api_key and host not in LOOPBACK)
        serve(app, listening)


def _name_of(path: Path) -> str:
    """A checkpoint is called after its run."""
    path = path.resolve()
    return path.parent.name if path.name.startswith("step-") else path.name


def _announce(name: str, host: str, port: int, *, open_to_all: bool) -> None:
    where = f"[{host}]" if ":" in host else host
    print(f"gpt: serving {name} at http://{where}:{port} (Ctrl-C stops)", file=sys.stderr)
    if open_to_all:
        print("gpt: anyone who reaches this machine can use it; --api-key KEY asks for a key", file=sys.stderr)
