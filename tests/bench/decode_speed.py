"""Decoding raced in one run: ours (fp32, int8), transformers' generate, CTranslate2 (fp32, int8), interleaved.

python tests/bench/decode_speed.py [--shape 124m|1m] [--batch 1 16 64] [--rounds 5] [--only ours,transformers,...]

Prompt of 16 tokens, 64 new, top-k 50. CTranslate2 is raced where it is installed. The limit stated beside batch 1 is
the bytes of the weights over the bandwidth at which memory is read.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.exchange.transfer import export_hugging_face
from gptcli.generate import Engine
from gptcli.generate.pack import pack
from gptcli.model import GPT
from gptcli.modeldir import save_model

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
    with tempfile.TemporaryDirectory() as folder:
        racers = make_racers(options.shape, Path(folder), set(filter(None, options.only.split(","))))
        print(json.dumps({"threads": torch.get_num_threads(), **limits(options.shape)}))
        for batch in options.batch:
            print(json.dumps(race(racers, batch, options.rounds)), flush=True)


def race(racers: dict[str, Callable[[int], None]], batch: int, rounds: int) -> dict[str, Any]:
    """Tokens per second, the median of interleaved rounds, and each over transformers'."""
    seconds: dict[str, list[float]] = {name: [] for name in racers}
    for name in racers:
        racers[name](batch)  # warm up
    for _ in range(rounds):
        for name, run in racers.items():
            started = time.perf_counter()
            run(batch)
            seconds[name].append(time.perf_counter() - started)
    rate = {name: batch * NEW / statistics.median(times) for name, times in seconds.items()}
    ratios = {name: round(r / rate["transformers"], 2) for name, r in rate.items() if "transformers" in rate}
    return {"batch": batch, "tokens_per_second": {n: round(r, 1) for n, r in rate.items()}, "over_transformers": ratios}


def make_racers(shape: str, folder: Path, only: set[str]) -> dict[str, Callable[[int], None]]:
    model = GPT(ModelConfig(**SHAPES[shape], vocab_pad_multiple=1))  # type: ignore[arg-type]
    model.init_weights(0)
    model.eval()
    (folder / "ours").mkdir()
    save_model(folder / "ours", model.config, dict(model.named_parameters()), None)
    export_hugging_face(folder / "ours", folder / "hf", dtype=None, check_logits=False)
    makers = {
        "ours fp32": lambda: ours(pack(copy.deepcopy(model))),
        "ours int8": lambda: ours(pack(copy.deepcopy(model), int8=True)),
        "ours unpacked": lambda: ours(model),
        "ours compiled": lambda: ours(copy.deepcopy(model), compile=True),
        "transformers": lambda: transformers_racer(folder / "hf"),
        "ctranslate2 fp32": lambda: ctranslate2_racer(folder, "float32"),
        "ctranslate2 int8": lambda: ctranslate2_racer(folder, "int8"),
    }
    racers = {}
    for name, make in makers.items():
        if only and name not in only:
            continue
        try:
            racers[name] = make()
        except ImportError as error:
            print(f"{name}: not raced ({error})")
    return racers


def prompts(batch: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, min(vocab, 2000), (batch, PROMPT), generator=generator).tolist()


def ours(model: GPT, *, compile: bool = False) -> Callable[[int], None]:
    params, engine = SamplingParams(max_new_tokens=NEW, top_k=TOP_K, ignore_eos=True), Engine(model)
    if compile:
        engine.compile()

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
