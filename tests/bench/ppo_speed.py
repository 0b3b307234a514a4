"""A PPO step's parts, and its rollouts raced against transformers' generate with the same weights, interleaved.

python tests/bench/ppo_speed.py [--shape 1m|10m] [--prompts 64] [--rounds 7]

A step is what `gpt rlhf-ppo` does with one rollout: responses of 48 tokens to prompts of 16, their scoring (the
policy's and the reference's log-probabilities, values, a reward function), and 4 epochs of learning from them. Raced
are the samples a second of the responses alone; the whole rollout stands beside them. Once all responses have their
full length; once they end by themselves, as a trained policy's do: then a row that has ended costs ours nothing more.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch

from gptcli.cli.main import keep_freed_memory
from gptcli.config.load import build_recipe
from gptcli.config.plan import make_plan
from gptcli.config.schema import ModelConfig, Recipe
from gptcli.contracts import IGNORE_INDEX
from gptcli.dist.runtime import Runtime
from gptcli.exchange.transfer import export_hugging_face
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.model.extend import with_heads
from gptcli.modeldir import load_model, model_of, open_model_dir, read_weights, save_model
from gptcli.rlhf.kl import KLController
from gptcli.rlhf.lessons import ppo_lesson
from gptcli.rlhf.rewards import Rewards
from gptcli.rlhf.rollout import RolloutSource, Sampler
from gptcli.tokenizer import Tokenizer
from gptcli.train.loop import train_step
from gptcli.train.objectives.ppo import PPO
from gptcli.train.optim import make_optimizer
from gptcli.train.stop import StopSignal

SHAPES = {
    "1m": {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 256, "vocab_size": 2048},
    "10m": {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256, "vocab_size": 2048},
}
PROMPT, NEW, EPOCHS = 16, 48, 4
OURS = ("responses", "rollout")
REWARD = "def score(prompts, responses):\n    return [len(r) / 100 for r in responses]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    keep_freed_memory()  # as the command does
    for ends in (False, True):
        with tempfile.TemporaryDirectory() as name:
            write_files(Path(name), SHAPES[options.shape], options.prompts)
            print(json.dumps({"shape": options.shape, **measure(Path(name), options.rounds, ends)}), flush=True)


def measure(folder: Path, rounds: int, ends: bool) -> dict[str, Any]:
    parts: dict[str, list[float]] = {}
    ours, tokens = responses(folder, ends)
    step = partial(ppo_step(folder, ends), parts)
    theirs = transformers_racer(folder, ends)
    race({"responses": ours, "transformers": theirs, "step": step}, parts, rounds)
    seconds, count = {part: statistics.median(times) for part, times in parts.items()}, len(read_ids(folder))
    return {
        "tokens_per_response": round(statistics.mean(tokens) / count, 1),
        "threads": torch.get_num_threads(),
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "rollout_share_of_step": round(seconds["rollout"] / seconds["step"], 2),
        "samples_per_second": {p: round(count / seconds[p], 1) for p in (*OURS, "transformers")},
        "over_transformers": {p: round(median_ratio(parts["transformers"], parts[p]), 2) for p in OURS},
    }


def race(racers: dict[str, Callable[[], None]], parts: dict[str, list[float]], rounds: int) -> None:
    """Each in turn, round by round; the first round warms up."""
    for number in range(rounds + 1):
        for name, run in racers.items():
            started = time.perf_counter()
            run()
            parts.setdefault(name, []).append(time.perf_counter() - started)
        if number == 0:
            parts.clear()


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Of times that were taken beside each other."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def write_files(folder: Path, shape: dict[str, int], prompts: int) -> None:
    """The same weights for both sides, prompts, reward and recipe."""
    config = ModelConfig(**shape, vocab_pad_multiple=1)  # type: ignore[arg-type]
    model = GPT(config)
    model.init_weights(0)
    with torch.no_grad():  # end-of-text is likelier than the others: one token in 20 or so
        assert model.ln_f is not None
        model.ln_f.bias[0], model.wte.weight[-1] = 10.0, 0.0
        model.wte.weight[-1, 0] = math.log(model.vocab_size / 20) / 10
    (folder / "base").mkdir()
    save_model(folder / "base", config, dict(model.named_parameters()), words(model.vocab_size))
    export_hugging_face(folder / "base", folder / "hf", dtype=None, check_logits=False)
    ids = torch.randint(0, model.vocab_size - 1, (prompts, PROMPT), generator=torch.Generator().manual_seed(0))
    (folder / "prompts.json").write_text(json.dumps(ids.tolist()))
    (folder / "reward.py").write_text(REWARD)


def words(count: int) -> Tokenizer:
    """A tokenizer of so many tokens, the last of which is end-of-text."""
    vocabulary = {f"t{i}": i for i in range(count - 1)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    backend.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True, normalized=False)])
    return Tokenizer(backend)


def make_recipe(folder: Path, prompts: int, ends: bool) -> Recipe:
    tree: dict[str, Any] = {
        "init_from": str(folder / "base"),
        "data": {"train": ["prompts.jsonl"]},
        "reward": {"function": f"{folder / 'reward.py'}:score"},
        "sampling": {"max_new_tokens": NEW, "ignore_eos": not ends},
        "ppo": {"rollout_batch_size": prompts, "ppo_epochs": EPOCHS},
        "optim": {"lr": 1e-5},
        "train": {"max_steps": 10**6, "global_batch_size": prompts},
    }
    return build_recipe(tree, where="ppo_speed", stage="rlhf-ppo")


def make_sampler(folder: Path, recipe: Any, rows: int) -> tuple[GPT, Sampler]:
    """The policy with a value head, and what draws its responses in `gpt rlhf-ppo`."""
    base = open_model_dir(folder / "base")
    config, weights = with_heads(base.config, read_weights(base.path, base.config), {"value": 0.0}, seed=0)
    policy, tokenizer = model_of(config, weights).train(), base.require_tokenizer()
    sampler = Sampler(
        Engine(policy, tokenizer),
        load_model(base).requires_grad_(False),
        Rewards(recipe.reward, tokenizer, Runtime(), torch.float32),
        block=recipe.ppo,
        sampling=recipe.sampling,
        judged_together=rows,
        runtime=Runtime(),
    )
    return policy, sampler


def read_ids(folder: Path) -> list[list[int]]:
    return json.loads((folder / "prompts.json").read_text())


def responses(folder: Path, ends: bool) -> tuple[Callable[[], None], list[int]]:
    """The racer, and the tokens that it has written each time."""
    ids, tokens = read_ids(folder), list[int]()
    policy, sampler = make_sampler(folder, make_recipe(folder, len(ids), ends), len(ids))
    policy.eval()

    def run() -> None:
        _, _, targets = sampler.respond([("", row) for row in ids], seed=len(tokens))
        tokens.append(int((targets != IGNORE_INDEX).sum()))

    return run, tokens


def ppo_step(folder: Path, ends: bool) -> Callable[[dict[str, list[float]]], None]:
    """A rollout and all that is learned from it; both are timed into `parts`."""
    ids = read_ids(folder)
    recipe: Any = make_recipe(folder, len(ids), ends)
    policy, sampler = make_sampler(folder, recipe, len(ids))
    plan = make_plan(
        recipe, context_length=policy.config.context_length, dp_size=1, micro_batch_size=len(ids), on_cpu=True
    )
    source = RolloutSource(
        sampler,
        [("", row) for row in ids],
        partial(ppo_lesson, block=recipe.ppo),
        KLController(recipe.ppo.kl_coef),
        rollout_batch_size=len(ids),
        group_size=1,
        epochs=EPOCHS,
        weight=lambda mask: int(mask.sum()),
        plan=plan,
        runtime=Runtime(),
        seed=0,
    )
    objective = PPO(recipe.ppo.clip_range, recipe.ppo.value_clip, recipe.ppo.value_coef, temperature=1.0)
    optimizer = make_optimizer(policy, recipe.optim, policy.hidden_matrices())

    def run(parts: dict[str, list[float]]) -> None:
        started = time.perf_counter()
        batches, rolled = source.next_step(), time.perf_counter()
        for epoch in range(EPOCHS):
            batches = source.next_step() if epoch else batches
            train_step(
                policy, optimizer, batches, objective, epoch, plan, Runtime(), StopSignal(), 1.0, seed=0,
                dtype=torch.float32,
            )  # fmt: skip
        parts.setdefault("rollout", []).append(rolled - started)
        parts.setdefault("learning", []).append(time.perf_counter() - rolled)

    return run


def transformers_racer(folder: Path, ends: bool) -> Callable[[], None]:
    import transformers

    model, ids = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval(), torch.tensor(read_ids(folder))

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=0 if ends else NEW,
                do_sample=True,
                top_k=0,
                eos_token_id=model.config.vocab_size - 1,
                pad_token_id=0,
            )
        assert out.shape[1] == PROMPT + NEW or ends

    return run


if __name__ == "__main__":
    main()
