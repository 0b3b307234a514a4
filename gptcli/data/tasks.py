"""GPT-1's tasks: how an example becomes rows of tokens for one model ("Improving Language Understanding by Generative
Pre-Training", section 3.3), and what the head's numbers mean.

S, D, E are the start, delimiter and extract tokens:
  classification    S text E
  entailment        S premise D hypothesis E
  similarity        S a D b E  and  S b D a E, whose final hidden states are added
  multiple choice   S context question D choice E  for each choice; the head's one number, softmax over the choices
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gptcli.config.schema import FinetuneBlock
from gptcli.errors import UserError, nearest
from gptcli.modeldir import read_json

START, DELIMITER, EXTRACT = SPECIAL_TOKENS = ("<|start|>", "<|delimiter|>", "<|extract|>")
HEAD = "task"  # the name of the head in ModelConfig.scalar_heads
FILE = "task.json"
COLUMNS = {
    "classification": ("text",),
    "entailment": ("premise", "hypothesis"),
    "similarity": ("text_a", "text_b"),
    "multiple_choice": ("context", "choices"),
}
SCORE_LEVELS = 6  # of similarity scores where the recipe does not say, as GPT-1's for STS-B


@dataclass(frozen=True)
class TaskExample:
    """The texts of each row (one part, or two around the delimiter), and the label as it stood in the file."""

    rows: tuple[tuple[str, ...], ...]
    label: Any
    id: Any = None


def parse_example(task: str, row: dict[str, Any], *, labelled: bool = True) -> TaskExample:
    """Raises UserError with the reason alone for a row that does not fit the task."""
    parts = [_text(row, column) for column in COLUMNS[task] if column != "choices"]
    if task == "multiple_choice":
        question = [_text(row, "question")] if row.get("question") else []
        context = " ".join([*parts, *question])
        rows: tuple[tuple[str, ...], ...] = tuple((context, choice) for choice in _choices(row))
    elif task == "similarity":
        rows = (tuple(parts), tuple(reversed(parts)))
    else:
        rows = (tuple(parts),)
    if labelled and row.get("label") is None:
        raise UserError(_missing("label", row))
    if isinstance(row.get("label"), str) and not row["label"].strip():
        raise UserError("label: is empty")
    return TaskExample(rows, row.get("label"), row.get("id"))


def _text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise UserError(_missing(column, row))
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{column}: expected text, not {json.dumps(text, default=str)[:40]}")
    if not text.strip():
        raise UserError(f"{column}: is empty")
    return text


def _choices(row: dict[str, Any]) -> list[str]:
    if "choices" not in row:
        raise UserError(_missing("choices", row))
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError("choices: expected a list of two texts or more")
    return [_text({f"choices[{i}]": choice}, f"choices[{i}]") for i, choice in enumerate(choices)]


def _missing(column: str, row: dict[str, Any]) -> str:
    if column in row:
        return f"{column}: is null"
    hint = nearest(column, list(row)) or f"; it has {', '.join(row) or 'none'}"
    return f"no column {column!r}{hint} (data.columns maps other names)"


@dataclass(frozen=True)
class Task:
    """What a finetuned checkpoint's head means; task.json keeps it beside the model.

    Classes have `labels`. Scores have `levels`, evenly spaced numbers: a score is a soft label over the two levels
    around it, and what is predicted is the expected level, as GPT-1 did for STS-B. Multiple choice has neither.
    """

    task: str
    labels: tuple[str, ...] = ()
    levels: tuple[float, ...] = ()
    truncate: bool = True
    columns: Mapping[str, str] = field(default_factory=dict)  # what the training data called ours

    def parse(self, row: dict[str, Any]) -> TaskExample:
        """An example with or without its label; the columns may have our names or those of the training data."""
        ours = {name: row[theirs] for name, theirs in self.columns.items() if theirs in row}
        return parse_example(self.task, {**row, **ours}, labelled=False)

    @property
    def is_choice(self) -> bool:
        return self.task == "multiple_choice"

    @property
    def head_width(self) -> int:
        return 1 if self.is_choice else len(self.labels) or len(self.levels)

    def truth(self, example: TaskExample) -> float:
        """The score, or the number of the class or the choice. Raises UserError for a label that is none."""
        if self.levels:
            return _number(example.label)
        if self.is_choice:
            return _choice_index(example)
        name = label_text(example.label)
        if name not in self.labels:
            raise UserError(f"unknown label {name!r}{nearest(name, self.labels)}; known: {_shown(self.labels)}")
        return self.labels.index(name)

    def target(self, example: TaskExample) -> list[float]:
        """The distribution over classes, levels or choices that the model should predict."""
        truth = self.truth(example)
        if self.levels:
            return self._soft(truth)
        length = len(example.rows) if self.is_choice else len(self.labels)
        return [float(i == truth) for i in range(length)]

    def _soft(self, score: float) -> list[float]:
        low, high = self.levels[0], self.levels[-1]
        place = (min(max(score, low), high) - low) / (high - low) * (len(self.levels) - 1)
        below = min(int(place), len(self.levels) - 2)
        out = [0.0] * len(self.levels)
        out[below], out[below + 1] = 1 - (place - below), place - below
        return out

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Task:
        """Raises UserError for a checkpoint that `gpt finetune` did not make."""
        file = folder / FILE
        tree = read_json(file, missing=f"{folder}: has no task head ({FILE}); make one with `gpt finetune`")
        try:
            return cls(
                tree["task"], tuple(tree["labels"]), tuple(tree["levels"]), tree["truncate"], dict(tree["columns"])
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}: damaged ({error})") from error


def make_task(block: FinetuneBlock, examples: Iterable[TaskExample], columns: Mapping[str, str]) -> Task:
    """The task of a recipe, its labels or levels taken from the training examples where the recipe names none."""
    make = partial(Task, block.task, truncate=block.truncate, columns=dict(columns))
    if block.task == "multiple_choice":
        return make()
    if block.scores:
        return make(levels=_levels([_number(e.label) for e in examples], block.n_classes or SCORE_LEVELS))
    labels = tuple(block.labels) or tuple(sorted({label_text(e.label) for e in examples}))
    if len(labels) < 2:
        raise UserError(f"finetune: every training example has the label {labels[0]!r}; there is nothing to learn")
    if block.n_classes not in (None, len(labels)):
        raise UserError(f"finetune.n_classes: {block.n_classes}, but there are {len(labels)} labels: {_shown(labels)}")
    return make(labels=labels)


def _levels(scores: Sequence[float], n: int) -> tuple[float, ...]:
    low, high = min(scores), max(scores)
    if low == high:
        raise UserError(f"finetune: every training example has the score {low:g}; there is nothing to learn")
    return tuple(low + (high - low) * i / (n - 1) for i in range(n))


def label_text(label: Any) -> str:
    """A class's name: text as it is, a number or a truth value as JSON writes it."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return label if isinstance(label, str) else json.dumps(label)


