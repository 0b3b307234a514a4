"""Decoding raced in one run, interleaved: ours and CTranslate2 (fp32, int8), transformers' generate.

python tests/bench/decode_speed.py [--shape 124m|1m] [--batch 1 16 64] [--rounds 5] [--only ours,transformers,...]

Prompt of 16 tokens, 64 new, top-k 50. CTranslate2 is raced where it is installed. The limit stated beside batch 1 is
the bytes of the weights over the bandwidth at which memory is read.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gptcli.cli.main import keep_freed_memory
from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.exchange.transfer import export_hugging_face
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.modeldir import load_model, open_model_dir, save_model

SHAPES = {
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024, "vocab_size": 50257},
    "1m": {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 256, "vocab_size": 2048},
}
PROMPT, NEW, TOP_K = 16, 64, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    names = [name for name in RACERS if not options.only or name in options.only.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        write_model(options.shape, Path(folder))
        print(json.dumps({"threads": torch.get_num_threads(), **limits(options.shape)}), flush=True)
        with contextlib.ExitStack() as stack:
            racers = {name: stack.enter_context(racing(name, Path(folder))) for name in names}
            for batch in options.batch:
                print(json.dumps(race(racers, batch, options.rounds)), flush=True)


def race(racers: dict[str, Connection], batch: int, rounds: int) -> dict[str, Any]:
    """Tokens per second, the median of interleaved rounds, and each over the first peer that is there."""
    seconds: dict[str, list[float]] = {name: [] for name in racers}
    for number in range(rounds + 1):
        for name, racer in racers.items():
            time.sleep(0.3)  # until the threads of the one before have stopped waiting for more work
            racer.send(batch)
            took = racer.recv()
            if number:  # the first warms up
                seconds[name].append(took)
    rate = {name: batch * NEW / statistics.median(times) for name, times in seconds.items()}
    ratios = {
        f"over {peer}": {name: round(r / rate[peer], 2) for name, r in rate.items() if name.startswith("ours")}
        for peer in rate
        if not peer.startswith("ours")
    }
    return {"batch": batch, "tokens_per_second": {n: round(r, 1) for n, r in rate.items()}, **ratios}


@contextlib.contextmanager
def racing(name: str, folder: Path) -> Iterator[Connection]:
    """A process of its own for each: idle threads of one library would spin beside the next one's work."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_racer, args=(name, folder, there), daemon=True)
    process.start()
    try:
        yield here
    finally:
        process.kill()


def run_racer(name: str, folder: Path, orders: Connection) -> None:
    run = RACERS[name](folder)
    while True:
        batch = orders.recv()
        started = time.perf_counter()
        run(batch)
        orders.send(time.perf_counter() - started)


def write_model(shape: str, folder: Path) -> None:
    model = GPT(ModelConfig(**SHAPES[shape], vocab_pad_multiple=1))  # type: ignore[arg-type]
    model.init_weights(0)
    (folder / "ours").mkdir()
    save_model(folder / "ours", model.config, dict(model.named_parameters()), None)
    export_hugging_face(folder / "ours", folder / "hf", dtype=None, check_logits=False)


def prompts(batch: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, min(vocab, 2000), (batch, PROMPT), generator=generator).tolist()


def ours(folder: Path, **form: bool) -> Callable[[int], None]:
    keep_freed_memory()  # as the command does
    model = load_model(open_model_dir(folder / "ours")).eval()
    params, engine = SamplingParams(max_new_tokens=NEW, top_k=TOP_K, ignore_eos=True), Engine(model)
    engine.pack(**form)

    def run(batch: int) -> None:
        made = sum(1 for _ in engine.tokens(prompts(batch, model.vocab_size), params, logprobs=False))
        assert made == batch * NEW

    return run


def transformers_racer(folder: Path) -> Callable[[int], None]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def run(batch: int) -> None:
        ids = torch.tensor(prompts(batch, model.config.vocab_size))
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=True,
                top_k=TOP_K,
                pad_token_id=0,
            )
        assert out.shape == (batch, PROMPT + NEW)

    return run


