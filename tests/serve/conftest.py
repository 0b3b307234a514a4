"""What the tests share: one server, for those that leave it as it was, and the engine that it should equal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx

from gptcli.generate import Engine
from tests.serve.clients import Served, make_engine, serving


@pytest.fixture(scope="package")
def served() -> Iterator[Served]:
    with serving(make_engine(), max_body=1 << 16) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="package")
def offline() -> Engine:
    return make_engine()
