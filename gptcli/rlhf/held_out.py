"""Validation of a policy: what it writes to held-out prompts, scored by the reward it learns from and by another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from gptcli.dist.runtime import Runtime
from gptcli.randomness import derive
from gptcli.rlhf.evaluations import FILE, Evaluation, find_turn, read_evaluations
from gptcli.rlhf.rewards import Rewards, Sample
from gptcli.rlhf.rollout import Prompt, Sampler
from gptcli.rlhf.sequences import pass_order
from gptcli.train.metrics import MetricsFile


class HeldOut:
    """`rows` responses at each validation, with the same prompts and draws each time, so that differences show the
    policy's change and not the prompts'. The first is of the reference, which writes `best_of` to each prompt."""

    def __init__(
        self,
        policy: Sampler,
        reference: Sampler,
        judge: Rewards | None,
        prompts: Sequence[Prompt],
        run_dir: Path,
        *,
        rows: int,
        best_of: int,
        resume_step: int,
        runtime: Runtime,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self._policy, self._reference, self._judge, self._best_of = policy, reference, judge, best_of
        self._seed, self._run_dir, self._say = derive(seed, "held-out draws"), run_dir, say
        rows = max(rows, runtime.dp_size)  # something for each process
        order = pass_order(len(prompts), seed, "held-out prompts", range(rows))
        self._prompts = [prompts[i] for i in order]
        self._done = [e for e in read_evaluations(run_dir) if e.step <= resume_step] if resume_step else []
        self._file = MetricsFile(run_dir / FILE, resume_step) if runtime.is_main else None

    def measure(self, step: int) -> dict[str, float]:
        """val_loss is the held-out reward with its sign turned, or the trained one's if there is no other."""
        if not self._done:
            samples = self._reference.respond(self._prompts * self._best_of, self._seed)[0]
            self._add(0, 0.0, samples, self._reference.score(samples).tolist())
        rollout = self._policy.rollout(self._prompts, self._seed)
        kl = rollout.kl.sum(1).mean().item()
        now = self._add(step, kl, rollout.samples, rollout.scores.tolist())
        if (turn := find_turn(self._done)) is not None:
            self._say(f"{turn}; {self._run_dir / 'best'} is the best so far by the held-out reward")
        figures = {"val_score": _mean(now.scores), "val_kl": kl}
        if now.held_out is not None:
            figures["val_held_out_reward"] = _mean(now.held_out)
        return {"val_loss": -figures.get("val_held_out_reward", figures["val_score"]), **figures}

    def _add(self, step: int, kl: float, samples: Sequence[Sample], scores: list[float]) -> Evaluation:
        evaluation = Evaluation(
            step,
            kl,
            prompts=[text for text, _ in self._prompts],
            responses=[sample.response for sample in samples],
            lengths=[len(sample.response_ids) for sample in samples],
            scores=scores,
            held_out=None if self._judge is None else self._judge(samples).tolist(),
        )
        self._done.append(evaluation)
        if self._file is not None:
            self._file.write(dataclasses.asdict(evaluation))
        return evaluation


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
