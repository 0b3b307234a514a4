"""Files and streams through a task head: predictions beside what was read, and figures where labels are known."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptcli.data.examples import ExampleReader
from gptcli.data.sources import OnBad, parse_jsonl, read_lines, suffix
from gptcli.data.tasks import Task, TaskExample
from gptcli.errors import UserError
from gptcli.eval.finetune import Prediction, TaskModel, figures

STDIN = "-"
BATCH = 64
JSON_LINES = (".jsonl", ".ndjson", ".json")
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One line to label: where it stands, and how."""

    place: str
    line: str
    value: TaskExample


def read_items(source: str, task: Task, on_bad: OnBad) -> Iterator[Item]:
    """The lines of a file or of stdin ("-"): JSON objects where the name says so, on stdin where the first begins
    with "{"; else each line is a text. `on_bad` gets the complaint, FILE:LINE: reason, of one that does not fit."""
    if source == STDIN:
        name, lines = "<stdin>", iter(sys.stdin.buffer)
        first = next(lines, b"")
        is_json, lines = first.lstrip().startswith(b"{"), itertools.chain([first] * bool(first), lines)
    else:
        name, lines, is_json = source, read_lines(Path(source)), suffix(Path(source)) in JSON_LINES
    if not is_json and task.task != "classification":
        raise UserError(f"{name}: {task.task} has several texts; give a line of JSON for each")
    rows = parse_jsonl(lines, name, on_bad=on_bad) if is_json else _texts(lines, name, on_bad)
    for number, row in rows:
        try:
            line = json.dumps(row, ensure_ascii=False) if is_json else row["text"]
            value = task.parse(row) if is_json else Task(task.task).parse(row)
            yield Item(f"{name}:{number}", line, value)
        except UserError as error:
            on_bad(UserError(f"{name}:{number}: {error}"))


def _texts(lines: Iterable[bytes], name: str, on_bad: OnBad) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        try:
            yield number, {"text": line.decode("utf-8").removesuffix("\n").removesuffix("\r")}
        except UnicodeDecodeError:
            on_bad(UserError(f"{name}:{number}: not UTF-8"))


def label(model: TaskModel, items: Iterable[Item], batch_size: int, on_bad: OnBad) -> Iterator[tuple[Item, Prediction]]:
    """Each item with its prediction, in order, `batch_size` at once."""
    for chunk in _chunks(items, batch_size):
        for item, found in zip(chunk, model.predict([item.value for item in chunk]), strict=True):
            if isinstance(found, UserError):
                on_bad(UserError(f"{item.place}: {found}"))
            else:
                yield item, found


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size`; where reading fails, those before it come first."""
    stream, end = iter(items), None
    while end is None:
        chunk: list[T] = []
        try:
            while len(chunk) < size:
                chunk.append(next(stream))
        except (StopIteration, UserError) as error:
            end = error
        if chunk:
            yield chunk
    if isinstance(end, UserError):
        raise end


def evaluate_task(
    model: TaskModel,
    specs: list[str],
    *,
    skip_bad: bool,
    write: Callable[[dict[str, Any]], None],
    limit: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Predict every example of `specs` (the first `limit`), give each as a row to `write`, and return the figures over
    those that have labels, with what was skipped."""
    task = model.task
    reader = ExampleReader(specs, task.parse, skip_bad=skip_bad, advice=" (--skip-bad leaves such lines out)")
    probabilities: list[list[float]] = []
    truth: list[float] = []
    n = 0
    items = (Item(example.place, "", example.value) for example in reader)
    chosen = itertools.islice(_true_labels(items, task, reader.bad), limit)
    for item, found in label(model, chosen, BATCH, reader.bad):
        n += 1
        row = {"id": n if item.value.id is None else item.value.id, **found.row(task)}
        if item.value.label is not None:
            probabilities.append(found.probabilities)
            truth.append(task.truth(item.value))
            row["label"] = item.value.label
        write(row)
    if not n:
        raise UserError(
            f"{', '.join(specs)}: no examples" + (f" that fit ({reader.skipped[0]})" if reader.skipped else "")
        )
    found_figures = figures(task, probabilities, truth) if truth else {}
    if "accuracy" in found_figures and len(truth) > 1:
        a = found_figures["accuracy"]
        found_figures["stderr"] = math.sqrt(a * (1 - a) / (len(truth) - 1))
    return {**found_figures, "n": n, "labelled": len(truth), "skipped": len(reader.skipped)}, reader.skipped


def _true_labels(items: Iterable[Item], task: Task, on_bad: OnBad) -> Iterator[Item]:
    """Those whose label, where there is one, is one of the task's."""
    for item in items:
        try:
            if item.value.label is not None:
                task.truth(item.value)
        except UserError as error:
            on_bad(UserError(f"{item.place}: {error}"))
        else:
            yield item
