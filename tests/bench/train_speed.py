"""Race our training step against transformers' GPT-2 of the same shape: same batch, fused AdamW, clip 1, fp32."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from gptcli.config.flops import flops_per_token_with_attention
from gptcli.config.schema import ModelConfig, OptimBlock
from gptcli.contracts import Batch
from gptcli.model import GPT
from gptcli.train.objectives import next_token
from gptcli.train.optim import make_optimizer

SHAPES = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 64, "vocab_size": 65, "rows": 12},
    "baby": {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256, "vocab_size": 65, "rows": 16},
    "124m": {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "context_length": 512,
        "vocab_size": 50257,
        "rows": 2,
    },
}


def ours(shape: dict[str, int], compiled: bool) -> Callable[[], None]:
    config = ModelConfig(**{k: v for k, v in shape.items() if k != "rows"}, bias=False)
    model = GPT(config)
    model.init_weights(0)
    if compiled:
        model.compile(dynamic=False)
    optimizer = make_optimizer(model, OptimBlock(lr=1e-3))
    batch = make_batch(shape)

    def step() -> None:
        (next_token(model, batch).loss / batch.weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs(shape: dict[str, int], compiled: bool) -> Callable[[], None]:
    import transformers

    config = transformers.GPT2Config(
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        n_positions=shape["context_length"],
        vocab_size=shape["vocab_size"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config)
    if compiled:
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = make_batch(shape)

    def step() -> None:
        model(batch["tokens"], labels=batch["tokens"]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_batch(shape: dict[str, int]) -> Batch:
    size = (shape["rows"], shape["context_length"])
    ids = torch.randint(0, shape["vocab_size"], size)
    return Batch({"tokens": ids, "targets": ids.roll(-1, 1)}, ids.numel(), ids.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="race compiled models too")
    options = parser.parse_args()
    for name in SHAPES if options.shape == "all" else [options.shape]:
        race(name, options.rounds, options.compile)


def race(name: str, rounds: int, with_compiled: bool) -> None:
    shape = SHAPES[name]
    contestants = {"gptcli": ours(shape, False), "transformers": theirs(shape, False)}
    if with_compiled:
        contestants |= {"gptcli compiled": ours(shape, True), "transformers compiled": theirs(shape, True)}
    tokens = shape["rows"] * shape["context_length"]
    for step in contestants.values():
        step()
    steps = max(1, round(20_000 / tokens)) if name != "124m" else 1
    rates: dict[str, list[float]] = {c: [] for c in contestants}
    for _ in range(rounds):
        for contestant, step in contestants.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            rates[contestant].append(tokens * steps / (time.perf_counter() - start))
    config = ModelConfig(**{k: v for k, v in shape.items() if k != "rows"}, bias=False)
    gflop = flops_per_token_with_attention(config, shape["context_length"]) / 1e9
    base = statistics.median(rates["transformers"])
    for contestant, found in rates.items():
        rate = statistics.median(found)
        print(f"{name:<6}{contestant:<24}{rate:>10,.0f} tok/s  {rate * gflop:>7.0f} GFLOP/s  {rate / base:.2f}x")


if __name__ == "__main__":
    main()
