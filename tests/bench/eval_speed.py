"""Likelihood tasks raced in one run: ours against EleutherAI's harness with its Hugging Face backend, interleaved.

python tests/bench/eval_speed.py [--shape 124m|10m] [--items 64] [--rounds 3] [--batch 8] [--tasks arc,lambada]

Both score the same requests of the same exported checkpoint of random weights, a byte-level BPE trained on the items,
and must agree. Items are made here: multiple choice of four (a question of about 60 tokens), or a passage of about 100
and its last word. The figure is the median of rounds, and ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptcli.config.schema import ModelConfig
from gptcli.eval.scorer import Scorer
from gptcli.exchange.transfer import export_hugging_face
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.modeldir import load_model, open_model_dir, save_model
from gptcli.tokenizer.build import train_bpe

SHAPES = {
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024, "vocab_size": 50257},
    "10m": {"n_layer": 6, "n_head": 6, "n_embd": 192, "context_length": 512, "vocab_size": 50257},
}
Pair = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="the harness's batch size")
    parser.add_argument("--tasks", default="arc,lambada")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {task: REQUESTS[task](options.items) for task in options.tasks.split(",")}
        ours, theirs = make(
            options.shape, folder, [" ".join(pair) for pairs in sets.values() for pair in pairs], options
        )
        print(json.dumps({"threads": torch.get_num_threads(), "shape": options.shape}))
        for task, pairs in sets.items():
            print(json.dumps({"task": task, **race(ours, theirs, pairs, options.rounds)}), flush=True)


def race(
    ours: Callable[[list[Pair]], list[float]],
    theirs: Callable[[list[Pair]], list[float]],
    pairs: list[Pair],
    rounds: int,
) -> dict[str, Any]:
    """Requests a second of each, and the ratio of each round's neighbours."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    worst = max(abs(a - b) for a, b in zip(ours(pairs), theirs(pairs), strict=True))  # warms up, too
    assert worst < 1e-2, worst
    for _ in range(rounds):
        for name, run in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            run(pairs)
            seconds[name].append(time.perf_counter() - started)
    rate = {name: round(len(pairs) / statistics.median(times), 1) for name, times in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    return {"requests": len(pairs), "requests_per_second": rate, "ours_over_theirs": round(ratio, 2)}


def make(shape: str, folder: Path, texts: list[str], options: argparse.Namespace) -> tuple[Any, Any]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = GPT(ModelConfig(**SHAPES[shape], vocab_pad_multiple=1))  # type: ignore[arg-type]
    model.init_weights(0)
    (folder / "ours").mkdir()
    save_model(folder / "ours", model.config, dict(model.named_parameters()), train_bpe(texts, 2000))
    export_hugging_face(folder / "ours", folder / "hf", dtype=None, check_logits=False)
    opened = open_model_dir(folder / "ours")
    scorer = Scorer(Engine(load_model(opened), opened.tokenizer))
    harness = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=options.batch)

    def ours(pairs: list[Pair]) -> list[float]:
        return [one.logprob for one in scorer.loglikelihood(pairs)]

    def theirs(pairs: list[Pair]) -> list[float]:
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [logprob for logprob, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    return ours, theirs


def words(draw: random.Random, n: int) -> str:
    return " ".join("".join(draw.choices("aeioukstlmnr", k=draw.randint(2, 7))) for _ in range(n))


def choices(n: int) -> list[Pair]:
    draw, pairs = random.Random(0), []
    for _ in range(n):
        context = f"Question: {words(draw, draw.randint(10, 30))}?\nAnswer:"
        pairs += [(context, " " + words(draw, draw.randint(1, 4))) for _ in range(4)]
    return pairs


def passages(n: int) -> list[Pair]:
    draw = random.Random(1)
    return [(words(draw, draw.randint(20, 60)), " " + words(draw, 1)) for _ in range(n)]


REQUESTS = {"arc": choices, "lambada": passages}

if __name__ == "__main__":
    main()
