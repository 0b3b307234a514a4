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

    samples: list[Sample]
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


class Sampler:
    """Responses of the engine's model, the policy, as training draws and scores them.

    Each process generates and judges every dp_size-th response; then all of them hold all of them.
    """

    def __init__(
        self,
        engine: Engine,
        reference: GPT,
        rewards: Rewards,
        *,
        block: RolloutBlock,
        sampling: SamplingParams,
        judged_together: int,
        runtime: Runtime,
    ) -> None:
        """judged_together: as many rows as training sees in one forward, so that there the first ratios are 1."""
        self._engine, self._reference, self._rewards, self._rows = engine, reference, rewards, judged_together
        self._block, self._sampling, self._runtime = block, sampling, runtime
        self._tokenizer = engine.require_tokenizer()
        self._ends = end_ids(self._tokenizer, sampling, block)

    def rollout(self, prompts: Sequence[Prompt], seed: int) -> Rollout:
        """A response to each prompt; `seed` and a prompt's place decide it."""
        model = self._engine.model
        was_training = model.training
        model.eval()
        samples, tokens, targets = self.respond(prompts, seed)
        policy, reference = (self._judge(asked, tokens, targets) for asked in (model, self._reference))
        model.train(was_training)
        return Rollout(
            samples,
            tokens,
            targets,
            logprobs=policy.logprobs,
            ref_logprobs=reference.logprobs,
            entropy=policy.entropy,
            values=policy.values,
            scores=self.score(samples).to(self._runtime.device),
            ended=torch.tensor([sample.ended for sample in samples], device=self._runtime.device),
        )

    def respond(self, prompts: Sequence[Prompt], seed: int) -> tuple[list[Sample], Tensor, Tensor]:
        """Samples, and their tokens and targets (R, T)."""
        mine = self._mine(len(prompts))
        responses = self._generate([prompts[i][1] for i in mine], mine, seed)
        tokens, targets = self._gather_rows(prompts, responses, mine)
        return self._samples(prompts, targets), tokens, targets

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """(R,) on the CPU, the penalty for an end that is missing taken off."""
        ended = torch.tensor([sample.ended for sample in samples])
        return self._rewards(samples) - self._block.missing_eos_penalty * ~ended

    def _mine(self, count: int) -> list[int]:
        return list(range(self._runtime.dp_rank, count, self._runtime.dp_size))

    def _generate(self, prompts: Sequence[Sequence[int]], streams: Sequence[int], seed: int) -> list[list[int]]:
        """Responses, the token that ended them included."""
        responses: list[list[int]] = [[] for _ in prompts]
        params = replace(self._sampling, seed=seed)
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

    def _judge(self, model: GPT, tokens: Tensor, targets: Tensor) -> Opinion:
        """At the temperature that the responses are drawn at, as in training."""
        rt, mine, dtype = self._runtime, self._mine(len(tokens)), self._engine.dtype
        temperature = self._sampling.temperature
        opinion = judge(model, tokens[mine], targets[mine], temperature=temperature, rows=self._rows, dtype=dtype)

        def of_all(part: Tensor) -> Tensor:
            whole = torch.zeros(tokens.shape, device=rt.device)
            whole[mine] = part
            return rt.all_sum(whole)

        return Opinion(of_all(opinion.logprobs), of_all(opinion.entropy), of_all(opinion.values))


class RolloutSource:
    """K epochs of mini-batches over each rollout.

    Every process holds the whole rollout, so that statistics, groups and shuffles are the same however many there are,
    and any of them can save the queue. Prompts, draws and shuffles are derived from the seed and the rollout's number.
    The queue itself is saved: it came from a policy that has moved on since. A resume with other sizes or epochs, by
    which its steps would be other ones, leaves the rest of it and begins with a new rollout.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        lesson: Lesson,
        kl: KLController,
        *,
        rollout_batch_size: int,
        group_size: int,
        epochs: int,
        weight: Callable[[Tensor], int],
        plan: TrainPlan,
        runtime: Runtime,
        seed: int,
    ) -> None:
        self._sampler, self._prompts, self._lesson, self._kl = sampler, prompts, lesson, kl
        self._size, self._group, self._epochs = rollout_batch_size, group_size, epochs
        self._weight, self._plan, self._runtime, self._seed = weight, plan, runtime, seed
        self._minibatches = rollout_batch_size // plan.global_batch_size
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
        return Permutation(self._size, key)[rows]

    def _batch(self, rows: np.ndarray) -> Batch:
        chosen = {name: tensor[rows] for name, tensor in self._queue.items()}
        mask = chosen["targets"] != IGNORE_INDEX
        return Batch(chosen, weight=self._weight(mask), tokens=int(mask.sum()))

    @property
    def _sizes(self) -> list[int]:
        """What a place in the queue depends on."""
        return [self._size, self._group, self._epochs, self._minibatches]

    def state_dict(self) -> dict[str, Any]:
        queue = {f"queue.{name}": tensor for name, tensor in self._queue.items()}
        return {
            "rollouts": self._rollouts,
            "position": self._position,
            "sizes": self._sizes,
            "kl_coef": self._kl.coef,
            "metrics": self.metrics,
            **queue,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rollouts, self._position = int(state["rollouts"]), int(state["position"])
        self._kl.resume(float(state["kl_coef"]))
        self.metrics = dict(state["metrics"])
        queue = {name.removeprefix("queue."): t for name, t in state.items() if name.startswith("queue.")}
        if state.get("sizes", self._sizes) != self._sizes:
            queue = {}
        self._queue = {name: t.to(self._runtime.device) for name, t in queue.items()}

    # ---- a rollout -----------------------------------------------------------------------------------------

    def _make_queue(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Changes nothing but the price of KL, and that at the end: what fails on the way can be tried again."""
        prompts = [self._prompts[i] for i in self._prompt_numbers(self._size)]
        rollout = self._sampler.rollout(prompts, derive(self._seed, "rollout", self._rollouts))
        tensors, metrics = self._lesson(rollout, self._kl.coef)
        kl = rollout.kl.sum(1).mean().item()
        metrics = {**self._figures(rollout, kl), **metrics}
        self._kl.update(kl, len(rollout.tokens))
        return {"tokens": rollout.tokens, "targets": rollout.targets, **tensors}, metrics

    def _prompt_numbers(self, count: int) -> list[int]:
        """The rollout's prompts, each for a whole group."""
        groups = count // self._group
        numbers = range(self._rollouts * groups, (self._rollouts + 1) * groups)
        order = pass_order(len(self._prompts), self._seed, "prompt order", numbers)
        return [number for number in order for _ in range(self._group)]

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
