"""A task of one's own: a YAML file, or a Python file that says `task = Task(...)`."""

from __future__ import annotations

import runpy
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptcli.config.keys import key
from gptcli.config.load import build, read_yaml
from gptcli.data.sources import HUB
from gptcli.errors import UserError
from gptcli.eval.task import Item, Row, Shape, Task, answer_item, choice_item, word_item
from gptcli.eval.textmetrics import BY_NAME


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """The keys of a task file. A template is text with columns in braces: "Question: {question}"."""

    name: str = key(..., "what results call it")
    about: str = key("", "one line on what it asks")
    kind: Literal["choice", "word", "text", "generate"] = key(
        ..., "likeliest choice, last word, likelihood, or writing"
    )
    data: str | None = key(None, "a .jsonl beside this file, or hf:NAME[:CONFIG][:SPLIT]; left out: give --data")
    examples: str | None = key(None, "the same for k-shot; left out: others of the data itself")
    num_fewshot: int = key(0, "solved examples before each item, unless --num-fewshot says otherwise", ge=0)
    separator: str = key("\n\n", "between examples")
    context: str = key("", "template of what comes before the answer; kind text: of the text")
    choices: list[str] = key([], "choice: templates of the choices")
    choices_from: str | None = key(None, "choice: or the column that holds a list of them")
    gold: str | None = key(None, "choice: the column with the right one: its number from 0, its text, or A, B, ...")
    target: str | None = key(None, "word, generate: template of the right answer")
    target_from: str | None = key(None, "generate: or the column that holds a list of right answers")
    metric: Literal["exact_match", "number", "bleu", "rouge"] = key("exact_match", "generate: how answers are judged")
    until: list[str] = key(["\n"], "generate: what ends an answer")
    max_new_tokens: int = key(256, "generate: where an answer ends at the latest", ge=1)


NEEDS = {"choice": ("gold",), "word": ("context", "target"), "text": ("context",), "generate": ("context",)}


def read_task(path: Path) -> Task:
    """Raises UserError naming file and key."""
    if not path.is_file():
        raise UserError(f"--task {path}: no such file")
    if path.suffix == ".py":
        try:
            task = runpy.run_path(str(path)).get("task")
        except (Exception, SystemExit) as error:
            raise UserError(f"{path}: cannot be run ({type(error).__name__}: {error})") from error
        if not isinstance(task, Task):
            raise UserError(f"{path}: must set `task` to a gptcli.eval.task.Task")
        return task
    spec = build(TaskFile, read_yaml(path), where=str(path))
    for name in NEEDS[spec.kind]:
        if not getattr(spec, name):
            raise UserError(f"{path}: {name}: missing; kind {spec.kind} needs it")
    if spec.kind == "choice" and bool(spec.choices) == bool(spec.choices_from):
        raise UserError(f"{path}: kind choice needs either choices or choices_from")
    if spec.kind == "generate" and bool(spec.target) == bool(spec.target_from):
        raise UserError(f"{path}: kind generate needs either target or target_from")
    columns = _columns(spec, path)
    return Task(
        spec.name, spec.about, spec.kind, (Shape(columns, lambda row: _item(spec, columns, row)),),
        _beside(path, spec.data), _beside(path, spec.examples), num_fewshot=spec.num_fewshot, separator=spec.separator,
        until=tuple(spec.until), max_new_tokens=spec.max_new_tokens, metric=BY_NAME[spec.metric],
    )  # fmt: skip


def _beside(path: Path, spec: str | None) -> str | None:
    return spec if spec is None or spec.startswith(HUB) else str(path.parent / spec)


def _columns(spec: TaskFile, path: Path) -> tuple[str, ...]:
    """Every column that the templates or keys name."""
    names = [name for name in (spec.choices_from, spec.gold, spec.target_from) if name]
    for template in (spec.context, spec.target or "", *spec.choices):
        try:
            names += [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise UserError(f"{path}: template {template!r}: {error}; a brace itself is written twice") from None
    return tuple(dict.fromkeys(names))


def _item(spec: TaskFile, columns: Sequence[str], row: Row) -> Item:
    if empty := [name for name in columns if row[name] is None]:
        raise ValueError(f"{empty[0]} is null")
    context = spec.context.format_map(row)
    if spec.kind == "text":
        if not context.strip():
            raise ValueError("the text is empty")
        return Item(((context, ""),), words=len(context.split()), bytes=len(context.encode()))
    if spec.kind == "word":
        return word_item(context, (spec.target or "").format_map(row))
    if spec.kind == "generate":
        answers = row[spec.target_from] if spec.target_from else [(spec.target or "").format_map(row)]
        return answer_item(context, [answers] if isinstance(answers, str) else list(answers))
    choices = row[spec.choices_from] if spec.choices_from else [choice.format_map(row) for choice in spec.choices]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{spec.choices_from or 'choices'}: expected a list of two choices or more")
    return choice_item(context, choices, _number(row[spec.gold or ""], choices), delimiter=" " if context else "")


def _number(gold: Any, choices: Sequence[str]) -> int:
    """Which choice a column means: by number, by its text, or by a letter."""
    if isinstance(gold, str) and gold in choices:
        return list(choices).index(gold)
    if isinstance(gold, str) and len(gold) == 1 and gold in string.ascii_uppercase:
        return string.ascii_uppercase.index(gold)
    if isinstance(gold, float) and gold != int(gold):
        raise ValueError(f"{gold} is no number of a choice")
    return int(gold)
