"""Packed or not, rows hold every conversation once an epoch, and give the same loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.plan import TrainPlan
from gptcli.config.schema import ModelConfig, OptimBlock
from gptcli.contracts import IGNORE_INDEX, Batch
from gptcli.data.batches import RowSource, shared_evenly
from gptcli.data.chat_rows import ChatRows, chat_batch, fit, pack
from gptcli.data.conversations import Encoded
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.train.objectives import next_token

T = 32


def example(length: int, seed: int = 0, answer: int | None = None) -> Encoded:
    """Random ids whose last `answer` ones are to be learned."""
    draw = np.random.default_rng(seed)
    begin = length - (answer or max(1, length // 2))
    trained = np.arange(length) >= begin
    return Encoded(draw.integers(0, 50, length).astype(np.int32), trained, ((begin, length),), str(seed))


EXAMPLES = [example(3 + (7 * i) % 29, seed=i) for i in range(60)]


@given(st.lists(st.integers(1, T), min_size=1, max_size=300))
def test_packing_keeps_every_example_once_and_no_row_too_long(lengths: list[int]) -> None:
    rows = pack(lengths, T)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= T


def test_packing_wastes_little() -> None:
    lengths = [len(e) - 1 for e in EXAMPLES * 20]
    assert len(pack(lengths, T)) * T < 1.1 * sum(lengths)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_visits_every_conversation_once_in_an_order_of_its_own(packing: bool) -> None:
    rows = ChatRows(EXAMPLES, T, 7, packing=packing)
    n = len(rows.rows)
    epochs = [[e.place for row in rows.get(np.arange(n) + n * k) for e in row] for k in range(3)]
    assert all(sorted(epoch) == sorted(e.place for e in EXAMPLES) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [e.place for row in ChatRows(EXAMPLES, T, 7, packing=packing).get(np.arange(n)) for e in row] == epochs[0]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"position": "rope", "norm": "rmsnorm", "n_kv_head": 1},
        {"position": "alibi"},
        {"position": "sinusoidal"},
        {"attention_pattern": "alternating", "band_width": 5},
        {"norm_position": "post"},
    ],
    ids=str,
)
def test_packed_and_unpacked_give_the_same_loss_and_gradient(shape: dict) -> None:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=T, vocab_size=50, init_std=0.2, **shape))
    model.init_weights(3)
    results = []
    for packing in (True, False):
        rows = ChatRows(EXAMPLES, T, 7, packing=packing).rows
        model.zero_grad()
        loss = weight = 0.0
        for i in range(0, len(rows), 4):
            batch = chat_batch(rows[i : i + 4])
            out = next_token(model, batch).loss
            out.backward()
            loss, weight = loss + out.item(), weight + batch.weight
        results.append((loss / weight, weight, [p.grad / weight for p in model.parameters()]))
    (packed, w1, g1), (single, w2, g2) = results
    assert w1 == w2 == sum(int(e.trained[1:].sum()) for e in EXAMPLES)
    assert packed == pytest.approx(single, abs=1e-5)
    assert max((a - b).abs().max().item() for a, b in zip(g1, g2, strict=True)) < 1e-5


def test_a_batch_shifts_targets_and_ignores_the_rest() -> None:
    a, b = example(4, 1, answer=2), example(3, 2, answer=1)
    batch = chat_batch([[a, b], [b]])
    assert batch["tokens"].tolist() == [[*a.ids[:-1], *b.ids[:-1]], [*b.ids[:-1], 0, 0, 0]]
    x = IGNORE_INDEX
    assert batch["targets"].tolist() == [[x, *a.ids[2:], x, b.ids[2]], [x, b.ids[2], x, x, x]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]
    assert (batch.weight, batch.tokens) == (4, 7)


def plan(dp_size: int = 1) -> TrainPlan:
    return TrainPlan(
        max_steps=5, max_tokens=None, seq_len=T, global_batch_size=8, micro_batch_size=2, dp_size=dp_size,
        batch_ramp=None, optim=OptimBlock(),
    )  # fmt: skip


def test_two_ranks_share_the_rows_of_one_and_a_resume_goes_on() -> None:
    def step(source: RowSource) -> list[Batch]:
        return source.next_step()

    rows = ChatRows(EXAMPLES, T, 7, packing=True)
    whole = RowSource(rows, plan(), chat_batch)
    halves = [RowSource(rows, plan(2), chat_batch, rank) for rank in (0, 1)]
    for _ in range(4):
        one, two = step(whole), [step(half) for half in halves]
        assert len(one) == 4
        assert [len(batches) for batches in two] == [2, 2]
        assert sum(b.weight for b in one) == sum(b.weight for batches in two for b in batches)
    resumed = RowSource(rows, plan(), chat_batch)
    resumed.load_state_dict(whole.state_dict())
    for a, b in zip(step(whole), step(resumed), strict=True):
        assert torch.equal(a["tokens"], b["tokens"])


def test_held_out_rows_are_as_many_on_every_rank() -> None:
    rows = ChatRows(EXAMPLES, T, 7, packing=True).rows[:5]
    batches = [shared_evenly(rows, [], chat_batch, 2, rank, 2) for rank in (0, 1)]
    assert [len(b) for b in batches] == [2, 2]
    assert sum(b.weight for own in batches for b in own) == chat_batch(rows).weight


def test_a_row_that_is_too_long() -> None:
    fits, longer = example(T + 1), example(T + 5, answer=6)
    assert fit(fits, T, "refuse") is fits
    for policy in ("refuse", "skip"):
        with pytest.raises(UserError, match=rf"{T + 5} tokens, and a row holds {T + 1} .*sft.truncation=skip"):
            fit(longer, T, policy)
    cut = fit(longer, T, "left")
    assert cut.ids.tolist() == longer.ids[4:].tolist()
    assert cut.ids[cut.trained].tolist() == longer.ids[-6:].tolist()
    assert cut.answers == ((T + 1 - 6, T + 1),)
    with pytest.raises(UserError, match="the last answer alone leaves no room"):
        fit(example(T + 5, answer=T + 1), T, "left")


def test_cutting_through_an_earlier_answer_keeps_what_is_left_of_it() -> None:
    two = example(T + 5, answer=6)
    trained = two.trained.copy()
    trained[2:8] = True
    cut = fit(replace(two, trained=trained, answers=((2, 8), *two.answers)), T, "left")
    assert cut.answers == ((0, 4), (T - 5, T + 1))
    assert cut.trained.nonzero()[0].tolist() == [1, 2, 3, *range(T - 5, T + 1)]
