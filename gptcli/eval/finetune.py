"""What a task head predicts, and how good that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.contracts import Batch
from gptcli.data.taskrows import TaskData, TaskEncoder, TaskRows
from gptcli.data.tasks import HEAD, Task, TaskExample
from gptcli.dist.runtime import Runtime, autocast
from gptcli.errors import UserError
from gptcli.eval.metrics import accuracy, confusion_matrix, f1, matthews, pearson, spearman
from gptcli.model import GPT
from gptcli.tokenizer import Tokenizer
from gptcli.train.objectives.finetune import task_forward

BATCH = 32  # examples at once


@dataclass(frozen=True)
class Prediction:
    """label: of classes the name, of choices the number; score: the expected level. probability: the label's own."""

    probabilities: list[float]
    label: str | int | None = None
    probability: float | None = None
    score: float | None = None

    def row(self, task: Task) -> dict[str, Any]:
        """As JSON."""
        if self.score is not None:
            return {"prediction": self.score}
        of = dict(zip(task.labels, self.probabilities, strict=True)) if task.labels else self.probabilities
        return {"prediction": self.label, "probability": self.probability, "probabilities": of}


def prediction_of(task: Task, probabilities: Sequence[float]) -> Prediction:
    p = list(probabilities)
    if task.levels:
        return Prediction(p, score=expected_level(task, p))
    best = p.index(max(p))
    return Prediction(p, label=task.labels[best] if task.labels else best, probability=p[best])


def expected_level(task: Task, probabilities: Sequence[float]) -> float:
    return sum(p * level for p, level in zip(probabilities, task.levels, strict=True))


class TaskModel:
    """A finetuned model that labels examples."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, task: Task, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.task, self.dtype = model, task, dtype
        self.encoder = TaskEncoder(task, tokenizer, model.config.context_length)

    @classmethod
    def of_checkpoint(cls, path: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> TaskModel:
        """Raises UserError for a checkpoint without a task head."""
        task = Task.load(path)
        if model.config.scalar_heads.get(HEAD) != task.head_width:
            raise UserError(f"{path}: its config.json and task.json disagree about the head; it is damaged")
        return cls(model, tokenizer, task, dtype)

    def predict(self, examples: Sequence[TaskExample]) -> list[Prediction | UserError]:
        """Each example's prediction, or the complaint, without its place, where it does not fit."""
        encoded = self.encoder.encode(examples)
        found = self._probabilities([e for e in encoded if not isinstance(e, UserError)])
        return [e if isinstance(e, UserError) else prediction_of(self.task, next(found)) for e in encoded]

    def _probabilities(self, items: Sequence[TaskRows]) -> Iterator[list[float]]:
        for first in range(0, len(items), BATCH):
            chosen = items[first : first + BATCH]
            batch = self.encoder.batch(chosen, None, segments=self.model.wse is not None, lm=False)
            probabilities = task_logits(self.model, batch, self.task, self.dtype).softmax(-1).tolist()
            for item, p in zip(chosen, probabilities, strict=True):
                yield p[: len(item.rows)] if self.task.is_choice else p


@torch.no_grad()
def task_logits(model: GPT, batch: Batch, task: Task, dtype: torch.dtype) -> Tensor:
    """(B, width) in fp32, without dropout."""
    was_training = model.training
    model.eval()
    device = model.wte.weight.device
    with autocast(device, dtype):
        logits, _ = task_forward(model, batch.to(device), is_choice=task.is_choice)
    model.train(was_training)
    return logits.float()


def measure(model: GPT, data: TaskData, task: Task, runtime: Runtime, dtype: torch.dtype) -> dict[str, Any]:
    """Figures on held-out examples, whose batches the ranks share: val_loss, the task's own loss, and the metrics."""
    n, width = len(data.items), max(map(len, data.targets))
    logprobs = torch.zeros(n, width, dtype=torch.float64)
    for number, first in enumerate(range(0, n, BATCH)):
        if number % runtime.dp_size == runtime.dp_rank:
            chosen = range(first, min(first + BATCH, n))
            logits = task_logits(model, data.batch(chosen), task, dtype).cpu()
            logprobs[first : first + len(chosen), : logits.shape[1]] = logits.log_softmax(-1).double()
    logprobs = torch.tensor(runtime.host_sum(logprobs.flatten().tolist()), dtype=torch.float64).view(n, width)
    probabilities = [row[: len(t)].exp().tolist() for row, t in zip(logprobs, data.targets, strict=True)]
    loss = -sum((torch.tensor(t) * row[: len(t)]).sum().item() for row, t in zip(logprobs, data.targets, strict=True))
    found = figures(task, probabilities, data.truth)
    return {"val_loss": loss / n, **{f"val_{name}": value for name, value in found.items()}}


def figures(task: Task, probabilities: Sequence[Sequence[float]], truth: Sequence[float]) -> dict[str, Any]:
    """Of classes: accuracy, F1, Matthews' correlation and the confusion matrix (rows: true); of scores: Pearson's and
    Spearman's correlation; of choices: accuracy. `truth` is Task.truth of each example."""
    if task.levels:
        predicted = [expected_level(task, p) for p in probabilities]
        return {"pearson": pearson(predicted, truth), "spearman": spearman(predicted, truth)}
    guesses, true = [p.index(max(p)) for p in map(list, probabilities)], list(map(int, truth))
    if task.is_choice:
        return {"accuracy": sum(g == t for g, t in zip(guesses, true, strict=True)) / len(true)}
    confusion = confusion_matrix(guesses, true, len(task.labels))
    return {
        "accuracy": accuracy(confusion),
        "f1": f1(confusion),
        "matthews": matthews(confusion),
        "confusion": confusion.tolist(),
    }
