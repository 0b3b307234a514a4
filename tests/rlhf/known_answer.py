"""Tasks so small that every response can be written down, so that the best policy is known exactly.

With reward r and price beta of KL the best policy is pi* ~ reference * exp(r / beta), and what a policy falls short of
the best objective is beta * KL(policy || pi*): the gap, computed here over all responses.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from gptcli.config.load import build_recipe
from gptcli.config.schema import ModelConfig
from gptcli.dist.runtime import Runtime
from gptcli.model import GPT
from gptcli.modeldir import load_model, open_model_dir, save_model
from gptcli.rlhf.sequences import response_rows
from gptcli.stages.console import RunConsole
from gptcli.stages.job import run_stage
from gptcli.tokenizer import Tokenizer

BETA = 0.5
END = "<|endoftext|>"
PROMPT = "a"


@dataclass(frozen=True)
class Task:
    """`letters` begin the alphabet; with `ends` one more token is end-of-text, and a response may be shorter."""

    letters: int
    length: int
    ends: bool
    reward: str  # the source of a function of one response
    missing_eos_penalty: float = 0.0

    @property
    def tokenizer(self) -> Tokenizer:
        backend = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab={chr(97 + i): i for i in range(self.letters)}, merges=[])
        )
        backend.decoder = tokenizers.decoders.Fuse()
        if self.ends:
            backend.add_special_tokens([tokenizers.AddedToken(END, special=True, normalized=False)])
        return Tokenizer(backend)

    @property
    def config(self) -> ModelConfig:
        size = self.letters + self.ends
        return ModelConfig(
            n_layer=1,
            n_head=2,
            n_embd=32,
            context_length=8,
            vocab_size=size,
            vocab_pad_multiple=1,
            init_std=0.3,
            residual_init="plain",
        )

    def responses(self) -> list[list[int]]:
        """All there are, end-of-text included where it ends them."""
        letters = range(self.letters)
        whole = [list(r) for r in itertools.product(letters, repeat=self.length)]
        if not self.ends:
            return whole
        ended = [[*r, self.letters] for n in range(self.length) for r in itertools.product(letters, repeat=n)]
        return ended + whole

    def rewards(self) -> Tensor:
        names: dict[str, Any] = {}
        exec(self.reward, names)
        texts = [self.text(response) for response in self.responses()]
        finished = [not self.ends or r[-1] == self.letters for r in self.responses()]
        scores = torch.tensor(names["score"]([PROMPT] * len(texts), texts), dtype=torch.float64)
        return scores - self.missing_eos_penalty * ~torch.tensor(finished)

    def text(self, response: list[int]) -> str:
        return "".join(chr(97 + i) for i in response if i < self.letters)

    def comparable(self) -> Tensor:
        """Numbers of the responses that may stand in preference data: ended, and not empty."""
        ended = [i for i, r in enumerate(self.responses()) if not self.ends or (r[-1] == self.letters and len(r) > 1)]
        return torch.tensor(ended)

    def logprobs(self, model: GPT) -> Tensor:
        responses = self.responses()
        tokens, targets = response_rows([[0]] * len(responses), responses)
        with torch.no_grad():
            return model(tokens, targets=targets).logprobs.double().sum(1)

    def best(self, reference: GPT, rewards: Tensor | None = None, beta: float = BETA) -> Tensor:
        """log pi*"""
        return (self.logprobs(reference) + (self.rewards() if rewards is None else rewards) / beta).log_softmax(0)


# Token a counts once, and a response that ascends by one each step twice more.
FIXED = Task(
    letters=8,
    length=4,
    ends=False,
    reward="""
def score(prompts, responses):
    return [r.count("a") + 2.0 * (r in "abcdefgh") for r in responses]
""",
)
# Two letters and an end; going on to the last place costs one more.
VARIABLE = Task(
    letters=4,
    length=5,
    ends=True,
    missing_eos_penalty=1.0,
    reward="""
def score(prompts, responses):
    return [1.0 - abs(len(r) - 2) / 2 + 0.5 * r.count("b") for r in responses]
