"""Many clients at once: each gets its own right text, nobody an error, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from pathlib import Path

import httpx
import pytest

from gptcli.config.schema import SamplingParams
from tests.serve.clients import gpt_serve, make_engine, resident_bytes, save_engine, stream

CLIENTS = 64
PROMPTS = ["a", "def main(", "once upon a time", "x = ", "The professor said that"]


async def soak(port: int, expected: list[str], bodies: list[dict], seconds: float) -> tuple[int, list[str]]:
    """CLIENTS clients, each asking again and again; (answers, complaints)."""
    complaints: list[str] = []
    answers = 0
    deadline = time.monotonic() + seconds

    async def client(number: int) -> None:
        nonlocal answers
        choose = random.Random(number)
        while time.monotonic() < deadline:
            i = choose.randrange(len(bodies))
            if choose.random() < 0.05:  # hangs up in the middle
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stream(port, "/v1/completions", {**bodies[i], "n": 2}), 0.01)
                continue
            got = await stream(port, "/v1/completions", bodies[i])
            answers += 1
            if (got.status, got.error, got.done, got.texts[0]) != (200, None, True, expected[i]):
                complaints.append(f"{bodies[i]}: {got}, not {expected[i]!r}")

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return answers, complaints


def check(folder: Path, warm_up: float, seconds: float) -> None:
    engine = make_engine()
    bodies = [
        {"prompt": prompt, "seed": seed, "max_tokens": 20 + 10 * seed, "temperature": 0.5 + seed / 4, "stop": ["\x00"]}
        for prompt in PROMPTS
        for seed in range(5)
    ]
    expected = [
        engine.generate(
            [b["prompt"]],
            SamplingParams(
                seed=b["seed"], max_new_tokens=b["max_tokens"], temperature=b["temperature"], stop=b["stop"]
            ),
        )[0].text
        for b in bodies
    ]
    with gpt_serve("-c", save_engine(engine, folder / "model")) as (port, process):
        asyncio.run(soak(port, expected, bodies, warm_up))
        before = resident_bytes(process.pid)
        answers, complaints = asyncio.run(soak(port, expected, bodies, seconds))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            health = client.get("/health").json()
        grown = (resident_bytes(process.pid) - before) / 2**20
        print(f"{CLIENTS} clients, {seconds} s: {answers} answers, {len(complaints)} wrong, {grown:+.1f} MiB, {health}")
        assert complaints == []
        assert answers > CLIENTS
        assert health == {"status": "ok", "running": 0, "waiting": 0}
        assert grown < 16


def test_many_clients_for_a_moment(tmp_path: Path) -> None:
    check(tmp_path, 2, 6)


@pytest.mark.slow
def test_many_clients_for_five_minutes(tmp_path: Path) -> None:
    check(tmp_path, 20, 300)
