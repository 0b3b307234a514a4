"""What an evaluation found, as a value and as a JSON file. No torch here: `gpt compare` and `gpt report` read these."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gptcli.errors import UserError
from gptcli.files import publish_text

FORMAT = "gptcli-eval"
FORMAT_VERSION = 1
HIGHEST_LOG = 700.0  # beyond this exp overflows; a perplexity of 1e304 says enough

# what is done to a mean: the function and its derivative, for the standard error
TRANSFORMS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "mean": (lambda mean: mean, lambda mean: 1.0),
    "exp": (lambda mean: math.exp(min(mean, HIGHEST_LOG)), lambda mean: math.exp(min(mean, HIGHEST_LOG))),
    "bits": (lambda mean: mean / math.log(2), lambda mean: 1 / math.log(2)),
}


class Estimate(NamedTuple):
    value: float
    stderr: float | None  # None for fewer than two items


@dataclass(frozen=True)
class Aggregate:
    """How a metric follows from the items: `then` of (sum of the items' `value`) / (sum of their `over`, or how many
    they are). An accuracy is Aggregate("acc"), a perplexity Aggregate("nll", over="tokens", then="exp")."""

    value: str
    over: str | None = None
    then: str = "mean"

    def __call__(self, items: Sequence[dict[str, Any]]) -> Estimate:
        """The figure, and its standard error if the items are drawn independently (linearised where it is no mean)."""
        values = [float(item[self.value]) for item in items]
        weights = [float(item[self.over]) if self.over else 1.0 for item in items]
        function, slope = TRANSFORMS[self.then]
        n, mean = len(values), math.fsum(values) / math.fsum(weights)
        if n < 2:
            return Estimate(function(mean), None)
        spread = math.fsum((v - mean * w) ** 2 for v, w in zip(values, weights, strict=True))
        stderr = math.sqrt(spread / (n * (n - 1))) / (math.fsum(weights) / n)
        return Estimate(function(mean), abs(slope(mean)) * stderr)


@dataclass(frozen=True)
class Result:
    """One task on one checkpoint.

    metrics: by name, the task's main one first. stderr: of those that have one. aggregates: how metrics follow from
    the items (a corpus measure such as BLEU has none). settings: all else that decides the figures. prompt_hash:
    sha256 over all requests, so that equal hashes are equal questions. groups: the metrics of parts (BLiMP's
    phenomena). items: {"id", "<metric>": value, ...} for each.
    """

    task: str
    metrics: dict[str, float]
    n: int
    checkpoint: str
    tokenizer: str
    prompt_hash: str
    stderr: dict[str, float] = field(default_factory=dict)
    aggregates: dict[str, Aggregate] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)

    @property
    def main(self) -> str:
        """The name of the metric to compare by."""
        return next(iter(self.metrics))

    def to_json(self, *, items: bool = True) -> dict[str, Any]:
        """Each metric by its name, its standard error as NAME_stderr; `stderr` is the main metric's."""
        tree: dict[str, Any] = {"task": self.task, "metric": self.main, **self.metrics}
        if self.main in self.stderr:
            tree["stderr"] = self.stderr[self.main]
        tree |= {f"{name}_stderr": value for name, value in self.stderr.items()}
        tree |= {"n": self.n, "checkpoint": self.checkpoint, "tokenizer": self.tokenizer}
        tree |= {"settings": self.settings, "prompt_hash": self.prompt_hash}
        if self.groups:
            tree["groups"] = self.groups
        tree["metrics"] = list(self.metrics)
        tree["aggregates"] = {name: vars(how) for name, how in self.aggregates.items()}
        if items:
            tree["items"] = self.items
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Result:
        """Raises KeyError or TypeError for what to_json did not make."""
        names = tree["metrics"]
        return cls(
            task=tree["task"],
            metrics={name: tree[name] for name in names},
            n=tree["n"],
            checkpoint=tree["checkpoint"],
            tokenizer=tree["tokenizer"],
            prompt_hash=tree["prompt_hash"],
            stderr={name: tree[f"{name}_stderr"] for name in names if f"{name}_stderr" in tree},
            aggregates={name: Aggregate(**how) for name, how in tree["aggregates"].items()},
            settings=tree["settings"],
            groups=tree.get("groups", {}),
            items=tree.get("items", []),
        )


def results_tree(results: Sequence[Result], *, items: bool) -> dict[str, Any]:
    """One JSON object: a single result's own, or several under `results`."""
    if len(results) == 1:
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **results[0].to_json(items=items)}
    rows = [result.to_json(items=items) for result in results]
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "results": rows}


def write_results(path: Path, results: Sequence[Result]) -> None:
    """The file of `gpt eval -o`, items and all."""
    try:
        publish_text(path, json.dumps(results_tree(results, items=True), ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def read_results(path: Path) -> list[Result]:
    """The results of such a file. Raises UserError for any other."""
    try:
        tree = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UserError(f"{path}: not a file of `gpt eval -o FILE.json`")
    if tree.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: format_version {tree.get('format_version')}, this version reads {FORMAT_VERSION}")
    try:
        return [Result.from_json(row) for row in tree.get("results", [tree])]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error
