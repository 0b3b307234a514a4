"""Pages and PNGs: what they carry, and that awkward tokens break none of them."""

from __future__ import annotations

import base64
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcli.inspect import picture
from gptcli.inspect.page import STEPS, attention_page

AWKWARD = ["$x_1$", "</script>", "你好", "␣", "\\n"]


def weights(layers: int, heads: int, length: int) -> torch.Tensor:
    scores = torch.randn(layers, heads, length, length, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


def test_the_page_carries_the_lower_triangles() -> None:
    shown = weights(2, 3, 5)
    page = attention_page(shown, AWKWARD, [1, 4], [0, 1, 2], focus=3, title="<b>")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    data = json.loads(found[1])
    assert (data["tokens"], data["layers"], data["focus"], data["title"]) == (AWKWARD, [1, 4], 3, "<b>")
    stored = np.frombuffer(base64.b64decode(data["weights"]), "<u2") / STEPS
    rows, keys = np.tril_indices(5)
    np.testing.assert_allclose(stored.reshape(2, 3, -1), shown.numpy()[:, :, rows, keys], atol=1e-5)


def test_the_page_needs_no_network() -> None:
    page = attention_page(weights(1, 1, 5), AWKWARD, [0], [0], focus=0, title="t")
    assert not re.search(r"https?:|src=|@import|url\(", page)
    assert len(page) < 10_000


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2000


@pytest.mark.parametrize(("layers", "heads", "length"), [(2, 3, 5), (1, 1, 5), (1, 1, 1), (1, 1, 50)])
def test_attention_png(tmp_path: Path, layers: int, heads: int, length: int) -> None:
    tokens = (AWKWARD * 10)[:length]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture.save_attention(weights(layers, heads, length), tokens, range(layers), range(heads), tmp_path / "a.png")
    assert is_png(tmp_path / "a.png")


def test_the_other_pngs(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture.save_bars([("$a$", 0.5), ("b", -0.2)], tmp_path / "bars.png", title="$", xlabel="x")
        grid = [[0.1 * i for i in range(5)], [0.9] * 5]
        picture.save_lens(grid, [AWKWARD, AWKWARD], AWKWARD, ["embedding", "layer 0"], tmp_path / "lens.png")
        places = [("$a$", 0.0, 1.0, True), ("你", 1.0, 0.0, False)]
        picture.save_map(places, tmp_path / "map.png", title="t")
    assert all(is_png(tmp_path / name) for name in ("bars.png", "lens.png", "map.png"))
