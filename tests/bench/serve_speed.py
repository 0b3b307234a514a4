"""Race the server, under many streaming clients, against the offline engine: same model, prompts, seeds, one run."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from gptcli.config.schema import SamplingParams  # noqa: E402
from gptcli.generate import Engine  # noqa: E402
from tests.serve.clients import gpt_serve, make_engine, save_engine, stream  # noqa: E402

SHAPES = {
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 256, "init_std": 0.02},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 192, "context_length": 256, "init_std": 0.02},
    "baby": {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256, "init_std": 0.02},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name in SHAPES if options.shape == "all" else [options.shape]:
        race(name, options.clients, options.tokens, options.rounds)


def race(name: str, clients: int, tokens: int, rounds: int) -> None:
    engine = make_engine(**SHAPES[name])
    rates: dict[str, list[float]] = {"offline": [], "served": []}
    threads = str(torch.get_num_threads())
    with (
        tempfile.TemporaryDirectory() as folder,
        gpt_serve("-c", save_engine(engine, Path(folder) / "m"), OMP_NUM_THREADS=threads) as (port, _),
    ):
        for round_ in range(rounds + 1):
            start = time.perf_counter()
            expected = offline(engine, clients, tokens)
            middle = time.perf_counter()
            texts = asyncio.run(served(port, clients, tokens))
            end = time.perf_counter()
            assert texts == expected, "the server's texts differ"
            if round_:  # the first warms up
                rates["offline"].append(clients * tokens / (middle - start))
                rates["served"].append(clients * tokens / (end - middle))
    base = statistics.median(rates["offline"])
    for contestant, found in rates.items():
        rate = statistics.median(found)
        print(f"{name:<6}{contestant:<10}{rate:>10,.0f} tok/s  {rate / base:.2f}x")


def offline(engine: Engine, clients: int, tokens: int) -> list[str]:
    params = SamplingParams(max_new_tokens=tokens, seed=7, logit_bias={"256": -100.0})
    prompts = [f"client {i} says" for i in range(clients)]
    return [c.text for c in engine.generate(prompts, params, streams=[0] * clients)]


async def served(port: int, clients: int, tokens: int) -> list[str]:
    bodies = [
        {"prompt": f"client {i} says", "max_tokens": tokens, "seed": 7, "logit_bias": {"256": -100.0}}
        for i in range(clients)
    ]
    answers = await asyncio.gather(*(stream(port, "/v1/completions", body) for body in bodies))
    return [answer.texts[0] for answer in answers]


if __name__ == "__main__":
    main()
