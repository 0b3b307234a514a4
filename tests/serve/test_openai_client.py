"""OpenAI's own Python client, unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptcli.config.schema import SamplingParams
from tests.serve.clients import Served, make_engine, serving

openai = pytest.importorskip("openai")

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gptcli"


def test_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    expected = make_engine().generate(["once"], SamplingParams(max_new_tokens=12, seed=3))[0]
    request = {"model": "tiny", "prompt": "once", "max_tokens": 12, "seed": 3, "logprobs": 2}
    whole = client.completions.create(**request)
    assert whole.choices[0].text == expected.text
    assert whole.choices[0].logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert whole.usage.completion_tokens == len(expected.ids)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected.text
    assert chunks[-1].usage == whole.usage


def test_chats_whole_and_streamed(client: openai.OpenAI) -> None:
    request = {
        "model": "tiny",
        "messages": HI,
        "max_completion_tokens": 12,
        "seed": 3,
        "logit_bias": {"256": -100},  # no end-of-text
        "extra_body": {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1},
    }
    whole = client.chat.completions.create(**request, logprobs=True, top_logprobs=1)
    text = whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content) == 12
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context is 128") as caught:
        client.completions.create(model="tiny", prompt="a" * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="a", temperature=9)


def test_the_key() -> None:
    with serving(make_engine(), api_key="secret") as server:
        ask = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:
            assert client.completions.create(**ask).choices
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong")
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.completions.create(**ask)
