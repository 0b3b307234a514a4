"""Two results on the same items, held against each other."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from gptcli.errors import UserError, nearest
from gptcli.eval.results import TRANSFORMS, Aggregate, Result
from gptcli.eval.statistics import Ratio, paired_bootstrap

LOWER_IS_BETTER = ("perplexity", "ppl", "nll", "bits", "loss")  # metrics named so, alone or as a part


def lower_is_better(metric: str) -> bool:
    return any(word in metric for word in LOWER_IS_BETTER)


def compare_results(a: Result, b: Result, *, metric: str | None = None, seed: int = 0) -> dict[str, Any]:
    """What `gpt compare` says of one task. Raises UserError unless both answered the same questions."""
    metric = metric or a.main
    _same_questions(a, b)
    for result in (a, b):
        if metric not in result.metrics:
            raise UserError(
                f"{result.checkpoint}, {result.task}: no metric {metric!r}{nearest(metric, list(result.metrics))}; "
                f"it has {', '.join(result.metrics)}"
            )
    how = a.aggregates.get(metric)
    if how is None:
        raise UserError(f"{a.task}: {metric} is a figure of the whole corpus, not of its items, so it has no interval")
    first, second = paired_items(a, b)
    found = paired_bootstrap(_ratio(first, how), _ratio(second, how), seed=seed)
    better = None if found.p_value >= 0.05 else "A" if (found.difference < 0) != lower_is_better(metric) else "B"
    names = {"a": a.checkpoint, "b": b.checkpoint, "value_a": a.metrics[metric], "value_b": b.metrics[metric]}
    return {"task": a.task, "metric": metric, **names, **asdict(found), "better": better}


def paired_items(a: Result, b: Result) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The items of both in the same order, by id."""
    for result in (a, b):
        if len(result.items) < 2:
            raise UserError(
                f"{result.checkpoint}, {result.task}: {len(result.items)} items in this result; a comparison needs "
                "two or more: documents (a folder, several files, a .jsonl), or the file of `gpt eval -o`"
            )
    of_b = {item["id"]: item for item in b.items}
    if of_b.keys() != {item["id"] for item in a.items} or len(of_b) != len(a.items):
        raise UserError(f"{a.task}: the two results hold different items; evaluate both with the same --limit and data")
    return a.items, [of_b[item["id"]] for item in a.items]


def _same_questions(a: Result, b: Result) -> None:
    if a.task != b.task:
        raise UserError(f"{a.checkpoint} was measured on {a.task}, {b.checkpoint} on {b.task}: nothing to compare")
    if a.prompt_hash == b.prompt_hash:
        return
    differ = [name for name in sorted({*a.settings, *b.settings}) if a.settings.get(name) != b.settings.get(name)]
    settings = f" (they differ in {', '.join(differ)})" if differ else ""
    raise UserError(
        f"{a.task}: the two were not asked the same questions{settings}: prompt hash {a.prompt_hash[:12]} against "
        f"{b.prompt_hash[:12]}; evaluate both with the same settings and data"
    )


def _ratio(items: list[dict[str, Any]], how: Aggregate) -> Ratio:
    value = np.array([float(item[how.value]) for item in items])
    weight = np.array([float(item[how.over]) for item in items]) if how.over else np.ones(len(items))
    then, _ = TRANSFORMS[how.then]
    return Ratio(value, weight, float if how.then == "mean" else then)


def comparison_lines(row: dict[str, Any]) -> list[str]:
    """For people."""
    width, interval = max(len(row["a"]), len(row["b"])), f"95% interval {row['low']:+.4g} to {row['high']:+.4g}"
    lines = [
        f"{row['task']}, {row['metric']}, {row['n']:,} items",
        f"A  {row['a']:<{width}}  {row['value_a']:.4g}",
        f"B  {row['b']:<{width}}  {row['value_b']:.4g}",
        f"B - A  {row['difference']:+.4g} ({interval}), p = {row['p_value']:.2g}",
    ]
    if row["better"]:
        return [*lines, f"{row['better']} is better"]
    more = row["more_items"]
    if more is None or not math.isfinite(row["difference"]):
        return [*lines, "no difference to be seen"]
    return [*lines, f"chance alone may do this; a difference of this size needs about {more:,} more items"]
