"""Loss by position: the figures of a direct forward, and what each position scheme does past its context."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcli.config.schema import ModelConfig
from gptcli.errors import UserError
from gptcli.eval import positions
from gptcli.eval.positions import losses_by_position, model_for, spans
from gptcli.model import GPT

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=16, vocab_size=11, init_std=0.3)
IDS = [(i * i) % 11 for i in range(200)]


def make(**changes) -> GPT:
    model = GPT(dataclasses.replace(CONFIG, **changes)).eval()
    model.init_weights(seed=2)
    return model


def test_each_place_is_the_direct_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "BATCH_TOKENS", 40)  # several batches
    model = make()
    found = losses_by_position(model, IDS, 16)
    assert found.shape == (12, 16)
    for row in (0, 5, 11):
        part = torch.tensor(IDS[row * 16 : row * 16 + 17])
        logits = model(part[None, :-1]).logits
        assert logits is not None
        direct = torch.nn.functional.cross_entropy(logits[0], part[1:], reduction="none")
        assert np.allclose(found[row], direct.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("position", ["rope", "alibi", "sinusoidal", "none", "learned"])
def test_past_the_context(position: str) -> None:
    model = make(position=position)
    if position == "learned":
        with pytest.raises(UserError, match=r"learned the positions 0 to 15.*--extend"):
            model_for(model, 32, extend=False)
    else:
        longer, how = model_for(model, 32, extend=False)
        assert longer is model
        assert f"({position}) go on" in how
        found = losses_by_position(longer, IDS, 32)
        assert np.isfinite(found).all()
        assert np.allclose(found[0, :16], losses_by_position(model, IDS, 16)[0], atol=1e-5)
    extended, how = model_for(model, 32, extend=True)
    assert losses_by_position(extended, IDS, 32).shape == (6, 32)
    assert extended.config.context_length == 32
    assert how


def test_spans_cover_every_place_once_with_an_edge_at_the_context() -> None:
    losses = np.arange(40.0)[None, :] + np.array([[0.0], [2.0]])
    found = spans(losses, 24)
    assert [(s.first, s.last) for s in found] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 23), (24, 31), (32, 39)]
    assert found[2].loss == pytest.approx(3.5)
    assert found[2].stderr == pytest.approx(1.0)
    assert sum(s.loss * (s.last - s.first + 1) for s in found) / 40 == pytest.approx(losses.mean())
    assert [(s.first, s.last) for s in spans(losses[:, :8], 24)][-1] == (4, 7)


def test_too_little_text() -> None:
    with pytest.raises(UserError, match="two rows of 150 need 301"):
        losses_by_position(make(position="none"), IDS, 150)


def test_the_picture(tmp_path: Path) -> None:
    positions.save_picture(np.random.default_rng(0).random((5, 40)), 24, tmp_path / "x.png", title="$x$")
    assert (tmp_path / "x.png").stat().st_size > 5000