""",
)


@dataclass(frozen=True)
class World:
    """A folder with a task's files and its reference, in which the real stages run."""

    folder: Path
    task: Task

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True, parents=True)
        model = GPT(self.task.config)
        model.init_weights(0)
        (self.folder / "reference").mkdir(exist_ok=True)
        weights = dict(model.named_parameters())
        save_model(self.folder / "reference", self.task.config, weights, self.task.tokenizer)
        (self.folder / "reward.py").write_text(self.task.reward)
        (self.folder / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")

    @property
    def reference(self) -> GPT:
        return self.model("reference")

    def model(self, name: str) -> GPT:
        folder = self.folder / name
        return load_model(open_model_dir(folder / "latest" if (folder / "latest").exists() else folder))

    def train(self, stage: str, name: str, tree: dict[str, Any], **options: Any) -> GPT:
        """Run a stage's real code and load what it made."""
        optim = {"lr": 1e-2, "schedule": "linear", "min_lr_ratio": 0.0, "weight_decay": 0.0, "betas": [0.9, 0.95]}
        recipe = build_recipe(
            {
                "run": {"name": name, "dir": str(self.folder), "seed": 1, **tree.pop("run", {})},
                "init_from": str(self.folder / "reference"),
                "optim": {**optim, **tree.pop("optim", {})},
                "data": {"train": [str(self.folder / "prompts.jsonl")], **tree.pop("data", {})},
                "train": {"log_every": 0, "eval_every": 0, "save_every": 0, "seq_len": 8, **tree.pop("train")},
                "sampling": {"max_new_tokens": self.task.length},
                **tree,
            },
            where="test",
            stage=stage,
        )
        run_stage(recipe, Runtime(), RunConsole(quiet=True), **options)
        return self.model(name)

    def gap(self, policy: GPT, rewards: Tensor | None = None, among: Tensor | None = None) -> float:
        """KL(policy || pi*), exactly; among some responses alone, given that it is one of them."""
        mine, best = self.task.logprobs(policy), self.task.best(self.reference, rewards)
        if among is not None:
            mine, best = mine[among].log_softmax(0), best[among].log_softmax(0)
        return (mine.exp() * (mine - best)).sum().item()

    def ppo(self, name: str, steps: int, *, seed: int = 1, lr: float = 1e-2, **ppo: Any) -> GPT:
        """So many optimizer steps, four to a rollout of 256 responses."""
        block = {"kl_coef": BETA, "rollout_batch_size": 256, "missing_eos_penalty": self.task.missing_eos_penalty}
        return self._rollouts("rlhf-ppo", name, steps, seed, lr, {"ppo": {**block, **ppo}})

    def rloo(self, name: str, steps: int, *, seed: int = 1, lr: float = 1e-2, **grpo: Any) -> GPT:
        """So many optimizer steps, one to a rollout of 256 responses."""
        block = {"kl_coef": BETA, "rollout_batch_size": 256, "missing_eos_penalty": self.task.missing_eos_penalty}
        rloo = {"baseline": "leave_one_out", "scale": "none", "ratio": "sequence", "group_size": 256}
        return self._rollouts("rlhf-grpo", name, steps, seed, lr, {"grpo": {**block, **rloo, **grpo}})

    def ppo_on_checkpoint(self, name: str, steps: int, checkpoint: Path, *, lr: float, **ppo: Any) -> GPT:
        """The same on a reward model's scores."""
        block = {"kl_coef": BETA, "rollout_batch_size": 256, **ppo}
        tree = {"ppo": block, "reward": {"checkpoint": str(checkpoint)}}
        return self._rollouts("rlhf-ppo", name, steps, 1, lr, tree)

    def _rollouts(self, stage: str, name: str, steps: int, seed: int, lr: float, block: dict[str, Any]) -> GPT:
        tree = {
            "reward": {"function": f"{self.folder / 'reward.py'}:score"},
            **block,
            "run": {"seed": seed},
            "optim": {"lr": lr},
            "train": {"max_steps": steps, "global_batch_size": 256, "micro_batch_size": 256},
        }
        return self.train(stage, name, tree)

    def dpo(self, name: str, steps: int, *, seed: int = 1, lr: float = 1e-2, **dpo: Any) -> GPT:
        """On pairs of the reference's own samples with the true probability that the first is the better one."""
        tree = {
            "dpo": {"beta": BETA, **dpo},
            "data": {"train": [str(self.write_pairs(20_000, seed))], "val_fraction": 0.0},
            "run": {"seed": seed},
            "optim": {"lr": lr},
            "train": {"max_steps": steps, "global_batch_size": 256, "micro_batch_size": 256},
        }
        return self.train("rlhf-dpo", name, tree)

    def write_pairs(self, count: int, seed: int, *, hard: bool = False) -> Path:
        """Preferences among ended responses; hard: a label drawn with that probability."""
        task, generator = self.task, torch.Generator().manual_seed(seed)
        kept = task.comparable()
        chances = task.logprobs(self.reference)[kept].exp()
        pairs = kept[chances.multinomial(2 * count, replacement=True, generator=generator).view(-1, 2)]
        rewards, responses = task.rewards(), task.responses()
        draws = torch.rand(count, generator=generator)
        file = self.folder / f"pairs-{seed}-{hard}.jsonl"
        with file.open("w") as lines:
            for (a, b), draw in zip(pairs.tolist(), draws.tolist(), strict=True):
                p = torch.sigmoid(rewards[a] - rewards[b]).item()
                if hard:
                    (a, b), p = ((a, b) if draw < p else (b, a)), 1.0
                chosen, rejected = (task.text(responses[i]) for i in (a, b))
                if chosen != rejected:
                    row = {"prompt": PROMPT, "chosen": chosen, "rejected": rejected, "p_chosen": p}
                    lines.write(json.dumps(row) + "\n")
        return file
