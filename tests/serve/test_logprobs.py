"""Log-probabilities, which are those of the offline engine."""

from __future__ import annotations

import json
import math

import httpx
import pytest

from gptcli.config.schema import SamplingParams
from gptcli.generate import Engine
from gptcli.generate.scoring import score_prompt
from tests.serve.clients import (
    CHAT,
    COMPLETIONS,
    HI,
    PLAIN_HI,
    post,
)


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
