"""Bodies, keys, queues and time: what the server does not let pass, and what it survives."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from itertools import chain, repeat
from typing import Any

import httpx
import pytest

from tests.serve.clients import (
    COMPLETIONS,
    before_each_step,
    hold,
    make_engine,
    post,
    refused,
    serving,
    stream,
    wait_until,
)


def test_too_large_a_body(client: httpx.Client) -> None:
    assert "65536 bytes" in refused(client, COMPLETIONS, 413, prompt="a" * 70_000)["message"]
    assert "65536 bytes" in refused(client, COMPLETIONS, 413, prompt="a" * 20_000_000)["message"]
    chunks = (b"x" * 1000 for _ in range(100))
    assert client.post(COMPLETIONS, content=chunks).status_code == 413


def test_too_slow_a_body() -> None:
    from gptcli.serve import gate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.Gate.__init__, "__kwdefaults__", {"api_key": None, "body_seconds": 0.3})
        with serving(make_engine()) as server:
            slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
            for connection in slow:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            with httpx.Client(base_url=server.url) as client:  # the others are answered all the while
                post(client, COMPLETIONS, prompt="a", max_tokens=1)
            for connection in slow:
                assert b" 408 " in connection.recv(100)
                connection.close()


def test_a_connection_that_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptcli.serve import run

    monkeypatch.setattr(run, "HEADER_SECONDS", 0.2)
    with serving(make_engine()) as server, socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(b"POST /v1/comp")
        silent.settimeout(10)
        assert silent.recv(100) == b""


def test_the_key() -> None:
    with serving(make_engine(), api_key="sésame") as server, httpx.Client(base_url=server.url) as client:
        body = {"prompt": "a", "max_tokens": 1}
        for key in (None, "Bearer wrong", "sésame".encode(), b"Bearer", b"Bearer \xff"):
            headers = {} if key is None else {"Authorization": key}
            answer = client.post(COMPLETIONS, json=body, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models").status_code == 401
        for scheme in ("Bearer", "bearer"):
            right = {"Authorization": f"{scheme} sésame".encode()}
            assert client.post(COMPLETIONS, json=body, headers=right).status_code == 200
        assert [client.get(path).status_code for path in ("/health", "/", "/openapi.json")] == [200] * 3


def test_more_than_may_wait_are_told_to_come_again() -> None:
    engine = make_engine()
    gate = hold(engine)
    with serving(engine, max_rows=2, max_waiting=3) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"prompt": "a", "max_tokens": 3}
        threads = [threading.Thread(target=client.post, args=(COMPLETIONS,), kwargs={"json": body}) for _ in range(5)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.worker.unfinished == 5)
        assert client.get("/health").json() == {"status": "ok", "running": 2, "waiting": 3}
        answer = client.post(COMPLETIONS, json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        gate.set()
        for thread in threads:
            thread.join()
        post(client, COMPLETIONS, **body)
        assert "6 texts are more than this server" in refused(client, COMPLETIONS, 400, prompt="a", n=6)["message"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_hangs_up_frees_its_texts(streamed: bool) -> None:
    engine = make_engine(context_length=4096)
    before_each_step(engine, lambda: time.sleep(0.01))
    with serving(engine, max_rows=2) as server:
        body = f'{{"prompt": "a", "n": 4, "max_tokens": 4000, "seed": 1, "stream": {str(streamed).lower()}}}'.encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: len(server.worker._session._open) == 4)
            if streamed:
                assert b"200 OK" in connection.recv(1000)
        wait_until(lambda: server.rows_under_way == 0)
        assert not server.worker._session.busy


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_takes_too_long(streamed: bool) -> None:
    engine = make_engine()
    waits = chain([0.0, 0.0], repeat(0.4))
    before_each_step(engine, lambda: time.sleep(next(waits)))
    body = {"prompt": "a", "max_tokens": 50, "seed": 1}  # without a seed one text in 257 ends at each token
    with serving(engine, timeout=0.5) as server, httpx.Client(base_url=server.url) as client:
        if streamed:
            got = asyncio.run(stream(server.port, COMPLETIONS, body))
            assert (got.status, got.done) == (200, False)
            assert "longer than this server allows" in str(got.error)
        else:
            assert refused(client, COMPLETIONS, 504, **body)["code"] == "timeout"
        wait_until(lambda: server.rows_under_way == 0)


def test_a_crash_is_told_to_all_and_hangs_nobody() -> None:
    engine = make_engine()
    gate = hold(engine)
    with serving(engine) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        answers: list[httpx.Response] = []
        body = {"prompt": "a", "max_tokens": 3, "seed": 1}  # a text that has ended before the crash is no error

        def ask(**more: Any) -> None:
            answers.append(client.post(COMPLETIONS, json={**body, **more}))

        threads = [threading.Thread(target=ask, kwargs={"stream": s}) for s in (False, True, False)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.worker.unfinished == 3)
        server.worker._session.scheduler.model = None
        gate.set()
        for thread in threads:
            thread.join()
        assert len(answers) == 3
        for answer in answers:  # a stream whose first token was in time has its status already
            assert answer.status_code == 503 or '"error"' in answer.text
            assert "[DONE]" not in answer.text
        assert client.get("/health").status_code == 503
        assert "stopped" in refused(client, COMPLETIONS, 503, **body)["message"]


def test_what_only_one_request_breaks_is_its_own_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    with serving(engine) as server, httpx.Client(base_url=server.url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "processors", lambda params: 1 / 0)
            refused(client, COMPLETIONS, 500, prompt=["a", "b"], max_tokens=3)
        assert server.rows_under_way == 0
        post(client, COMPLETIONS, prompt="a", max_tokens=3)
