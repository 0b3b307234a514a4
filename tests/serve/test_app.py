"""The server: OpenAI's shapes and the offline engine's texts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from gptcli.config.schema import SamplingParams
from gptcli.generate import Engine, complete
from tests.serve.clients import (
    CHAT,
    COMPLETIONS,
    HI,
    PLAIN_HI,
    Served,
    greedy_end_of_text,
    make_engine,
    post,
    refused,
    serving,
    stream,
)

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


def test_models_and_health(client: httpx.Client) -> None:
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
