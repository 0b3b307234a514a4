"""GPT-1's finetuning: L = L_task + lm_coef * L_lm ("Improving Language Understanding ...", section 3.2).

As in its released code, L_lm is averaged per row over every token after the first, so delimiter and extract are
learnt too. Not copied from there: position rows among the LM's classes, dropout of the embedding matrix as a whole,
a further dropout before the head (one mask for all choices), Adam's epsilon before the bias correction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptcli.contracts import IGNORE_INDEX, Batch, LossSum, Objective
from gptcli.data.tasks import HEAD


def finetune_objective(*, is_choice: bool, lm_coef: float) -> Objective:
    """Sums over examples; with lm_coef 0, plain classification."""

    def objective(model: nn.Module, batch: Batch) -> LossSum:
        logits, logprobs = task_forward(model, batch, is_choice=is_choice, lm=lm_coef > 0)
        task = -(batch["labels"] * logits.log_softmax(-1)).sum()
        right = (logits.argmax(-1) == batch["labels"].argmax(-1)).sum()
        metrics = {"task_loss": task, "accuracy": right}
        if logprobs is None:
            return LossSum(task, metrics)
        per_row = -logprobs.sum(1) / (batch["targets"] != IGNORE_INDEX).sum(1)
        lm = (per_row * batch["row_weight"]).sum()
        return LossSum(task + lm_coef * lm, {**metrics, "lm_loss": lm})

    return objective


def task_forward(model: nn.Module, batch: Batch, *, is_choice: bool, lm: bool = False) -> tuple[Tensor, Tensor | None]:
    """The logits of classes, levels or choices (B, width), and with `lm` each token's log-probability (R, T)."""
    segments = {"segment_ids": batch["segment_ids"]} if "segment_ids" in batch.tensors else {}
    if lm:
        output = model(batch["tokens"], targets=batch["targets"], **segments)
    else:
        output = model(batch["tokens"], last_only=True, **segments)  # no logits but those that cost nothing
    extract = batch["extract"]
    at_extract = output.scalars[HEAD][torch.arange(len(extract), device=extract.device), extract].float()  # (R, width)
    return pool(at_extract, batch["rows_of"], is_choice=is_choice), output.logprobs


def pool(rows: Tensor, rows_of: Tensor, *, is_choice: bool) -> Tensor:
    """Row outputs (R, width) -> example outputs. rows_of (B, K): each example's rows, -1 where there is none.

    A choice's number stands beside the others'. Elsewhere the rows' outputs are added: the head is linear, so that
    is the head of the added states (with its bias once a row).
    """
    there = rows_of >= 0
    grouped = rows[rows_of.clamp(min=0)]  # (B, K, width)
    if is_choice:
        return grouped[..., 0].masked_fill(~there, -1e30)  # not -inf, which 0 times would make NaN of
    return (grouped * there[..., None]).sum(1)
