"""One server for the tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.serve.clients import Served, make_engine, serving


@pytest.fixture(scope="package")
def served() -> Iterator[Served]:
    with serving(make_engine(), max_body=1 << 16) as server:
        yield server
