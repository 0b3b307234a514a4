"""Whom the doctor examines: a checkpoint, or a small random model, and the made-up text that it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptcli.config.schema import ModelConfig
from gptcli.contracts import IGNORE_INDEX, Batch
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.modeldir import ModelDir, load_model, open_model_dir, save_model
from gptcli.randomness import derive

ROW_TOKENS = 64
SHORTEST = 8  # tokens: what the checks need to tell one place from another
RANDOM_MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=64, context_length=128, vocab_size=257, init_std=0.1)


class Subject:
    """A model directory on a device. Checks share `model` and leave it as it is; to change one they `load` it."""

    def __init__(self, folder: ModelDir, device: torch.device) -> None:
        if folder.config.context_length < SHORTEST:
            raise UserError(f"{folder.path}: looks at {folder.config.context_length} tokens; doctor needs {SHORTEST}")
        assert folder.config.vocab_size is not None
        self.folder, self.config, self.device = folder, folder.config, device
        self.length = min(ROW_TOKENS, folder.config.context_length)
        self.vocab_size = folder.config.vocab_size

    @cached_property
    def model(self) -> GPT:
        return self.load()

    def load(self, dtype: torch.dtype = torch.float32) -> GPT:
        return load_model(self.folder, device=self.device, dtype=dtype)

    def tokens(self, rows: int) -> Tensor:
        """(rows, T) ids that mean nothing, the same at every call."""
        return random_tokens(self.vocab_size, rows, self.length).to(self.device)

    def logits(self, tokens: Tensor) -> Tensor:
        """What the model says to whole rows, without a cache: what all else is held against."""
        logits = self.model(tokens).logits
        assert logits is not None
        return logits


def random_tokens(vocab_size: int, rows: int, length: int) -> Tensor:
    draw = np.random.default_rng(derive(0, "doctor"))
    return torch.from_numpy(draw.integers(vocab_size, size=(rows, length)))


def uneven_batch(vocab_size: int, rows: int, length: int) -> Batch:
    """Rows of which each has fewer targets than the one before, so that a mean of means is not the mean."""
    ids = random_tokens(vocab_size, rows, length + 1)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for row in range(rows):
        targets[row, : row * length // rows] = IGNORE_INDEX
    return make_batch(tokens, targets)


def make_batch(tokens: Tensor, targets: Tensor) -> Batch:
    weight = int((targets != IGNORE_INDEX).sum())
    return Batch({"tokens": tokens, "targets": targets}, weight=weight, tokens=targets.numel())


def split_batch(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Micro-batches of so many rows."""
    parts = zip(batch["tokens"].split(list(sizes)), batch["targets"].split(list(sizes)), strict=True)
    return [make_batch(tokens, targets) for tokens, targets in parts]


@torch.no_grad()
def random_model(folder: Path) -> ModelDir:
    """A small model in `folder`. Every weight is random: a bias of zero and a norm of one hide where they stand."""
    model = GPT(RANDOM_MODEL)
    model.init_weights(seed=0)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(derive(0, f"doctor {name}"))))
    save_model(folder, RANDOM_MODEL, dict(model.named_parameters()), None)
    return open_model_dir(folder)
