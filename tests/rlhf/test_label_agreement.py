"""Agreement beside what it is by definition."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.errors import UserError
from gptcli.rlhf.label_agreement import agreements, kappa, read_choices

CHOICE = st.sampled_from([-1, 0, 1])


@settings(deadline=None)
@given(st.lists(st.tuples(CHOICE, CHOICE), min_size=1, max_size=40))
def test_kappa_is_cohens_on_both_orders_of_each_pair(pairs: list[tuple[int, int]]) -> None:
    both = [*pairs, *((-a, -b) for a, b in pairs)]
    n = len(both)
    observed = sum(a == b for a, b in both) / n
    first, second = Counter(a for a, _ in both), Counter(b for _, b in both)
    chance = sum(first[c] * second[c] for c in (-1, 0, 1)) / n**2
    found = kappa(pairs)
    if chance == 1:
        assert found is None
    else:
        assert found == pytest.approx((observed - chance) / (1 - chance))
    assert found == kappa([(b, a) for a, b in pairs])
    flips = random.Random(0).choices([-1, 1], k=len(pairs))
    assert found == kappa([(a * flip, b * flip) for (a, b), flip in zip(pairs, flips, strict=True)])


def test_known_kappas() -> None:
    assert kappa([(1, 1), (-1, -1), (1, 1)]) == 1
    assert kappa([(1, 1), (1, -1)]) == 0
    assert kappa([(1, -1), (-1, 1)]) == -1
    assert kappa([(0, 0)]) is None


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_known_by_their_texts_in_any_format_and_order(tmp_path: Path) -> None:
    a = write(
        tmp_path / "a.jsonl",
        {"prompt": "p", "responses": ["x", "y", "z"], "ranking": [2, [0, 1]], "labeller": "anna"},
        {"prompt": "q", "responses": ["x", "y"], "ranking": [[0, 1]], "labeller": "anna"},
        {"prompt": "alone", "responses": ["x", "y"], "ranking": [0, 1], "labeller": "anna"},
    )
    b = write(
        tmp_path / "b.jsonl",
        {"prompt": "p", "responses": ["z", "y", "x"], "scores": [7, 1, 2], "labeller": "ben"},
        {"prompt": "q", "chosen": "y", "rejected": "x", "p_chosen": 0.5, "labeller": "ben"},
    )
    (found,) = agreements(read_choices([a, b]))
    assert (found.a, found.b, found.prompts, found.pairs, found.equal) == ("anna", "ben", 2, 4, 0.75)


def test_labellers_are_those_of_a_file_or_the_files_themselves(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "responses": ["x", "y"], "ranking": [0, 1], "labeller": name} for name in ("a", "b")]
    rows.append({**rows[1], "ranking": [1, 0]})  # a second label of b's, which counts
    both = write(tmp_path / "both.jsonl", *rows)
    (found,) = agreements(read_choices([both]))
    assert (found.a, found.b, found.equal) == ("a", "b", 0)
    plain = write(tmp_path / "plain.jsonl", {"prompt": "p", "chosen": "x", "rejected": "y"})
    again = write(tmp_path / "again.jsonl", rows[0])
    names = read_choices([both, plain, again])
    assert list(names) == [f"a ({both})", "b", str(plain), f"a ({again})"]
    pairs = {(found.a, found.b) for found in agreements(names)}
    assert pairs == set(itertools.combinations(names, 2))


def test_nothing_shared_and_bad_lines(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "x", "rejected": "y"})
    with pytest.raises(UserError, match="no two labellers have judged the same answers"):
        agreements(read_choices([a]))
    with pytest.raises(UserError, match=r"b.jsonl:1: responses"):
        read_choices([a, write(tmp_path / "b.jsonl", {"prompt": "p", "responses": ["x"]})])
