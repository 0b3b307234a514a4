"""On one GPU: training steps (tokens a second, MFU, peak memory) and decoding (against transformers' generate).

python tests/bench/gpu_speed.py train --shape 124m 1558m --rows 16 32
python tests/bench/gpu_speed.py decode --shape 124m 1558m --batch 1 64

Training is the real step of train/loop.py in bf16, eight micro-batches to an update. MFU counts 6 N + 12 L C T FLOPs a
token (PaLM, appendix B) over the datasheet's bf16 rate. Decoding: prompt 16, 64 new, top-k 50, bf16 weights; its
limit is the bytes of the weights over the bandwidth of a copy. Started side by side, they compile together and are
timed one after another.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptcli.config.flops import flops_per_token_with_attention
from gptcli.config.load import load_recipe
from gptcli.config.plan import make_plan
from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.contracts import Batch
from gptcli.dist.runtime import Runtime
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.train.loop import train_step
from gptcli.train.metrics import peak_flops
from gptcli.train.objectives import next_token
from gptcli.train.optim import make_optimizer
from gptcli.train.stop import StopSignal

RECIPES = {"124m": "gpt2-small", "355m": "gpt2-medium", "774m": "gpt2-large", "1558m": "gpt2-xl"}
MICRO_STEPS, PROMPT, NEW, TOP_K = 8, 16, 64, 50
CUDA, LOCK = torch.device("cuda"), Path(tempfile.gettempdir()) / "gptcli-gpu-speed.lock"
FLASH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KERNELS = {"flash": FLASH, "cudnn": [SDPBackend.CUDNN_ATTENTION, *FLASH]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("--shape", nargs="+", choices=RECIPES, default=["124m"])
    parser.add_argument("--rows", nargs="+", type=int, default=[16])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    parser.add_argument("--attention", nargs="+", choices=KERNELS, default=["flash"])
    parser.add_argument("--only", nargs="+", default=["graph", "compiled", "transformers"])
    options = parser.parse_args()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    for shape in options.shape:
        if options.what == "train":
            for rows, attention in itertools.product(options.rows, options.attention):
                with sdpa_kernel(KERNELS[attention], set_priority=True):
                    row = train(shape, rows, compiled=not options.eager)
                print(json.dumps({**row, "attention": attention}), flush=True)
        else:
            decode(shape, options.batch, options.only)
        torch.cuda.empty_cache()


def config_of(shape: str) -> ModelConfig:
    config = load_recipe(RECIPES[shape], stage="pretrain").model
    assert config is not None
    return dataclasses.replace(config, vocab_size=50257, dropout=0.0)


def model_of(shape: str) -> GPT:
    with CUDA:
        model = GPT(config_of(shape))
    model.init_weights(0)
    return model


def train(shape: str, rows: int, *, compiled: bool) -> dict[str, object]:
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    model, recipe = model_of(shape), load_recipe(RECIPES[shape], stage="pretrain")
    if compiled:
        model.compile(dynamic=False)
    T, runtime = model.config.context_length, Runtime(device=CUDA)
    plan = make_plan(recipe, context_length=T, dp_size=1, micro_batch_size=rows)
    optimizer = make_optimizer(model, recipe.optim, model.hidden_matrices())
    ids = torch.randint(0, 50257, (rows, T + 1))
    batch = Batch({"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}, rows * T, rows * T)

    def step(number: int) -> None:
        with StopSignal() as stop:
            train_step(
                model, optimizer, [batch] * MICRO_STEPS, next_token, number, plan, runtime, stop, 1.0,
                seed=0, dtype=torch.bfloat16,
            )  # fmt: skip

    started = time.perf_counter()
    step(0)
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    seconds = timed(lambda: step(1), 7)
    rate = MICRO_STEPS * rows * T / seconds
    peak = peak_flops(CUDA)
    mfu = rate * flops_per_token_with_attention(model.config, T) / peak if peak else None
    return {
        "shape": shape, "rows": rows, "compiled": compiled, "tokens_per_second": round(rate),
        "mfu": mfu and round(mfu, 3), "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "first_step_s": round(first, 1),
    }  # fmt: skip


def timed(call: Callable[[], object], rounds: int) -> float:
    """Median seconds of a call that has been warmed up."""
    times = []
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for number in range(rounds + 1):
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if number:
                times.append(time.perf_counter() - started)
    return statistics.median(times)


def decode(shape: str, batches: list[int], only: list[str]) -> None:
    for name in only:
        make = {"graph": ours, "compiled": partial(ours, compiled=True), "transformers": transformers_racer}[name]
        started = time.perf_counter()
        run, read = make(shape)
        for batch in batches:
            run(batch)
            first = time.perf_counter() - started
            seconds = timed(partial(run, batch), 5)
            rate = batch * NEW / seconds
            share = {"share_of_bandwidth": round(read * NEW / seconds / copy_bandwidth(), 3)} if batch == 1 else {}
            row = {"shape": shape, "batch": batch, "who": name, "tokens_per_second": round(rate, 1), **share}
            print(json.dumps({**row, "until_first_s": round(first, 1)}), flush=True)


def ours(shape: str, *, compiled: bool = False) -> tuple[Callable[[int], None], int]:
    model = model_of(shape).eval().to(torch.bfloat16)
    engine = Engine(model, dtype=torch.bfloat16)
    if compiled:
        engine.compile()
    params = SamplingParams(max_new_tokens=NEW, top_k=TOP_K, ignore_eos=True)

    def run(batch: int) -> None:
        made = sum(1 for _ in engine.tokens(prompts(batch), params, logprobs=False))
        assert made == batch * NEW

    read = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight") * 2
    return run, read


def transformers_racer(shape: str) -> tuple[Callable[[int], None], int]:
    import transformers

    c = config_of(shape)
    config = transformers.GPT2Config(
        n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.context_length, vocab_size=50257
    )
    with CUDA:
        model = transformers.GPT2LMHeadModel(config).eval().to(torch.bfloat16)

    def run(batch: int) -> None:
        ids = torch.tensor(prompts(batch), device=CUDA)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True,
                top_k=TOP_K, pad_token_id=0,
            )  # fmt: skip
        assert out.shape == (batch, PROMPT + NEW)

    return run, sum(p.numel() for p in model.parameters()) * 2


def prompts(batch: int) -> list[list[int]]:
    return torch.randint(0, 2000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device=CUDA).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), 5)


if __name__ == "__main__":
    main()
