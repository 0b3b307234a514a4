"""A server in a thread or a process, and its clients; those for load cost little: asyncio and the bytes of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptcli.config.schema import ModelConfig
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.modeldir import save_model
from gptcli.tokenizer.build import byte_tokenizer

if TYPE_CHECKING:
    import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
PLAIN_HI = "User: Hi\nAssistant:"

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 257, "init_std": 0.2, "context_length": 128}


def make_engine(**changes: Any) -> Engine:
    model = GPT(ModelConfig(**{**SHAPE, **changes}))
    model.init_weights(3)
    return Engine(model.eval(), byte_tokenizer())


def save_engine(engine: Engine, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, engine.model.config, dict(engine.model.named_parameters()), engine.tokenizer)
    return folder


@contextlib.contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[Served]:
    """The real server on a real port, in a thread of this process."""
    from gptcli.serve.app import create_app
    from gptcli.serve.run import listen, make_server

    app = create_app(engine, "tiny", **options)
    server = make_server(app)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield Served(listening.getsockname()[1], app.state.worker)
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Served:
    port: int
    worker: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def rows_under_way(self) -> int:
        """As the worker's own thread sees them."""
        return len(self.worker._session._open) + len(self.worker._rows) + self.worker.unfinished


@contextlib.contextmanager
def gpt_serve(*arguments: str | Path, **env: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """`gpt serve` in a process of its own: (port, process)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", "serve", "--port", "0", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    try:
        assert process.stderr is not None
        announced = re.search(r":(\d+) \(", process.stderr.readline())
        assert announced, process.stderr.read()
        yield int(announced[1]), process
    finally:
        process.kill()
        process.communicate()


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: httpx.Client, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
    # json.dumps writes half a surrogate pair as an escape, which httpx cannot
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@dataclass
class Streamed:
    """What a streaming client got."""

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, int] | None = None
    error: str | None = None
    events: int = 0
    done: bool = False

    def take(self, payload: str) -> None:
        if payload == "[DONE]":
            self.done = True
            return
        event = json.loads(payload)
        if "error" in event:
            self.error = event["error"]["message"]
            return
        self.events += 1
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            index = choice["index"]
            new = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            self.texts[index] = self.texts.get(index, "") + new
            if choice["finish_reason"]:
                self.reasons[index] = choice["finish_reason"]


async def stream(port: int, path: str, body: dict[str, Any]) -> Streamed:
    """One streamed request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps({**body, "stream": True}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        )
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + content)
        got = Streamed(status=int((await reader.readline()).split()[1]))
        async for line in reader:
            if line.startswith(b"data: "):
                got.take(line[6:].decode().strip())
            elif line.startswith(b'{"error"'):
                got.error = json.loads(line)["error"]["message"]
        return got
    finally:
        writer.close()


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def hold(engine: Engine) -> threading.Event:
    """Make each step of the engine wait for the event, so that texts stay under way."""
    gate = threading.Event()
    before_each_step(engine, lambda: gate.wait(30))
    return gate


def before_each_step(engine: Engine, act: Callable[[], object]) -> None:
    """Let every step be one forward of the model in Python, and `act` come before it."""
    engine._decode, forward = None, engine.model.forward

    def acting(*args: Any, **kwargs: Any) -> Any:
        act()
        return forward(*args, **kwargs)

    engine.model.forward = acting  # type: ignore[method-assign]


def greedy_end_of_text(engine: Engine) -> None:
    """Make the model say end-of-text, whatever it reads."""
    with torch.no_grad():
        engine.model.ln_f.weight.zero_()
        engine.model.ln_f.bias.copy_(engine.model.wte.weight[256] * 100)
