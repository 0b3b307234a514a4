"""Penalties and bans against plain counting and against transformers' classes; rows never touch each other."""

from __future__ import annotations

import math

import pytest
import torch

from gptcli.generate.penalties import (
    History,
    ban,
    ends_repeated_ngram,
    ends_sequence,
    penalize_generated,
    penalize_repetition,
)

V = 6
ROWS = [[1, 2, 1], [3], [0, 0, 5, 0, 4], [2, 2, 2, 2]]
PROMPTS = [1, 1, 3, 4]


def history() -> History:
    return History(ROWS, PROMPTS)


def test_history_counts_each_row_alone() -> None:
    counts = history().counts(V)
    new = history().counts(V, new_only=True)
    for i, (row, prompt) in enumerate(zip(ROWS, PROMPTS, strict=True)):
        assert counts[i].tolist() == [row.count(t) for t in range(V)]
        assert new[i].tolist() == [row[prompt:].count(t) for t in range(V)]


def test_history_follows_appended_and_selected_rows() -> None:
    h = history()
    h.append(torch.tensor([4, 4, 5, 5]))
    h.select([2, 0, 2])
    expected = History([[*ROWS[2], 5], [*ROWS[0], 4], [*ROWS[2], 5]], [3, 1, 3])
    assert torch.equal(h.counts(V), expected.counts(V))
    assert torch.equal(h.counts(V, new_only=True), expected.counts(V, new_only=True))
    assert torch.equal(ends_repeated_ngram(h, 2, V), ends_repeated_ngram(expected, 2, V))


def test_repetition_penalty_divides_positive_and_multiplies_negative() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    seen = torch.tensor([[True, True, False, True]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.0]]
    assert torch.equal(penalize_repetition(logits, seen, 1.0), logits)
    once, twice = (History([row], [3]).counts(4) > 0 for row in ([0, 1, 3], [0, 1, 3, 3, 0]))
    assert torch.equal(once, twice)


def test_presence_and_frequency_penalties_as_openai_defines_them() -> None:
    logits, counts = torch.zeros(1, 4), torch.tensor([[0, 1, 2, 5]])
    assert penalize_generated(logits, counts, 0.5, 0.0).tolist() == [[0.0, -0.5, -0.5, -0.5]]
    assert penalize_generated(logits, counts, 0.0, 0.25).tolist() == [[0.0, -0.25, -0.5, -1.25]]
    assert penalize_generated(logits, counts, 0.5, 0.25).tolist() == [[0.0, -0.75, -1.0, -1.75]]
    assert penalize_generated(logits, counts, -1.0, 0.0).tolist() == [[0.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_repeated_ngrams_of_ragged_rows_as_counted_by_hand(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    lengths = torch.randint(1, 25, (40,), generator=generator).tolist()
    rows = [torch.randint(0, 3, (length,), generator=generator).tolist() for length in lengths]
    banned = ends_repeated_ngram(History(rows, lengths), n, 4)
    for row, got in zip(rows, banned, strict=True):
        runs = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
        tail = row[len(row) - n + 1 :]
        assert got.tolist() == [len(row) >= n - 1 and (*tail, token) in runs for token in range(4)]


def test_sequences_end_where_all_but_their_last_token_stands() -> None:
    singles, pairs = torch.tensor([[3]]), torch.tensor([[2, 1], [2, 5], [4, 0]])
    assert ends_sequence(history(), singles, V).nonzero().tolist() == [[0, 3], [1, 3], [2, 3], [3, 3]]
    assert ends_sequence(history(), pairs, V).nonzero().tolist() == [[2, 0], [3, 1], [3, 5]]
    assert ends_sequence(history(), torch.tensor([[0, 4, 1]]), V).nonzero().tolist() == [[2, 1]]
    assert not ends_sequence(history(), torch.zeros(1, 9, dtype=torch.long), V).any()


def test_a_ban_that_would_leave_nothing_is_ignored_in_that_row_alone() -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf], [1.0, 2.0, 3.0]])
    banned = torch.tensor([[True, True, False], [True, True, False]])
    assert ban(logits, banned).tolist() == [[1.0, 2.0, -math.inf], [-math.inf, -math.inf, 3.0]]


# ---- against transformers -------------------------------------------------------------------------------------


@pytest.fixture
def hf():  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    from transformers.generation import logits_process

    return logits_process


@pytest.fixture
def random() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 20) * 3, torch.randint(0, 20, (8, 60))


def as_history(ids: torch.Tensor, prompt: int = 0) -> History:
    return History(ids.tolist(), [prompt] * len(ids))


def test_repetition_penalty_equals_transformers(hf, random) -> None:  # type: ignore[no-untyped-def]
    logits, ids = random
    expected = hf.RepetitionPenaltyLogitsProcessor(1.3)(ids[:, :9], logits.clone())
    seen = as_history(ids[:, :9]).counts(20) > 0
    torch.testing.assert_close(penalize_repetition(logits, seen, 1.3), expected)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_repeat_ngram_equals_transformers(hf, random, n: int) -> None:  # type: ignore[no-untyped-def]
    logits, ids = random
    ids = ids % 4 if n > 1 else ids[:, :9]
    expected = hf.NoRepeatNGramLogitsProcessor(n)(ids, logits)
    assert expected.isinf().any()
    assert torch.equal(ban(logits, ends_repeated_ngram(as_history(ids), n, 20)), expected)


def test_bad_words_equal_transformers(hf, random) -> None:  # type: ignore[no-untyped-def]
    logits, ids = random
    words = [[7], *ids[:3, -1:].tolist(), [ids[0, -1].item(), 4], [*ids[1, -2:].tolist(), 5], ids[2, :4].tolist()]
    words[1:4] = [[w[0], 11] for w in words[1:4]]
    expected = hf.NoBadWordsLogitsProcessor(words)(ids, logits)
    got = logits
    for length in {len(w) for w in words}:
        group = torch.tensor([w for w in words if len(w) == length])
        got = ban(got, ends_sequence(as_history(ids), group, 20))
    assert torch.equal(got, expected)