def check_label(block: FinetuneBlock, example: TaskExample) -> None:
    """Raises UserError for a label that no task of this kind can have."""
    if block.task == "multiple_choice":
        _choice_index(example)
    elif block.scores:
        _number(example.label)
    elif not isinstance(example.label, (str, int, float)):
        raise UserError(f"label: expected text or a number, not {json.dumps(example.label, default=str)[:40]}")
    elif block.labels and label_text(example.label) not in block.labels:
        name = label_text(example.label)
        raise UserError(f"unknown label {name!r}{nearest(name, block.labels)}; finetune.labels: {_shown(block.labels)}")


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + ", ..." * (len(labels) > 8)


def _number(label: Any) -> float:
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
        raise UserError(f"label: expected a number, not {json.dumps(label, default=str)[:40]}")
    return float(label)


def _choice_index(example: TaskExample) -> int:
    label, n = example.label, len(example.rows)
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < n:
        shown = json.dumps(label, default=str)[:40]
        raise UserError(f"label: expected the number of the right choice, 0 to {n - 1}, not {shown}")
    return label


def part_budget(context_length: int, parts: int) -> int:
    """Tokens of each part that fit beside the special ones; of two parts of GPT-1's 512, 254."""
    return (context_length - 1 - parts) // parts


def joined(parts: Sequence[Sequence[int]], special_ids: tuple[int, int, int]) -> list[int]:
    """S part E, or S part D part E."""
    start, delimiter, extract = special_ids
    row = [start, *parts[0]]
    for part in parts[1:]:
        row += [delimiter, *part]
    return [*row, extract]
