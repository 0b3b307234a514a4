"""The server: OpenAI's shapes, the offline engine's texts, and every kind of bad request answered in one shape."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gptcli.config.schema import SamplingParams
from gptcli.generate import Engine, complete
from gptcli.generate.scoring import score_prompt
from tests.serve.clients import Served, greedy_end_of_text, hold, make_engine, serving, stream, wait_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
PLAIN_HI = "User: Hi\nAssistant:"


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def offline() -> Engine:
    return make_engine()


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


# ---- texts ----------------------------------------------------------------------------------------------------


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
    {"logit_bias": {"97": 3.0, "98": -100.0}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_texts_are_those_of_the_offline_engine(client: httpx.Client, offline: Engine, options: dict[str, Any]) -> None:
    params = SamplingParams(max_new_tokens=20, seed=5, **options)
    expected = offline.generate(["def f(", "x = "], params)
    got = post(client, COMPLETIONS, prompt=["def f(", "x = "], max_tokens=20, seed=5, **options)
    assert [c["text"] for c in got["choices"]] == [c.text for c in expected]
    assert [c["index"] for c in got["choices"]] == [0, 1]
    assert got["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": sum(len(c.ids) for c in expected),
        "total_tokens": 10 + sum(len(c.ids) for c in expected),
    }
    chat = post(client, CHAT, messages=HI, max_tokens=20, seed=5, **options)
    assert chat["choices"][0]["message"]["content"] == offline.generate([PLAIN_HI], params)[0].text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_says_the_same_in_pieces(served: Served, client: httpx.Client, path: str) -> None:
    start = {"prompt": "once"} if path == COMPLETIONS else {"messages": HI}
    body = {**start, "max_tokens": 30, "seed": 9, "n": 3}
    whole = post(client, path, **body)
    got = asyncio.run(stream(served.port, path, {**body, "stream_options": {"include_usage": True}}))
    texts = [c["text"] if path == COMPLETIONS else c["message"]["content"] for c in whole["choices"]]
    assert got.done
    assert [got.texts[i] for i in range(3)] == texts
    assert [got.reasons[i] for i in range(3)] == [c["finish_reason"] for c in whole["choices"]]
    assert got.usage == whole["usage"]
    assert asyncio.run(stream(served.port, path, body)).usage is None


def test_chunks_have_openai_s_shape(client: httpx.Client) -> None:
    body = {"messages": HI, "max_tokens": 2, "seed": 1, "stream": True, "temperature": 0}
    text = client.post(CHAT, json=body).text
    assert text.endswith("data: [DONE]\n\n")
    assert client.post(CHAT, json=body).headers["content-type"].startswith("text/event-stream")
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == "tiny" for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(delta.keys() == {"content"} for delta in deltas[1:-1])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_prompts_may_be_ids(client: httpx.Client) -> None:
    def texts(prompt: Any) -> list[str]:
        got = post(client, COMPLETIONS, prompt=prompt, max_tokens=9, seed=2)
        return [choice["text"] for choice in got["choices"]]

    assert texts([97, 98]) == texts("ab")
    assert texts([[97, 98], [99]]) == texts(["ab", "c"])
    assert len(texts("")) == 1  # begins a document


def test_without_a_seed_texts_differ(client: httpx.Client) -> None:
    texts = {post(client, COMPLETIONS, prompt="a", max_tokens=20)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


def test_n_texts_and_the_best_of_several(client: httpx.Client, offline: Engine) -> None:
    several = post(client, COMPLETIONS, prompt=["a", "b"], n=2, max_tokens=9, seed=4)
    params = SamplingParams(max_new_tokens=9, seed=4)
    drawn = offline.generate(["a", "a", "b", "b"], params, streams=[0, 1, 2, 3])
    assert [c["text"] for c in several["choices"]] == [c.text for c in drawn]
    best = post(client, COMPLETIONS, prompt=["a", "b"], n=2, best_of=5, max_tokens=9, seed=4)
    params = SamplingParams(max_new_tokens=9, seed=4, best_of=5, num_return=2)
    assert [c["text"] for c in best["choices"]] == [c.text for c in complete(offline, ["a", "b"], params)]
    assert best["usage"]["completion_tokens"] > 4 * 9 * 0.9


def test_stop_strings_and_ends(client: httpx.Client, offline: Engine) -> None:
    free = post(client, COMPLETIONS, prompt="x", max_tokens=40, seed=2)["choices"][0]
    assert free["finish_reason"] == "length"
    stop = free["text"][5:8]
    for given in (stop, [stop], ["never", stop]):
        got = post(client, COMPLETIONS, prompt="x", max_tokens=40, seed=2, stop=given)["choices"][0]
        assert got == {**free, "text": free["text"][: free["text"].index(stop)], "finish_reason": "stop"}
    ending = make_engine()
    greedy_end_of_text(ending)
    with serving(ending) as server, httpx.Client(base_url=server.url) as other:
        got = post(other, CHAT, messages=HI, temperature=0)
        assert got["choices"][0]["finish_reason"] == "stop"
        assert got["usage"]["completion_tokens"] == 0


def test_a_chat_goes_on_to_the_context_s_end_and_stops_before_the_user(client: httpx.Client, offline: Engine) -> None:
    got = post(client, CHAT, messages=HI, seed=3)
    expected = offline.generate([PLAIN_HI], SamplingParams(max_new_tokens=109, seed=3, stop=["\nUser:"]))[0]
    assert got["choices"][0]["message"]["content"] == expected.text
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert post(client, CHAT, messages=parts, seed=3)["choices"] == got["choices"]


def test_a_template_of_the_model_is_used() -> None:
    engine = make_engine()
    assert engine.tokenizer is not None
    engine.tokenizer.chat_template = "{{ raise_exception('odd') if messages[1] else messages[0].content + eos_token }}"
    expected = engine.generate([[72, 105, 256]], SamplingParams(max_new_tokens=9, seed=1))[0].text
    with serving(engine) as server, httpx.Client(base_url=server.url) as client:
        got = post(client, CHAT, messages=HI, max_tokens=9, seed=1)
        assert got["choices"][0]["message"]["content"] == expected
        assert got["usage"]["prompt_tokens"] == 3
        assert "odd" in refused(client, CHAT, messages=HI * 2)["message"]


# ---- log-probabilities ----------------------------------------------------------------------------------------


def test_logprobs_of_completions(client: httpx.Client, offline: Engine) -> None:
    got = post(client, COMPLETIONS, prompt="abc", max_tokens=5, seed=1, logprobs=3, echo=True)["choices"][0]
    row = got["logprobs"]
    params = SamplingParams(max_new_tokens=5, seed=1)
    done = offline.generate(["abc"], params)[0]
    scored = score_prompt(offline, [*b"abc", *done.ids], 3)
    assert got["text"] == "abc" + done.text
    assert row["token_logprobs"][0] is row["top_logprobs"][0] is None
    assert row["token_logprobs"][1:] == pytest.approx([t.logprob for t in scored[1:]], abs=1e-4)
    assert row["token_logprobs"][3:] == pytest.approx(done.logprobs, abs=1e-4)
    assert row["tokens"][:3] == ["a", "b", "c"]
    assert row["text_offset"][:4] == [0, 1, 2, 3]
    for top, token in zip(row["top_logprobs"][1:], scored[1:], strict=True):
        assert 1 <= len(top) <= 3
        assert max(top.values()) == pytest.approx(token.top[0][1], abs=1e-4)
        assert sum(map(math.exp, top.values())) <= 1
    only = post(client, COMPLETIONS, prompt="abc", max_tokens=0, logprobs=0, echo=True)["choices"][0]
    assert only["text"] == "abc"
    assert only["logprobs"]["token_logprobs"] == pytest.approx(row["token_logprobs"][:3], abs=1e-4)
    assert only["logprobs"]["top_logprobs"] == [None, {}, {}]
    assert post(client, COMPLETIONS, prompt="abc", max_tokens=0)["choices"][0]["text"] == ""
    assert post(client, COMPLETIONS, prompt=[97], max_tokens=1, echo=True)["choices"][0]["text"][0] == "a"


def test_logprobs_of_chats(client: httpx.Client, offline: Engine) -> None:
    got = post(client, CHAT, messages=HI, max_tokens=5, seed=1, logprobs=True, top_logprobs=2)
    rows = got["choices"][0]["logprobs"]["content"]
    done = offline.generate([PLAIN_HI], SamplingParams(max_new_tokens=5, seed=1))[0]
    assert [row["logprob"] for row in rows] == pytest.approx(done.logprobs, abs=1e-4)
    for row, token in zip(rows, done.ids, strict=True):
        assert len(row["top_logprobs"]) == 2
        assert row["bytes"] == ([token] if token < 128 else None)
    assert post(client, CHAT, messages=HI, max_tokens=1)["choices"][0]["logprobs"] is None


def test_streamed_logprobs_are_the_same(client: httpx.Client) -> None:
    body = {"prompt": "ab", "max_tokens": 8, "seed": 1, "logprobs": 1, "echo": True}
    whole = post(client, COMPLETIONS, **body)["choices"][0]["logprobs"]
    text = client.post(COMPLETIONS, json={**body, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    rows = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert {key: [x for row in rows for x in row[key]] for key in whole} == {
        **whole,
        "token_logprobs": pytest.approx(whole["token_logprobs"], abs=1e-5),
        "top_logprobs": [x and pytest.approx(x, abs=1e-5) for x in whole["top_logprobs"]],
    }


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": None, "top_p": 1.5}, "top_p"),
        ({"n": 0}, "n:"),
        ({"n": 99, "prompt": ["a"] * 99}, "128"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [257]}, "0 to 256"),
        ({"prompt": "a" * 128}, "context is 128"),
        ({"prompt": "a", "max_tokens": 128}, "context is 128"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "\ud800", "echo": True}, "surrogate"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "999"),
        ({"logit_bias": {"9": 101}}, "logit_bias"),
        ({"suffix": "b"}, "suffix"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"seed": 2**63}, "seed"),
    ],
    ids=str,
)
def test_bad_completions(client: httpx.Client, body: dict[str, Any], word: str) -> None:
    assert word in refused(client, COMPLETIONS, **{"prompt": "ab", **body})["message"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type: Input should be 'text'",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "logprobs: true"),
    ],
    ids=str,
)
def test_bad_chats(client: httpx.Client, body: dict[str, Any], word: str) -> None:
    assert word in refused(client, CHAT, **{"messages": HI, **body})["message"]


def test_what_openai_s_servers_take_is_taken(client: httpx.Client) -> None:
    nulls = dict.fromkeys(("stop", "seed", "n", "temperature", "top_p", "logit_bias", "stream", "max_tokens"))
    post(client, COMPLETIONS, prompt="a", user="me", unknown={"x": 1}, **nulls)
    extra = {
        "tools": [],
        "response_format": {"type": "text"},
        "top_k": -1,
        "seed": -5,
        "top_p": 0,
        "temperature": 1e-30,
    }
    messages = [{"role": "developer", "content": "Be brief."}, *HI]
    post(client, CHAT, messages=messages, max_tokens=9, max_completion_tokens=2, store=False, **extra)


def test_other_mistakes_have_the_same_shape(client: httpx.Client) -> None:
    error = refused(client, COMPLETIONS, 404, model="gpt-9\ud800", prompt="a")
    assert (error["code"], "tiny" in error["message"]) == ("model_not_found", True)
    for answer, status in (
        (client.post(COMPLETIONS, content=b"{", headers={"content-type": "application/json"}), 400),
        (client.post(COMPLETIONS, content=b"[" * 60000, headers={"content-type": "application/json"}), 400),
        (client.post(COMPLETIONS, content=b"9" * 60000, headers={"content-type": "application/json"}), 400),
        (client.post(COMPLETIONS, content=b"\xff", headers={"content-type": "application/json"}), 400),
        (client.post(COMPLETIONS, content=b"prompt=a"), 400),
        (client.get(COMPLETIONS), 405),
        (client.get("/v1/nothing"), 404),
        (client.get("/v1/models/other"), 404),
    ):
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


def test_models_and_health(client: httpx.Client) -> None:
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


# ---- limits ---------------------------------------------------------------------------------------------------


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
        right = {"Authorization": "Bearer sésame".encode()}
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
        assert refused(client, COMPLETIONS, 429, prompt="a", n=6)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_hangs_up_frees_its_texts(streamed: bool) -> None:
    engine = make_engine(context_length=4096)
    forward = engine.model.forward

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.01)
        return forward(*args, **kwargs)

    engine.model.forward = slowly  # type: ignore[method-assign]
    with serving(engine, max_rows=2) as server:
        body = f'{{"prompt": "a", "n": 4, "max_tokens": 4000, "stream": {str(streamed).lower()}}}'.encode()
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
    forward, steps = engine.model.forward, []

    def slower_and_slower(*args: Any, **kwargs: Any) -> Any:
        steps.append(0)
        time.sleep(0.0 if len(steps) < 3 else 0.4)
        return forward(*args, **kwargs)

    engine.model.forward = slower_and_slower  # type: ignore[method-assign]
    with serving(engine, timeout=0.5) as server, httpx.Client(base_url=server.url) as client:
        if streamed:
            got = asyncio.run(stream(server.port, COMPLETIONS, {"prompt": "a", "max_tokens": 50}))
            assert (got.status, got.done) == (200, False)
            assert "longer than this server allows" in str(got.error)
        else:
            assert refused(client, COMPLETIONS, 504, prompt="a", max_tokens=50)["code"] == "timeout"
        wait_until(lambda: server.rows_under_way == 0)


def test_a_crash_is_told_to_all_and_hangs_nobody() -> None:
    engine = make_engine()
    gate = hold(engine)
    with serving(engine) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        answers: list[httpx.Response] = []
        body = {"prompt": "a", "max_tokens": 3}

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
