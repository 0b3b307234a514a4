"""What a run of PPO or GRPO has to tell beside its loss: reward against KL and best-of-n, lengths, what was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gptcli.report.chart import Points, chart
from gptcli.report.page import details, pre
from gptcli.rlhf.evaluations import Evaluation, best_of_curve, find_turn

# The rest of what is logged follows under its own name.
CURVES = {
    "score": ("score", "val_score"),
    "held-out reward": ("val_held_out_reward",),
    "KL (nats per response)": ("kl", "val_kl"),
    "entropy (nats per token)": ("entropy",),
    "response length (tokens)": ("response_length",),
    "end-of-text rate": ("eos_rate",),
    "clip fraction": ("clip_fraction",),
    "explained variance": ("explained_variance",),
}
SHOWN = 3  # prompts whose responses are shown at each validation


def is_rollout_run(metrics: Sequence[dict[str, Any]]) -> bool:
    return any("score" in row and "kl" in row for row in metrics)


def rollout_row(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """For scripts."""
    turn = find_turn(evaluations)
    return {
        "best_of_n": [dataclasses.asdict(point) for point in best_of_curve(evaluations[0])] if evaluations else [],
        "over_optimisation": None if turn is None else turn.to_json(),
    }


def rollout_overview(metrics: Sequence[dict[str, Any]], evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    last = next(row for row in reversed(metrics) if "score" in row)
    rows = [("Score", f"{last['score']:.4g}"), ("KL", f"{last['kl']:.3g} nats")]
    if evaluations:
        best = best_of_curve(evaluations[0])[-1]
        rows += [(f"Best of {best.n}", f"{best.score:.4g}"), ("Its KL, at most", f"{best.kl_bound:.3g} nats")]
    return rows


def frontier(metrics: Sequence[dict[str, Any]], evaluations: Sequence[Evaluation]) -> str:
    """Reward against KL beside best-of-n, on the same held-out prompts where there are some; length against reward."""
    if not evaluations:
        policy = [(row["kl"], row["score"]) for row in metrics if "score" in row]
        lengths = [(row["response_length"], row["score"]) for row in metrics if "score" in row]
        return (
            chart("reward against KL", {"policy": policy}, xlabel="KL, nats per response")
            + chart("reward against length, a dot a rollout", {"policy": lengths}, xlabel="tokens", dots=True)
            + '<p class="soft">No best-of-n baseline and no held-out reward: the run had no data.val.</p>'
        )
    best = best_of_curve(evaluations[0])
    policy = [(e.kl, _mean(e.scores)) for e in evaluations]
    charts = [
        chart(
            "reward against KL",
            {"policy": policy, "best of n": [(b.kl_bound, b.score) for b in best]},
            xlabel="KL, nats per response; of best of n at most ln n - (n - 1) / n",
        )
    ]
    if evaluations[0].held_out is not None:
        lines: dict[str, Points] = {
            "policy": [(e.kl, _mean(e.held_out)) for e in evaluations if e.held_out],
            "best of n by the trained reward": [(b.kl_bound, b.held_out) for b in best if b.held_out is not None],
        }
        charts.append(chart("held-out reward against KL", lines, xlabel="KL, nats per response"))
    dots = {
        f"policy, step {evaluations[-1].step}": _lengths(evaluations[-1]),
        "reference": _lengths(evaluations[0]),
    }
    charts.append(chart("reward against length, a dot a response", dots, xlabel="tokens", dots=True))
    return "".join(charts)


def written(evaluations: Sequence[Evaluation]) -> str:
    """The same few prompts at each validation, the newest first."""
    blocks = []
    for i, e in enumerate(reversed(evaluations)):
        texts = []
        for row in range(min(SHOWN, len(e.prompts))):
            other = "" if e.held_out is None else f", held-out reward {e.held_out[row]:.3g}"
            score = f'<p class="soft">score {e.scores[row]:.3g}{other}</p>'
            texts.append(score + pre(e.prompts[row] + e.responses[row]))
        who = "reference" if e.step == 0 else f"step {e.step:,}"
        blocks.append(details(who, "".join(texts), is_open=i == 0))
    return "".join(blocks)


def _lengths(evaluation: Evaluation) -> list[tuple[float, float]]:
    """Of one response to each prompt."""
    n = len(evaluation.prompts)
    return list(zip(map(float, evaluation.lengths[:n]), evaluation.scores[:n], strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
