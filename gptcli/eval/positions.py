"""The loss at each place of a row, within the context that a model was trained with and past it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gptcli.dist.runtime import autocast
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.model.extend import extend_context
from gptcli.modeldir import model_of

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Span:
    """Places first to last (from 0, both counted): the mean loss of predicting what follows them."""

    first: int
    last: int
    loss: float
    stderr: float


def model_for(model: GPT, length: int, *, extend: bool) -> tuple[GPT, str]:
    """The model as it reads rows of `length`, and in words how it came to. Raises UserError where it cannot."""
    config = model.config
    if length <= config.context_length:
        return model, "within the trained context"
    if extend:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        longer, stretched, how = extend_context(config, weights, length)
        first = next(iter(weights.values()))
        return model_of(longer, stretched, device=first.device, dtype=first.dtype), how
    if config.position == "learned":
        raise UserError(
            f"--length {length}: this model has learned the positions 0 to {config.context_length - 1} and has no "
            "others; --extend repeats them"
        )
    return model, f"positions ({config.position}) go on past {config.context_length} tokens as they are"


@torch.inference_mode()
def losses_by_position(
    model: GPT,
    ids: Sequence[int],
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[float], None] = lambda _: None,
) -> NDArray[np.float64]:
    """(rows, length): -log p of each next token, in rows of `length` that share nothing. Raises UserError for fewer
    than two rows."""
    rows = (len(ids) - 1) // length
    if rows < 2:
        raise UserError(f"the text has {len(ids):,} tokens; two rows of {length:,} need {2 * length + 1:,}")
    stream = torch.tensor(ids[: rows * length + 1])
    tokens, targets = stream[:-1].view(rows, length), stream[1:].view(rows, length)
    at_a_time, device = max(1, BATCH_TOKENS // length), model.wte.weight.device
    parts = []
    for start in range(0, rows, at_a_time):
        part = slice(start, start + at_a_time)
        with autocast(device, dtype):
            logprobs = model(tokens[part].to(device), targets=targets[part].to(device)).logprobs
        assert logprobs is not None
        parts.append(-logprobs.double().cpu().numpy())
        advance(min(1.0, (start + at_a_time) / rows))
    return np.concatenate(parts)


def spans(losses: NDArray[np.float64], context_length: int) -> list[Span]:
    """Places 0, 1, 2-3, 4-7, ..., with an edge where the trained context ends. A row is one sample of a span."""
    length = losses.shape[1]
    edges = sorted({0, length, *(1 << k for k in range(length.bit_length()) if 1 << k < length), context_length})
    out = []
    for first, end in pairwise(edges):
        if end <= length:
            of_rows = losses[:, first:end].mean(1)
            out.append(Span(first, end - 1, float(of_rows.mean()), float(of_rows.std(ddof=1) / len(of_rows) ** 0.5)))
    return out


def save_picture(losses: NDArray[np.float64], context_length: int, path: Any, *, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mean = losses.mean(0)
    error = losses.std(0, ddof=1) / len(losses) ** 0.5
    places = np.arange(1, len(mean) + 1)
    figure, axis = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axis.fill_between(places, mean - 2 * error, mean + 2 * error, color="#7aa6c2", alpha=0.3, linewidth=0)
    axis.plot(places, mean, color="#7aa6c2", linewidth=1)
    if context_length < len(mean):
        axis.axvline(context_length, color="#b3412e", linewidth=1, label="end of the trained context")
        axis.legend(frameon=False)
    axis.set(xscale="log", xlabel="tokens seen before", ylabel="loss (nats per token)", title=title)
    figure.savefig(path)
    pyplot.close(figure)
