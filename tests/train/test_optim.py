"""Optimizers and schedules: groups, orthogonality, and tables of learning rates."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gptcli.config.plan import TrainPlan
from gptcli.config.schema import ModelConfig, OptimBlock
from gptcli.model import GPT
from gptcli.train.muon import orthogonalize
from gptcli.train.optim import make_optimizer
from gptcli.train.schedule import lr_factor


def model() -> GPT:
    gpt = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=8, vocab_size=64))
    gpt.init_weights(0)
    return gpt


def decayed(optim: OptimBlock) -> set[str]:
    """Names whose weights shrink when the gradient is zero."""
    m = model()
    optimizer = make_optimizer(m, optim, m.hidden_matrices())
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    return {name for name, p in m.named_parameters() if p.min() < 1.0}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_alone(name: str) -> None:
    matrices = {n for n, p in model().named_parameters() if p.ndim == 2}
    embeddings = {"wte.weight", "wpe.weight"}
    assert decayed(OptimBlock(name=name)) == matrices
    assert decayed(OptimBlock(name=name, decay_embeddings=False)) == matrices - embeddings
    assert decayed(OptimBlock(name=name, weight_decay=0.0)) == set()


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (3, 24, 24)])
def test_orthogonalized_singular_values_are_about_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.max() < 1.3
    # five steps lift all but the smallest to about 1
    assert (values > 0.6).double().mean() > 0.85


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_only_the_attention_matrix_is_three(kv_heads: int) -> None:
    """Its queries, keys and values get updates of singular values near 1; an MLP of the same shape is one matrix."""
    config = ModelConfig(n_layer=1, n_head=2, n_kv_head=kv_heads, n_embd=8, n_inner=24, context_length=8, vocab_size=16)
    model = GPT(config)
    model.init_weights(0)
    matrices = model.h[0].attn.c_attn.weight, model.h[0].mlp.c_fc.weight
    before = [m.detach().clone() for m in matrices]
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    make_optimizer(model, OptimBlock(name="muon", muon_lr=1.0, weight_decay=0.0), model.hidden_matrices()).step()
    attention, mlp = (m.detach() - b for m, b in zip(matrices, before, strict=True))
    for part in (*attention.split([8, 4 * kv_heads, 4 * kv_heads]), mlp / 3**0.5):
        assert (torch.linalg.svdvals(part) - 1).abs().max() < 0.4


def test_muon_treats_query_key_and_value_as_three_matrices() -> None:
    m = model()
    optimizer = make_optimizer(m, OptimBlock(name="muon", weight_decay=0.0), m.hidden_matrices())
    before = m.h[0].attn.c_attn.weight.clone()
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    step = (before - m.h[0].attn.c_attn.weight).view(3, 16, 16) / 0.02
    for part in step:
        assert torch.linalg.svdvals(part.detach()).max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_by_name_continues_exactly(name: str) -> None:
    def run(steps: int, m: GPT, optimizer) -> None:
        for i in range(steps):
            torch.manual_seed(int(optimizer_steps[0]) + i)
            for p in m.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        optimizer_steps[0] += steps

    optim = OptimBlock(name=name)
    optimizer_steps = [0]
    whole = model()
    run(6, whole, make_optimizer(whole, optim, whole.hidden_matrices()))
    optimizer_steps = [0]
    first = model()
    a = make_optimizer(first, optim, first.hidden_matrices())
    run(3, first, a)
    second = model()
    second.load_state_dict(first.state_dict())
    b = make_optimizer(second, optim, second.hidden_matrices())
    b.load_state_tensors({k: v.clone() for k, v in a.state_tensors().items()})
    run(3, second, b)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def plan(**optim: object) -> TrainPlan:
    block = OptimBlock(**{"lr": 1.0, "min_lr_ratio": 0.1, **optim})
    return TrainPlan(
        max_steps=100,
        max_tokens=None,
        seq_len=10,
        global_batch_size=1,
        micro_batch_size=1,
        dp_size=1,
        batch_ramp=None,
        optim=block,
    )


@pytest.mark.parametrize(
    ("optim", "step", "expected"),
    [
        ({"warmup_steps": 10}, 0, 0.1),
        ({"warmup_steps": 10}, 9, 1.0),
        ({"warmup_steps": 10}, 55, 0.55),  # half-way down a cosine from 1 to .1
        ({"warmup_steps": 10}, 100, 0.1),
        ({"schedule": "linear"}, 0, 1.0),
        ({"schedule": "linear", "min_lr_ratio": 0.0}, 75, 0.25),
        ({"schedule": "constant"}, 99, 1.0),
        ({"schedule": "wsd", "decay_steps": 20, "min_lr_ratio": 0.0}, 79, 1.0),
        ({"schedule": "wsd", "decay_steps": 20, "min_lr_ratio": 0.0}, 90, 0.5),
        ({"decay_steps": 50}, 50, 0.1),
        ({"decay_steps": 50}, 90, 0.1),
    ],
)
def test_schedule_table(optim: dict, step: int, expected: float) -> None:
    assert lr_factor(plan(**optim), step, step * 10) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("length", [{"max_steps": 100, "max_tokens": None}, {"max_tokens": 1000, "max_steps": None}])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 20}, {"warmup_tokens": 200}], ids=str)
def test_after_its_warmup_a_schedule_falls_from_the_peak(length: dict, warmup: dict) -> None:
    """Whatever units the warmup and the run's length have: steps of 10 tokens here."""
    p = dataclasses.replace(plan(schedule="linear", min_lr_ratio=0.0, **warmup), **length)
    factors = [lr_factor(p, step, 10 * step) for step in range(100)]
    assert factors[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert factors[20:] == pytest.approx([1 - i / 80 for i in range(80)])


def test_gpt3_schedule_is_counted_in_tokens() -> None:
    p = dataclasses.replace(plan(warmup_tokens=375, decay_tokens=260_000), max_steps=None, max_tokens=300_000)
    assert lr_factor(p, 0, 0) == pytest.approx(10 / 375)
    assert lr_factor(p, 0, 375) == pytest.approx(1.0)
    assert lr_factor(p, 0, (260_000 + 375) // 2) == pytest.approx(0.55, abs=1e-3)
    assert lr_factor(p, 0, 260_000) == pytest.approx(0.1)
    assert lr_factor(p, 0, 299_999) == pytest.approx(0.1)
