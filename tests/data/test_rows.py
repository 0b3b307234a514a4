"""The order of rows is a pure function of seed and row number, whoever asks and whenever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.plan import TrainPlan
from gptcli.config.schema import BatchRamp, OptimBlock
from gptcli.contracts import IGNORE_INDEX
from gptcli.data.batches import HeldOutRows, PretrainSource
from gptcli.data.rows import MixtureRows, RowOrder, TokenRows
from gptcli.errors import UserError
from gptcli.randomness import Permutation, derive, uniform, uniforms

KEYS = st.integers(0, 2**62)

# ---- permutations --------------------------------------------------------------------------------


@given(st.integers(1, 5000), KEYS)
def test_permutation_is_a_bijection(n, key):
    assert np.array_equal(np.sort(Permutation(n, key)[np.arange(n)]), np.arange(n))


@given(st.integers(1, 5000), KEYS, st.data())
def test_permutation_has_random_access(n, key, data):
    everything = Permutation(n, key)[np.arange(n)]
    at = data.draw(st.lists(st.integers(0, n - 1)))
    assert Permutation(n, key)[np.array(at, np.int64)].tolist() == everything[at].tolist()


def test_permutation_depends_on_its_key():
    orders = {tuple(Permutation(1000, key)[np.arange(1000)]) for key in range(20)}
    assert len(orders) == 20
    moved = sum(int((Permutation(1000, key)[np.arange(1000)] == np.arange(1000)).sum()) for key in range(200))
    assert 120 < moved < 290  # a random permutation leaves one in its place: 200 +- 14


def test_permutation_of_a_large_range():
    large = Permutation(150_000_001, 7)
    at = np.arange(0, 150_000_001, 1_500_000)
    assert len(set(large[at].tolist())) == len(at)
    assert large[at].max() < 150_000_001


@given(st.lists(st.tuples(KEYS, st.sampled_from(["a", "b"]), KEYS), unique=True, max_size=30))
def test_derived_numbers_differ_and_repeat(arguments):
    numbers = [derive(*a) for a in arguments]
    assert len(set(numbers)) == len(arguments)
    assert numbers == [derive(*a) for a in arguments]
    assert all(0 <= n < 2**63 for n in numbers)


def test_uniform_is_uniform():
    drawn = np.array([uniform(1, "test", i) for i in range(20_000)])
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 44  # chi-squared with 19 degrees of freedom, p = 0.001


@given(st.lists(st.tuples(KEYS, st.integers(-1, 2**62))), st.text(max_size=8))
def test_uniforms_are_the_same_numbers(rows: list[tuple[int, int]], purpose: str) -> None:
    assert uniforms(purpose, rows).tolist() == [uniform(seed, purpose, i) for seed, i in rows]


# ---- rows ----------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 600)).map(lambda s: (s[0], s[0] + s[1]))


@given(SIZES, KEYS)
def test_an_epoch_visits_every_window_once(sizes, seed):
    seq_len, n = sizes
    order = RowOrder(n, seq_len, seed)
    for epoch in range(3):
        starts = np.sort(order.starts(np.arange(order.windows) + epoch * order.windows))
        assert (np.diff(starts) == seq_len).all()
        assert starts[0] >= 0
        assert starts[-1] + seq_len + 1 <= n
    assert n - 1 - order.windows * seq_len < 2 * seq_len  # less than two windows of an epoch are left out


@given(SIZES, KEYS, st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_rows_do_not_depend_on_who_asks(sizes, seed, numbers):
    seq_len, n = sizes
    together = RowOrder(n, seq_len, seed).starts(np.array(numbers))
    assert together.tolist() == [int(RowOrder(n, seq_len, seed).starts(np.array([i]))[0]) for i in numbers]
    assert together.min() >= 0
    assert together.max() + seq_len + 1 <= n


def test_epochs_streams_and_seeds_differ():
    def epoch(number, **changes):
        order = RowOrder(1000, 8, **{"seed": 1, **changes})
        starts = order.starts(np.arange(order.windows) + number * order.windows)
        return tuple((starts - starts.min()) // 8), starts.min()

    orders = [epoch(0), epoch(1), epoch(2), epoch(0, seed=2), epoch(0, stream=1)]
    assert len({order for order, _ in orders}) == 5
    assert {offset for _, offset in map(epoch, range(200))} == set(range(8))


def test_corpus_shorter_than_a_row_is_refused_with_the_counts():
    with pytest.raises(UserError, match=r"the corpus has 8 tokens, and one row needs 9 \(train\.seq_len 8 \+ 1\)"):
        RowOrder(8, 8, 0)
    assert RowOrder(9, 8, 0).starts(np.arange(5)).tolist() == [0] * 5


def test_rows_are_pieces_of_the_stream():
    rows = TokenRows(np.arange(1000, dtype=np.uint16), 8, seed=3).get(np.arange(300))
    assert rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all()
    assert rows.shape == (300, 9)


# ---- mixtures ------------------------------------------------------------------------------------


class Numbered:
    """Rows that say which part and row they are."""

    def __init__(self, part):
        self.part, self.seq_len = part, 1

    def get(self, rows):
        return np.stack([np.full(len(rows), self.part), rows], 1)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=6))
def test_mixture_shares_match_weights_in_every_block(weights):
    mixture = MixtureRows([Numbered(p) for p in range(len(weights))], weights)
    period = MixtureRows.PERIOD
    rows = mixture.get(np.arange(3 * period))
    for block in range(3):
        part = rows[block * period : (block + 1) * period, 0]
        counts = np.bincount(part, minlength=len(weights))
        assert (abs(counts - np.array(weights) / sum(weights) * period) < 1 + 1e-6).all()
    for p in range(len(weights)):
        index = rows[rows[:, 0] == p, 1]
        assert index.tolist() == list(range(len(index)))  # from 0, without gap or repeat


def test_a_part_too_small_to_be_seen_is_refused():
    with pytest.raises(UserError, match="would never be seen"):
        MixtureRows([Numbered(0), Numbered(1)], [10_000, 1])


def test_mixture_is_spread_evenly():
    mixture = MixtureRows([Numbered(0), Numbered(1)], [3, 1])
    part = mixture.get(np.arange(1024))[:, 0]
    assert set(np.convolve(part, np.ones(8), "valid")) <= {1, 2, 3}


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
def test_mixture_has_random_access(numbers):
    mixture = MixtureRows([Numbered(0), Numbered(1), Numbered(2)], [5, 2, 1])
    together = mixture.get(np.array(numbers))
    assert together.tolist() == [mixture.get(np.array([i]))[0].tolist() for i in numbers]


# ---- batches -------------------------------------------------------------------------------------


def source(dp_rank=0, dp_size=1, micro=2, rows=None):
    rows = TokenRows(np.arange(5000), 8, seed=5) if rows is None else rows
    plan = TrainPlan(
        max_steps=100,
        max_tokens=None,
        seq_len=8,
        global_batch_size=16,
        micro_batch_size=micro,
        dp_size=dp_size,
        batch_ramp=BatchRamp(start=4, tokens=400),
        optim=OptimBlock(),
    )
    return PretrainSource(rows, plan, dp_rank)


def tokens(batches):
    return [row for batch in batches for row in batch["tokens"].tolist()]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_see_what_one_would(size):
    alone, ranks = source(), [source(r, size) for r in range(size)]
    sizes = []
    for _ in range(20):
        expected, shares = tokens(alone.next_step()), [tokens(r.next_step()) for r in ranks]
        assert [row for rows in zip(*shares, strict=True) for row in rows] == expected
        sizes.append(len(expected))
    assert sizes[0] == 4
    assert sizes[-1] == 16
    assert alone.rows_seen == ranks[0].rows_seen == sum(sizes)


def test_micro_batches_only_cut_the_step():
    whole, cut = source(micro=16), source(micro=3)
    for _ in range(12):
        small = cut.next_step()
        assert all(len(batch["tokens"]) <= 3 for batch in small)
        assert tokens(small) == tokens(whole.next_step())


def test_targets_are_the_next_tokens():
    for batch in source().next_step():
        assert (batch["targets"] == batch["tokens"] + 1).all()
        assert batch.weight == batch.tokens == batch["tokens"].numel()


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (4, 1)])
def test_resume_goes_on_with_the_same_rows(before, after):
    straight, first = source(), source(0, before)
    for _ in range(7):
        straight.next_step()
        first.next_step()
    state = first.state_dict()
    resumed = [source(r, after) for r in range(after)]
    for r in resumed:
        r.load_state_dict(state)
    for _ in range(5):
        shares = [tokens(r.next_step()) for r in resumed]
        assert [row for rows in zip(*shares, strict=True) for row in rows] == tokens(straight.next_step())


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_held_out_rows_cover_every_target_once(n, seq_len, micro, size):
    stream = np.arange(n)
    ranks = [list(HeldOutRows(stream, seq_len, 10**6, micro, r, size)) for r in range(size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for batch in (b for batches in ranks for b in batches):
        here = batch["targets"] != IGNORE_INDEX
        assert (batch["targets"][here] == batch["tokens"][here] + 1).all()
        assert batch["tokens"].min() >= 0
        assert batch.weight == int(here.sum())
        assert len(batch["tokens"]) <= micro
        seen += batch["targets"][here].tolist()
    assert sorted(seen) == list(range(1, n))


@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 30), st.integers(1, 3))
def test_held_out_rows_are_few_and_the_same_every_time(n, seq_len, most, size):
    ranks = [HeldOutRows(np.arange(n), seq_len, most, 2, r, size) for r in range(size)]
    rows = [r for rank in ranks for batch in rank for r in batch["targets"].tolist() if r[0] != IGNORE_INDEX]
    windows = -(-(n - 1) // seq_len)
    assert len(rows) == min(most, windows)
    assert len({r[0] for r in rows}) == len(rows)
    assert [tokens(rank) for rank in ranks] == [tokens(rank) for rank in ranks]
