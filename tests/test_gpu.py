"""On a GPU: every stage and verb runs there, in bf16, and what it computes is what a CPU computes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from gptcli.config.gpus import has_cpp_compiler
from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.generate import Engine
from gptcli.generate.pack import pack
from gptcli.model import GPT
from tests.conftest import Tiny, gpt, make_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

TRAIN = {"max_steps": 6, "global_batch_size": 8, "log_every": 1, "eval_every": 3, "save_every": 3}
REWARD = "def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
SHAPES = [
    {},
    {"position": "rope", "n_kv_head": 2, "activation": "swiglu", "norm": "rmsnorm", "qk_norm": True, "bias": False},
    {"attention_pattern": "alternating", "band_width": 4},
    {"position": "alibi"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model that was pretrained here, and data for all that can follow."""
    tiny = make_tiny(tmp_path_factory.mktemp("gpu"))
    run(tiny, "pretrain", "-r", tiny.recipe, "-s", "model={n_layer: 2, n_head: 2, n_embd: 32, context_length: 64}")
    files = {
        "chat": [{"prompt": f"{i}?", "response": "yes" if i % 2 else "no"} for i in range(80)],
        "pairs": [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no, never"} for i in range(80)],
        "prompts": [{"prompt": f"{i}?"} for i in range(40)],
        "labels": [{"text": "ab"[i % 2] * (3 + i % 5), "label": "ab"[i % 2]} for i in range(80)],
    }
    for name, rows in files.items():
        (tiny.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tiny.folder / "reward.py").write_text(REWARD)
    return tiny


def run(tiny: Tiny, *arguments: str | Path) -> str:
    done = gpt(*arguments, cwd=tiny.folder)
    assert done.code == 0, done.err
    return done.out


def stage(tiny: Tiny, verb: str, data: str, *, init_from: str = "runs/tiny", **blocks: object) -> list[dict]:
    """Rows of the metrics of a short run, which `verb` names."""
    made = {
        "stage": verb,
        "run": {"name": str(blocks.pop("name", verb)), "dir": "runs"},
        "init_from": init_from,
        "data": {"train": [f"{data}.jsonl"], "val": [f"{data}.jsonl"]},
        "optim": {"lr": 1e-3},
        "train": TRAIN,
        **blocks,
    }
    file = tiny.folder / f"{made['run']['name']}.yaml"  # type: ignore[index]
    file.write_text(yaml.safe_dump(made))
    run(tiny, verb, "-r", file, "-q")
    lines = (tiny.folder / "runs" / file.stem / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_pretraining_learns_and_knows_its_device(world: Tiny) -> None:
    rows = world.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    timed = json.loads((world.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= timed["mfu"] < 1  # of the datasheet's figure, which is known


def test_compiled_training_loses_what_eager_training_does(world: Tiny) -> None:
    losses = {}
    for compiled in ("true", "false"):
        run(
            world, "pretrain", "-r", world.recipe, "-q", "-s", f"run.name=compiled-{compiled}",
            "-s", f"train.compile={compiled}", "-s", "train.precision=fp32",
        )  # fmt: skip
        losses[compiled] = [row["loss"] for row in world.metrics(f"compiled-{compiled}")]
    assert losses["true"] == pytest.approx(losses["false"], abs=1e-3)


def test_a_stopped_run_goes_on_as_if_nothing_had_been(world: Tiny) -> None:
    """Not to the bit: kernels of the backward pass add in any order."""
    arguments = ("-r", str(world.recipe), "-q", "-s", "train.compile=false", "-s", "train.max_steps=400")
    run(world, "pretrain", *arguments, "-s", "run.name=whole")
    command = [sys.executable, "-m", "gptcli", "pretrain", *arguments, "-s", "run.name=parts"]
    process = subprocess.Popen(command, cwd=world.folder)
    metrics = world.folder / "runs/parts/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 30):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    run(world, "pretrain", "--resume", "runs/parts", "-q")
    parts, whole = ([row["loss"] for row in world.metrics(name)] for name in ("parts", "whole"))
    assert len(parts) == len(whole) == 400
    assert parts[:60] == pytest.approx(whole[:60], abs=0.05)


def test_supervised_finetuning(world: Tiny) -> None:
    for name, lora in (("sft", {}), ("sft-lora", {"lora": {"rank": 4, "alpha": 8}})):
        assert len(stage(world, "sft", "chat", name=name, **lora)) == 6
    assert "val_accuracy" in stage(world, "finetune", "labels", finetune={"task": "classification"})[-1]
    out = gpt("classify", "-c", "runs/finetune", cwd=world.folder, stdin=b"aaaa\nbbbb\n")
    assert out.code == 0, out.err
    assert len(out.out.splitlines()) == 2


def test_reinforcement(world: Tiny) -> None:
    stage(world, "rlhf-reward", "pairs")
    stage(world, "rlhf-dpo", "pairs")
    sampling, rollout = {"max_new_tokens": 8}, {"rollout_batch_size": 16}
    rows = stage(
        world, "rlhf-ppo", "prompts", sampling=sampling, reward={"checkpoint": "runs/rlhf-reward"}, ppo=rollout
    )
    # the policy that writes in a CUDA graph and the one that learns are one: before it learns, nothing has moved
    assert abs(rows[0]["approx_kl"]) < 1e-2
    stage(
        world, "rlhf-grpo", "prompts", sampling=sampling, reward={"function": "reward.py:score"},
        grpo={**rollout, "group_size": 4},
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [(), ("--int8",), ("--num-beams", "3"), ("--draft", "runs/tiny"), ("--repetition-penalty", "1.2"), ("--json",)],
    ids=str,
)
def test_generating(world: Tiny, options: tuple[str, ...]) -> None:
    arguments = ("generate", "line", "-c", "runs/tiny", "--max-new-tokens", "20", "--seed", "1", *options)
    assert run(world, *arguments) == run(world, *arguments)


def test_measuring_and_looking(world: Tiny) -> None:
    figures = [
        json.loads(run(world, "eval", "-c", "runs/tiny", "--data", "text.txt", "--json", "-q", "--device", device))
        for device in ("cuda", "cpu")
    ]
    assert figures[0]["bits_per_byte"] == pytest.approx(figures[1]["bits_per_byte"], rel=0.02)
    run(world, "doctor", "-c", "runs/tiny")
    run(world, "inspect", "next", "-c", "runs/tiny", "line 1: the square")


def make(**shape: object) -> GPT:
    base = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 32, "vocab_size": 70, "init_std": 0.3}
    model = GPT(ModelConfig(**{**base, **shape}))  # type: ignore[arg-type]
    model.init_weights(0)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler"))]
)
def test_graphs_write_what_a_cpu_writes(shape: dict[str, object], compiled: bool) -> None:
    """Rows join and leave, views slide, caches grow."""
    params = SamplingParams(max_new_tokens=40, temperature=0.0)
    prompts = [[1, 2, 3], [4], list(range(20)), [7, 7, 7]]
    written = []
    for device in ("cpu", "cuda"):
        engine = Engine(make(**shape).to(device))
        if compiled and device == "cuda":
            engine.compile()
        for rows in (4, 2):
            written.append(sorted((t.key, t.id) for t in engine.tokens(prompts, params, max_rows=rows)))
    assert all(tokens == written[0] for tokens in written)


def test_a_graph_follows_the_weights() -> None:
    model, params = make().cuda(), SamplingParams(max_new_tokens=8, temperature=0.0)
    engine = Engine(model, dtype=torch.bfloat16)  # as a policy is asked: fp32 weights, bf16 arithmetic
    before = [t.id for t in engine.tokens([[1, 2, 3]], params)]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1.5)
    after = [t.id for t in engine.tokens([[1, 2, 3]], params)]
    assert before != after
    assert after == [t.id for t in Engine(model, dtype=torch.bfloat16).tokens([[1, 2, 3]], params)]


def test_int8_costs_little() -> None:
    model = make().cuda()
    ids = torch.randint(0, 70, (4, 32), device="cuda")
    with torch.no_grad():
        exact = model(ids).logits.log_softmax(-1)
        rounded = pack(make().cuda(), int8=True)(ids).logits.log_softmax(-1)
    assert (exact - rounded).abs().mean() < 0.1
