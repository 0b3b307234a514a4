"""Attention as one HTML file that needs nothing from a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

TEMPLATE = Path(__file__).with_name("attention.html")
STEPS = 65535  # a weight is a 16-bit number of these


def attention_page(
    weights: Tensor, tokens: Sequence[str], layers: Sequence[int], heads: Sequence[int], *, focus: int, title: str
) -> str:
    """weights (layers, heads, T, T). Of each map only what causality leaves, its lower triangle, is in the page."""
    rows, keys = torch.tril_indices(len(tokens), len(tokens))
    triangle = (weights[:, :, rows, keys].cpu() * STEPS).round().to(torch.uint16)
    data = {
        "title": title,
        "tokens": list(tokens),
        "layers": list(layers),
        "heads": list(heads),
        "focus": focus,
        "steps": STEPS,
        "weights": base64.b64encode(triangle.contiguous().numpy().astype("<u2").tobytes()).decode(),
    }
    # a token may read </script>
    return TEMPLATE.read_text("utf-8").replace("__DATA__", json.dumps(data).replace("<", "\\u003c"))
