"""A source of batches with frozen models in it: when its queue is empty it generates, scores and queues anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptcli.config.plan import TrainPlan
from gptcli.config.schema import SamplingParams
from gptcli.config.tuning import RolloutBlock
from gptcli.contracts import IGNORE_INDEX, Batch
from gptcli.dist.runtime import Runtime
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.randomness import Permutation, derive
from gptcli.rlhf.kl import KLController, k1
from gptcli.rlhf.reference import Opinion, judge
from gptcli.rlhf.rewards import Rewards, Sample
from gptcli.rlhf.sequences import masked_mean, pass_order, response_rows
from gptcli.tokenizer import Tokenizer

GENERATED_TOGETHER = 256  # rows


@dataclass(frozen=True)
class Rollout:
    """Responses and what is thought of them; (R, T) per token, (R,) per response."""

    tokens: Tensor
    targets: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor  # missing-EOS penalty included
    ended: Tensor

    @property
    def mask(self) -> Tensor:
        return self.targets != IGNORE_INDEX

    @property
    def kl(self) -> Tensor:
        """(R, T): k1, 0 outside the response."""
        return torch.where(self.mask, k1(self.logprobs, self.ref_logprobs), 0.0)


# What to learn from a rollout, given the price of KL: tensors of the batches beside tokens and targets; and figures.
Lesson = Callable[[Rollout, float], tuple[dict[str, Tensor], dict[str, float]]]
Prompt = tuple[str, list[int]]


class RolloutSource:
    """K epochs of mini-batches over each rollout.

    Each process generates and judges every dp_size-th response; then all of them hold the whole rollout, so that
    statistics, groups and shuffles are the same however many there are, and any of them can save the queue.
    Prompts, draws and shuffles are derived from the seed and the rollout's number. The queue itself is saved: it
    came from a policy that has moved on since.
    """

    def __init__(
        self,
        policy: GPT,
        reference: GPT,
        engine: Engine,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        lesson: Lesson,
        kl: KLController,
        *,
        block: RolloutBlock,
        sampling: SamplingParams,
        group_size: int,
        epochs: int,
        weight: Callable[[Tensor], int],
        plan: TrainPlan,
        runtime: Runtime,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self._policy, self._reference, self._engine = policy, reference, engine
        self._prompts, self._rewards, self._lesson, self._kl = prompts, rewards, lesson, kl
        self._block, self._sampling, self._group, self._epochs = block, sampling, group_size, epochs
        self._weight, self._plan, self._runtime, self._seed, self._dtype = weight, plan, runtime, seed, dtype
        self._tokenizer = engine.require_tokenizer()
        self._ends = end_ids(self._tokenizer, sampling, block)
        self._minibatches = block.rollout_batch_size // plan.global_batch_size
        self._rollouts, self._position = 0, 0  # rollouts made; steps taken of the last
        self._queue: dict[str, Tensor] = {}
        self.metrics: dict[str, float] = {}

    # ---- the source ----------------------------------------------------------------------------------------

    def next_step(self) -> list[Batch]:
        if not self._queue:
            self._queue, self.metrics = self._make_queue()
            self._rollouts, self._position = self._rollouts + 1, 0
        mine = self._rows_of(self._position)[self._runtime.dp_rank :: self._runtime.dp_size]
        micro = self._plan.micro_batch_size
        batches = [self._batch(mine[i : i + micro]) for i in range(0, len(mine), micro)]
        self._position += 1
        if self._position == self._epochs * self._minibatches:
            self._queue = {}
        return batches

    def _rows_of(self, position: int) -> np.ndarray:
        """The rows of a mini-batch: the first epoch's in the order in which they were judged, later ones shuffled."""
        epoch, number = divmod(position, self._minibatches)
        size = self._plan.global_batch_size
        rows = np.arange(number * size, (number + 1) * size)
        if epoch == 0:
            return rows
        key = derive(self._seed, "rollout order", self._rollouts, epoch)
        return Permutation(self._block.rollout_batch_size, key)[rows]

    def _batch(self, rows: np.ndarray) -> Batch:
        chosen = {name: tensor[rows] for name, tensor in self._queue.items()}
        mask = chosen["targets"] != IGNORE_INDEX
        return Batch(chosen, weight=self._weight(mask), tokens=int(mask.sum()))

    def state_dict(self) -> dict[str, Any]:
        queue = {f"queue.{name}": tensor for name, tensor in self._queue.items()}
        return {
            "rollouts": self._rollouts,
            "position": self._position,
            "kl_coef": self._kl.coef,
            "metrics": self.metrics,
            **queue,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rollouts, self._position = int(state["rollouts"]), int(state["position"])
        self._kl.coef, self.metrics = float(state["kl_coef"]), dict(state["metrics"])
        queue = {name.removeprefix("queue."): t for name, t in state.items() if name.startswith("queue.")}
        self._queue = {name: t.to(self._runtime.device) for name, t in queue.items()}

    # ---- a rollout -----------------------------------------------------------------------------------------

    def _make_queue(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Changes nothing but the price of KL, and that at the end: what fails on the way can be tried again."""
        self._policy.eval()
        rollout = self._roll()
        self._policy.train()
        tensors, metrics = self._lesson(rollout, self._kl.coef)
        kl = rollout.kl.sum(1).mean().item()
        metrics = {**self._figures(rollout, kl), **metrics}
        self._kl.update(kl, len(rollout.tokens))
        return {"tokens": rollout.tokens, "targets": rollout.targets, **tensors}, metrics

    def _roll(self) -> Rollout:
        rt, count = self._runtime, self._block.rollout_batch_size
        prompts = [self._prompts[i] for i in self._prompt_numbers(count)]
        mine = list(range(rt.dp_rank, count, rt.dp_size))
        responses = self._generate([prompts[i][1] for i in mine], mine)
        tokens, targets = self._gather_rows(prompts, responses, mine)
        policy, reference = (
            self._judge(model, tokens[mine], targets[mine]) for model in (self._policy, self._reference)
        )
        samples = self._samples(prompts, targets)
        ended = torch.tensor([sample.ended for sample in samples], device=rt.device)
        scores = self._rewards(samples).to(rt.device) - self._block.missing_eos_penalty * ~ended

        def of_all(part: Tensor) -> Tensor:
            whole = torch.zeros(tokens.shape, device=rt.device)
            whole[mine] = part
            return rt.all_sum(whole)

        return Rollout(
            tokens,
            targets,
            logprobs=of_all(policy.logprobs),
            ref_logprobs=of_all(reference.logprobs),
            entropy=of_all(policy.entropy),
            values=of_all(policy.values),
            scores=scores,
            ended=ended,
        )

    def _judge(self, model: GPT, tokens: Tensor, targets: Tensor) -> Opinion:
        """At the temperature that the responses are drawn at, as in training."""
        temperature, rows = self._sampling.temperature, self._plan.micro_batch_size
        return judge(model, tokens, targets, temperature=temperature, rows=rows, dtype=self._dtype)

    def _prompt_numbers(self, count: int) -> list[int]:
        """The rollout's prompts, each for a whole group."""
        groups = count // self._group
        numbers = range(self._rollouts * groups, (self._rollouts + 1) * groups)
        order = pass_order(len(self._prompts), self._seed, "prompt order", numbers)
        return [number for number in order for _ in range(self._group)]

    def _generate(self, prompts: Sequence[Sequence[int]], streams: Sequence[int]) -> list[list[int]]:
        """Responses, the token that ended them included."""
        responses: list[list[int]] = [[] for _ in prompts]
        params = replace(self._sampling, seed=derive(self._seed, "rollout", self._rollouts))
        for token in self._engine.tokens(
            prompts, params, streams, logprobs=False, max_rows=min(len(prompts), GENERATED_TOGETHER)
        ):
            responses[int(token.key)].append(token.id)  # type: ignore[call-overload]
        return [truncate(ids, self._ends, self._block.stop_after) for ids in responses]

    def _gather_rows(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], mine: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """tokens and targets (R, T) of all processes' responses, as wide as the longest row needs."""
        rt = self._runtime
        room = max(len(ids) for _, ids in prompts) + self._sampling.max_new_tokens - 1
        rows = response_rows([prompts[i][1] for i in mine], responses, room)
        both = torch.zeros(2, len(prompts), room, dtype=torch.long, device=rt.device)
        both[:, mine] = torch.stack(rows).to(rt.device)
        tokens, targets = rt.all_sum(both)
        width = int((targets != IGNORE_INDEX).any(0).nonzero().max()) + 1
        return tokens[:, :width], targets[:, :width]

    def _samples(self, prompts: Sequence[Prompt], targets: Tensor) -> list[Sample]:
        samples = []
        for (text, ids), row in zip(prompts, targets.tolist(), strict=True):
            response = [token for token in row if token != IGNORE_INDEX]
            ended = response[-1] in self._ends or not self._ends
            shown = response[:-1] if response[-1] == self._tokenizer.eos_id else response
            samples.append(Sample(ids, response, text, self._tokenizer.decode(shown), ended))
        return samples

    def _figures(self, rollout: Rollout, kl: float) -> dict[str, float]:
        lengths = rollout.mask.sum(1).float()
        score = rollout.scores.mean().item()
        return {
            "score": score,
            "score_std": rollout.scores.std(correction=0).item(),
            "reward": score - self._kl.coef * kl,
            "kl": kl,
            "kl_coef": self._kl.coef,
            "entropy": masked_mean(rollout.entropy, rollout.mask).item(),
            "response_length": lengths.mean().item(),
            "eos_rate": rollout.ended.float().mean().item(),
        }


def end_ids(tokenizer: Tokenizer, sampling: SamplingParams, block: RolloutBlock) -> list[int]:
    """The tokens that end a response; none where all are of one length. Raises UserError for a stop that is none."""
    ends = [] if sampling.ignore_eos or tokenizer.eos_id is None else [tokenizer.eos_id]
    if block.stop_token is not None:
        ids = tokenizer.encode(block.stop_token, parse_special=True)
        if len(ids) != 1:
            raise UserError(f"stop_token: {block.stop_token!r} is {len(ids)} tokens, and a stop is one")
        ends += ids
    return ends


def truncate(ids: list[int], ends: Sequence[int], after: int) -> list[int]:
    """The response up to the first end at or after place `after`, that token included; all of it if none comes."""
    return next((ids[: i + 1] for i in range(after, len(ids)) if ids[i] in ends), ids)