def ctranslate2_racer(folder: Path, kind: str) -> Callable[[int], None]:
    import ctranslate2

    out = folder / f"ct2-{kind}"
    vocabulary = [f"t{i}" for i in range(json.loads((folder / "hf" / "config.json").read_text())["vocab_size"])]
    vocabulary[0] = "<|endoftext|>"
    convert_for_ctranslate2(folder / "hf", out, kind, vocabulary)
    generator = ctranslate2.Generator(str(out), device="cpu", intra_threads=torch.get_num_threads())

    def run(batch: int) -> None:
        tokens = [[vocabulary[i] for i in ids] for ids in prompts(batch, len(vocabulary))]
        made = generator.generate_batch(
            tokens,
            max_length=NEW,
            min_length=NEW,
            sampling_topk=TOP_K,
            include_prompt_in_result=False,
            max_batch_size=batch,
        )
        assert all(len(r.sequences_ids[0]) == NEW for r in made)

    return run


def convert_for_ctranslate2(source: Path, out: Path, kind: str, vocabulary: list[str]) -> None:
    """CTranslate2's own spec of GPT-2, filled from the exported directory."""
    import ctranslate2
    import numpy as np
    from ctranslate2.specs import transformer_spec
    from safetensors.torch import load_file

    tensors = {k.removeprefix("transformer."): t.numpy() for k, t in load_file(source / "model.safetensors").items()}
    config = json.loads((source / "config.json").read_text())
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["n_layer"],
        config["n_head"],
        pre_norm=True,
        activation=ctranslate2.specs.Activation.GELUTanh,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = tensors["wte.weight"]
    decoder.position_encodings.encodings = tensors["wpe.weight"]
    decoder.projection.weight = tensors["wte.weight"]
    for norm, name in ((decoder.layer_norm, "ln_f"),):
        norm.gamma, norm.beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    for i, layer in enumerate(decoder.layer):
        parts = (
            (layer.self_attention.layer_norm, "ln_1", "norm"),
            (layer.ffn.layer_norm, "ln_2", "norm"),
            (layer.self_attention.linear[0], "attn.c_attn", "linear"),
            (layer.self_attention.linear[1], "attn.c_proj", "linear"),
            (layer.ffn.linear_0, "mlp.c_fc", "linear"),
            (layer.ffn.linear_1, "mlp.c_proj", "linear"),
        )
        for target, name, what in parts:
            weight, bias = tensors[f"h.{i}.{name}.weight"], tensors[f"h.{i}.{name}.bias"]
            if what == "norm":
                target.gamma, target.beta = weight, bias
            else:
                target.weight, target.bias = np.ascontiguousarray(weight.T), bias
    spec.register_vocabulary(vocabulary)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = vocabulary[0]
    spec.validate()
    spec.optimize(quantization=None if kind == "float32" else kind)
    out.mkdir()
    spec.save(str(out))


RACERS: dict[str, Callable[[Path], Callable[[int], None]]] = {
    "ours fp32": ours,
    "ours int8": partial(ours, int8=True),
    "transformers": lambda folder: transformers_racer(folder / "hf"),
    "ctranslate2 fp32": partial(ctranslate2_racer, kind="float32"),
    "ctranslate2 int8": partial(ctranslate2_racer, kind="int8"),
}
if importlib.util.find_spec("ctranslate2") is None:
    RACERS = {name: make for name, make in RACERS.items() if not name.startswith("ctranslate2")}


def limits(shape: str) -> dict[str, float]:
    """Bandwidth (GB/s) of a sum over 400 MB, and the tokens per second it allows at batch 1."""
    matrix = torch.randn(100_000, 1000)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        matrix.sum()
        times.append(time.perf_counter() - started)
    bandwidth = matrix.numel() * 4 / min(times)
    config = ModelConfig(**SHAPES[shape])  # type: ignore[arg-type]
    weights = sum(p.numel() for p in GPT(config).parameters()) - config.context_length * config.n_embd
    limit = bandwidth / (4 * weights)
    return {
        "bandwidth_GB_s": round(bandwidth / 1e9, 1),
        "limit_fp32": round(limit, 1),
        "limit_int8": round(4 * limit, 1),
    }


if __name__ == "__main__":
    main()
