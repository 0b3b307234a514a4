"""Section by section, the real stages reach a policy that is known exactly; with a bug put in they do not.

The mutations are the field's known bugs. Three that this task cannot see have tests of their own: another temperature
and dropout in tests/train/test_policy_objectives.py and tests/stages/test_rlhf.py, a score on the padding in
tests/rlhf/test_gae.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptcli.config.schema import GRPOBlock
from gptcli.contracts import IGNORE_INDEX
from gptcli.generate import Engine
from gptcli.modeldir import open_model_dir
from gptcli.rlhf import lessons, rollout
from gptcli.rlhf.kl import k1, k3
from gptcli.rlhf.rewards import RewardModel, Sample
from gptcli.train.objectives.ppo import PPO
from tests.rlhf.known_answer import FIXED, PROMPT, VARIABLE, Task, World

TASKS = {"fixed": FIXED, "variable": VARIABLE}
LR = 5e-3


def test_the_objective_falls_short_by_beta_times_the_gap(tmp_path: Path) -> None:
    """J(pi) = J* - beta * KL(pi || pi*), for any policy: what the other tests rest on."""
    world, beta = World(tmp_path, VARIABLE), 0.5
    reference, rewards = world.task.logprobs(world.reference), world.task.rewards()
    assert reference.exp().sum().item() == pytest.approx(1, abs=1e-5)
    best = world.task.best(world.reference)

    def objective(logp: torch.Tensor) -> float:
        return (logp.exp() * (rewards - beta * (logp - reference))).sum().item()

    some = torch.randn(len(rewards), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    gap = (some.exp() * (some - best)).sum().item()
    assert objective(some) == pytest.approx(objective(best) - beta * gap, abs=1e-4)


def test_a_few_steps_go_most_of_the_way(tmp_path: Path) -> None:
    world = World(tmp_path, FIXED)
    start = world.gap(world.reference)
    assert start > 1
    assert world.gap(world.rloo("few", 15, lr=1e-2)) < 0.2 * start


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("stage", ["ppo", "rloo", "dpo"])
def test_the_best_policy_is_reached(tmp_path: Path, stage: str, seed: int, task: str) -> None:
    world = World(tmp_path, TASKS[task])
    if stage == "ppo":
        policy, among = world.ppo("run", 400, seed=seed, lr=LR, ppo_epochs=2), None
    elif stage == "rloo":
        policy, among = world.rloo("run", 400, seed=seed, lr=LR), None
    else:  # pairs hold ended responses alone, and say nothing of how likely the others are
        policy, among = world.dpo("run", 400, seed=seed, lr=LR), world.task.comparable()
    gap = world.gap(policy, among=among)
    print(f"{stage} {task} seed {seed}: gap {gap:.4f}")
    assert gap <= 0.03


# ---- mutations ------------------------------------------------------------------------------------------------


def kl_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "k1", lambda logprobs, ref: -k1(logprobs, ref))


def k3_in_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "k1", k3)


def eos_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PPO.__call__

    def masked(self: PPO, model, batch):
        targets = batch["targets"].masked_fill(batch["targets"] == VARIABLE.letters, IGNORE_INDEX)
        return original(self, model, type(batch)({**batch.tensors, "targets": targets}, batch.weight, batch.tokens))

    monkeypatch.setattr(PPO, "__call__", masked)


def score_on_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def rewards(scores, kl, mask, kl_coef):
        first = mask.int().argmax(1)
        return torch.where(mask, -kl_coef * kl, 0.0).scatter_add(1, first[:, None], scores[:, None])

    monkeypatch.setattr(lessons, "token_rewards", rewards)


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the end is taken for part of the response."""
    original = rollout.response_rows

    def unmasked(prompts, responses, width=None):
        return original(prompts, [[*r, *[0] * (VARIABLE.length - len(r))] for r in responses], width)

    monkeypatch.setattr(rollout, "response_rows", unmasked)
    monkeypatch.setattr(rollout.Sampler, "_samples", samples_up_to_the_end)


def samples_up_to_the_end(self, prompts, targets):
    eos, samples = self._tokenizer.eos_id, []
    for (text, ids), row in zip(prompts, targets.tolist(), strict=True):
        response = [token for token in row if token != IGNORE_INDEX]
        ended = eos in response
        shown = response[: response.index(eos)] if ended else response
        samples.append(Sample(ids, response, text, self._tokenizer.decode(shown), ended))
    return samples


def shifted_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's log-probabilities are taken for those of the place before."""
    original = PPO.__call__

    def shifted(self: PPO, model, batch):
        def off_by_one(*args, **kwargs):
            out = model(*args, **kwargs)
            return out._replace(logprobs=out.logprobs.roll(1, dims=1))

        return original(self, off_by_one, batch)

    monkeypatch.setattr(PPO, "__call__", shifted)


