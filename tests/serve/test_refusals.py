"""Every kind of bad request is answered in one shape; what OpenAI's servers take is taken."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serve.clients import (
    CHAT,
    COMPLETIONS,
    HI,
    post,
    refused,
)


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
