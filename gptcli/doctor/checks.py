"""The checks. Each returns a figure that is 0 where all is exact; its tolerance says how much rounding explains."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.contracts import Batch
from gptcli.dist.runtime import Runtime, autocast
from gptcli.doctor import gradients
from gptcli.doctor.subject import Subject, make_batch, split_batch, uneven_batch
from gptcli.errors import UserError
from gptcli.exchange.transfer import export_hugging_face, import_model
from gptcli.generate.native import NativeDecode, suits
from gptcli.model import GPT
from gptcli.model.kv_cache import KVCache
from gptcli.modeldir import load_model, open_model_dir, save_model
from gptcli.train.loop import evaluate, train
from gptcli.train.objectives import next_token
from gptcli.train.optim import make_optimizer
from gptcli.train.state import TrainState

ROUNDING = 1e-4  # of the largest value: what fp32 sums in another order may differ by
ROWS = 4
OVERFIT_STEPS = 300


Measure = Callable[[Subject], float]


class NotHere(Exception):
    """This model cannot be put to this test; the message says why."""


@dataclass(frozen=True)
class Check:
    name: str
    meaning: str
    tolerance: float
    trains: bool  # needs gradients
    measure: Measure


CHECKS: dict[str, Check] = {}


def check(name: str, *, tolerance: float, trains: bool = False) -> Callable[[Measure], Measure]:
    """Put a function among the checks; its docstring says what it holds against what."""

    def register(measure: Measure) -> Measure:
        assert measure.__doc__ is not None
        CHECKS[name] = Check(name, measure.__doc__, tolerance, trains, measure)
        return measure

    return register


def gap(ours: Tensor, right: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    ours, right = ours.detach().double().cpu(), right.detach().double().cpu()
    return ((ours - right).abs().max() / right.abs().max()).item()


def widest_gap(ours: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Over tensors by name, each as a share of the largest value of all."""
    largest = max(t.abs().max().item() for t in right.values())
    return max((ours[name] - t).abs().max().item() for name, t in right.items()) / largest


@check("cached", tolerance=ROUNDING)
def cached(subject: Subject) -> float:
    """Logits of rows read piece by piece through the cache, against the rows read whole."""
    tokens, half = subject.tokens(2), subject.length // 2
    cache = KVCache(subject.config, 2, subject.length, device=subject.device)
    pieces = tokens.split([half, 1, 1, subject.length - half - 2], dim=1)
    return gap(torch.cat([subject.model(piece, cache=cache).logits for piece in pieces], 1), subject.logits(tokens))