MUTATIONS = [kl_sign, k3_in_the_reward, eos_masked, score_on_the_first_token, no_mask, shifted_logprobs]


@pytest.mark.slow
def test_known_bugs_miss_it_by_ten_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, VARIABLE)
    clean = world.gap(world.ppo("clean", 200, lr=LR, ppo_epochs=1))
    gaps = {"clean": clean}
    for mutation in MUTATIONS:
        with monkeypatch.context() as patch:
            mutation(patch)
            gaps[mutation.__name__] = world.gap(world.ppo(mutation.__name__, 200, lr=LR, ppo_epochs=1))
    print(json.dumps({name: round(gap, 4) for name, gap in gaps.items()}))
    assert all(gap >= 10 * clean for name, gap in gaps.items() if name != "clean"), gaps


# ---- GRPO as published ------------------------------------------------------------------------------------------

ONE_TOKEN = Task(
    letters=8,
    length=1,
    ends=False,
    reward='def score(prompts, responses):\n    return ["abcdefgh".index(r) / 8 for r in responses]\n',
)


@pytest.mark.slow
def test_k3_in_the_loss_ends_where_its_gradient_says(tmp_path: Path) -> None:
    """With one token and no scaling, k3's fixed point is pi = beta * reference / (lambda - r), not pi*."""
    world, beta = World(tmp_path, ONE_TOKEN), 0.5
    policy = world.rloo("k3", 400, lr=LR, kl_estimator="k3", ratio="token", baseline="leave_one_out")
    reference, rewards = world.task.logprobs(world.reference).exp(), world.task.rewards()
    low, high = rewards.max().item(), rewards.max().item() + 10
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * reference / (middle - rewards)).sum() > 1 else (low, middle)
    fixed_point = (beta * reference / (high - rewards)).log()
    found = world.task.logprobs(policy)
    assert (found.exp() * (found - fixed_point)).sum().item() < 0.01
    assert GRPOBlock(rollout_batch_size=8).kl_estimator == "k1"


# ---- a learned reward -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_learned_reward_is_near_the_true_one_and_ppo_reaches_its_optimum(tmp_path: Path) -> None:
    """Labels are drawn: no reward model is right more often than E[sigmoid(|r - r'|)]."""
    world = World(tmp_path, FIXED)
    # Drawn apart: a split by what a row says would give all of its repetitions, and so one label, to one side.
    drawn = {name: [str(world.write_pairs(n, seed, hard=True))] for name, n, seed in
             (("train", 20_000, 1), ("val", 5_000, 2))}  # fmt: skip
    tree = {
        "data": drawn,
        "optim": {"lr": LR},
        "train": {"max_steps": 400, "global_batch_size": 256, "micro_batch_size": 256, "eval_every": 400},
    }
    world.train("rlhf-reward", "rm", tree)
    task, reference = world.task, world.reference
    engine = Engine(reference, task.tokenizer)
    model = RewardModel(str(tmp_path / "rm"), task.tokenizer, engine.device, torch.float32)
    samples = [Sample([0], r, PROMPT, task.text(r), True) for r in task.responses()]
    learned, true = model(samples).double(), task.rewards()
    weights = task.logprobs(reference).exp()
    both = torch.stack([learned, true]).cov(aweights=weights)  # as often as they are compared
    pearson = (both[0, 1] / (both[0, 0] * both[1, 1]).sqrt()).item()
    first, second = weights.multinomial(200_000, True), weights.multinomial(200_000, True)
    kept = first != second
    bayes = torch.sigmoid((true[first] - true[second]).abs())[kept].mean().item()
    rows = [json.loads(line) for line in (tmp_path / "rm" / "metrics.jsonl").read_text().splitlines()]
    accuracy = rows[-1]["val_accuracy"]
    print(f"accuracy {accuracy:.4f} of at most {bayes:.4f}, Pearson {pearson:.4f}")
    assert accuracy > bayes - 0.02
    assert pearson > 0.98
    mean = (weights * learned).sum()
    assert abs(mean) < 0.3  # normalised on the reference's samples
    assert open_model_dir(tmp_path / "rm" / "latest").config.scalar_heads == {"reward": 1}
    ppo = world.ppo_on_checkpoint("ppo", 400, tmp_path / "rm", lr=LR, ppo_epochs=2)
    gap = world.gap(ppo, rewards=learned)
    print(f"gap to the optimum of the learned reward {gap:.4f}, of the true one {world.gap(ppo):.4f}")
    assert gap <= 0.03
