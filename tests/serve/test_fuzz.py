"""Requests made from /openapi.json, valid and not: each is answered as the schema says, and the server lives on."""

from __future__ import annotations

import random
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.serve.clients import Served, wait_until

schemathesis = pytest.importorskip("schemathesis")

PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/health"]


def fuzz(served: Served, path: str, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    # A request may fit the schema and yet not the model: too long, an id it lacks, best_of less than n.
    too_strict = [schemathesis.checks.positive_data_acceptance]
    mode = schemathesis.GenerationMode
    method = "GET" if "models" in path or path == "/health" else "POST"
    operation = schema[path][method]

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(case: schemathesis.Case) -> None:
        response = case.call(timeout=60)
        case.validate_response(response, excluded_checks=too_strict)
        assert response.status_code != 500

    cases = operation.as_strategy(generation_mode=mode.POSITIVE) | operation.as_strategy(generation_mode=mode.NEGATIVE)
    given(cases)(check)()
    with httpx.Client(base_url=served.url, timeout=60) as client:
        wait_until(lambda: served.rows_under_way == 0)
        assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_a_few_requests_from_the_schema(served: Served, path: str) -> None:
    fuzz(served, path, 25)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_many_requests_from_the_schema(served: Served, path: str) -> None:
    fuzz(served, path, 1000)


def test_bytes_that_are_no_http(served: Served) -> None:
    noise = random.Random(0)
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(noise.randbytes(noise.randrange(1, 2000)))
    with httpx.Client(base_url=served.url) as client:
        assert client.get("/health").status_code == 200