@check("native", tolerance=ROUNDING)
def native(subject: Subject) -> float:
    """Logits of native.c, by which a CPU decodes, after rows of different lengths, against those of whole rows."""
    if not suits(subject.model, torch.float32):
        raise NotHere("decodes by torch here: native.c is for fp32 on a CPU, where there is a C compiler")
    tokens, T = subject.tokens(3), subject.length
    cache, lengths = KVCache(subject.config, 3, T), (1, T // 2, T - 1)
    for row, length in enumerate(lengths):
        subject.model(tokens[row : row + 1, :length], cache=cache.rows(row, row + 1))
    ours = NativeDecode(subject.model)([int(tokens[row, n]) for row, n in enumerate(lengths)], cache)
    return gap(ours, torch.stack([subject.logits(tokens)[row, n] for row, n in enumerate(lengths)]))


@check("packed", tolerance=ROUNDING)
def packed(subject: Subject) -> float:
    """Logits of three documents in one row (document_ids), against each alone."""
    tokens, third = subject.tokens(1), subject.length // 3
    lengths = [third, third // 2, subject.length - third - third // 2]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].to(subject.device)
    alone = [subject.logits(document) for document in tokens.split(lengths, dim=1)]
    return gap(subject.model(tokens, document_ids=ids).logits, torch.cat(alone, 1))


@check("batched", tolerance=ROUNDING)
def batched(subject: Subject) -> float:
    """Logits of padded rows of different lengths, with and without a cache, against each row alone."""
    tokens, T = subject.tokens(3), subject.length
    figures = []
    for pad_left in (True, False):
        mask = torch.ones_like(tokens, dtype=torch.bool)
        for row, padding in enumerate((0, T // 2, T - 3)):
            mask[row, slice(0, padding) if pad_left else slice(T - padding, T)] = False
        alone = [subject.logits(row[keep][None])[0] for row, keep in zip(tokens, mask, strict=True)]
        together = subject.model(tokens, attention_mask=mask).logits
        cache = KVCache(subject.config, 3, T + 1, device=subject.device)
        through_cache = subject.model(tokens, attention_mask=mask, cache=cache).logits
        for row, keep in enumerate(mask):
            figures += [gap(together[row][keep], alone[row]), gap(through_cache[row][keep], alone[row])]
        figures += list(_next_tokens(subject, tokens[:, :-1], mask[:, :-1], tokens[:, -1:]))
    return max(figures)


def _next_tokens(subject: Subject, tokens: Tensor, mask: Tensor, following: Tensor) -> Iterator[float]:
    """One more token for each of the ragged rows in a cache, as generation has it."""
    cache = KVCache(subject.config, len(tokens), subject.length, device=subject.device)
    subject.model(tokens, attention_mask=mask, cache=cache)
    logits = subject.model(following, cache=cache).logits
    for row, keep in enumerate(mask):
        alone = subject.logits(torch.cat([tokens[row][keep], following[row]])[None])
        yield gap(logits[row, -1], alone[0, -1])


@check("accumulated", tolerance=ROUNDING, trains=True)
def accumulated(subject: Subject) -> float:
    """The gradient of micro-batches with unequal numbers of targets, against that of one large batch."""
    here = Runtime(device=subject.device)
    batch = uneven_batch(subject.vocab_size, ROWS, subject.length)
    whole = gradients.gradient(subject.load(), [batch], here)
    return widest_gap(gradients.gradient(subject.load(), split_batch(batch, [1, 2, 1]), here), whole)


@check("two processes", tolerance=ROUNDING, trains=True)
def two_processes(subject: Subject) -> float:
    """The gradient that two processes (DDP over gloo, on the CPU) agree on, against that of one."""
    batch = uneven_batch(subject.vocab_size, ROWS, subject.length)
    alone = gradients.gradient(load_model(subject.folder), [batch], Runtime())
    folder, worker = subject.folder.path, gradients.take_half
    return widest_gap(gradients.gradient_of_two(folder, ROWS, subject.length, worker), alone)


@check("exported", tolerance=ROUNDING)
def exported(subject: Subject) -> float:
    """Logits after an export to Hugging Face's format (proved by transformers, if here) and an import."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            export_hugging_face(subject.folder.path, Path(scratch) / "hf", dtype=None)
        except UserError as error:
            raise NotHere(str(error)) from None
        import_model(str(Path(scratch) / "hf"), Path(scratch) / "back")
        back = load_model(open_model_dir(Path(scratch) / "back"), device=subject.device)
    tokens = subject.tokens(1)
    return gap(back(tokens).logits, subject.logits(tokens))


@check("bf16", tolerance=0.05)
def bf16(subject: Subject) -> float:
    """How far bf16 moves the logits, as in training and as in generating: RMS over their standard deviation."""
    tokens = subject.tokens(2)
    right = subject.logits(tokens).float()
    with autocast(subject.device, torch.bfloat16):
        trained = subject.model(tokens).logits
    generated = subject.load(torch.bfloat16)(tokens).logits
    return max(
        ((logits.float() - right).square().mean().sqrt() / right.std()).item() for logits in (trained, generated)
    )


@check("saved", tolerance=0.0)
def saved(subject: Subject) -> float:
    """Weights and logits after saving and loading: the same bits."""
    with tempfile.TemporaryDirectory() as scratch:
        save_model(Path(scratch), subject.config, dict(subject.model.named_parameters()), subject.folder.tokenizer)
        back = load_model(open_model_dir(scratch), device=subject.device)
    tokens = subject.tokens(1)
    weights = widest_gap(dict(back.named_parameters()), dict(subject.model.named_parameters()))
    return max(weights, gap(back(tokens).logits, subject.logits(tokens)))


@check("causal", tolerance=1e-6)
def causal(subject: Subject) -> float:
    """By how much other tokens later in a row change the logits before them, along each way of masking."""
    tokens, half = subject.tokens(2), subject.length // 2
    later = tokens.clone()
    later[:, half:] = (later[:, half:] + 1) % subject.vocab_size
    ways: list[dict[str, Any]] = [
        {},
        {"document_ids": torch.zeros_like(tokens)},
        {"attention_mask": torch.ones_like(tokens, dtype=torch.bool)},
    ]
    return max(
        gap(subject.model(later, **way).logits[:, :half], subject.model(tokens, **way).logits[:, :half]) for way in ways
    )


@check("overfitted", tolerance=0.1, trains=True)
def overfitted(subject: Subject) -> float:
    """What is left of the loss on one batch after training on nothing else."""
    model, here, ids = subject.load(), Runtime(device=subject.device), subject.tokens(2)
    batch = make_batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    # wider models take smaller steps: about GPT-3's rates at GPT-3's widths
    recipe = gradients.recipe_of(rows=2, lr=min(1e-2, 0.5 / subject.config.n_embd))
    plan, optimizer = gradients.plan_of(recipe, subject.length), make_optimizer(model, recipe.optim)
    before, state, left = _loss(model, batch, here), TrainState(), 1.0
    while left > CHECKS["overfitted"].tolerance and state.step < OVERFIT_STEPS:
        plan = dataclasses.replace(plan, max_steps=state.step + OVERFIT_STEPS // 10)
        train(model, optimizer, SameBatch(batch), next_token, state, plan, here, seed=0)
        left = _loss(model, batch, here) / before
    return left


def _loss(model: GPT, batch: Batch, here: Runtime) -> float:
    return evaluate(model, [batch], next_token, here, dtype=torch.float32)


class SameBatch:
    """A source that knows but one batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def next_step(self) -> list[Batch]:
        return [self._batch]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
