"""What a person types is understood, or refused with words."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.errors import UserError
from gptcli.rlhf.label_input import LETTERS, Command, Scale, parse_command, parse_ranking, parse_scores, show_ranking

RANKINGS = [
    ("b a c", [[1], [0], [2]]),
    ("bac\n", [[1], [0], [2]]),
    ("B > A > C", [[1], [0], [2]]),
    ("b, a, c", [[1], [0], [2]]),
    ("a=b c", [[0, 1], [2]]),
    ("a = b, c", [[0, 1], [2]]),
    ("c b=a", [[2], [1, 0]]),
    ("b", [[1], [0, 2]]),
    ("b=c", [[1, 2], [0]]),
    ("b/c", [[1], [0], [2]]),
    ("b/", [[1], [0, 2]]),
    ("/a", [[1, 2], [0]]),
    ("a=b/c", [[0, 1], [2]]),
    ("a=b/", [[0, 1], [2]]),
    ("=", [[0, 1, 2]]),
    ("a=b=c", [[0, 1, 2]]),
]
BAD_RANKINGS = [
    ("", "nothing was typed"),
    ("a b", "c: not named"),
    ("a a b", "a is named twice"),
    ("a b a", "a is named twice"),
    ("d a b", "'d': the answers are a to c"),
    ("b a 1", "'1': the answers are a to c"),
    ("a==b c", "= stands between"),
    ("=a b c", "= stands between"),
    ("a b=", "= stands between"),
    ("/", "best and worst as b/c"),
    ("a b/c", "best and worst as b/c"),
    ("a/b/c", "'/': the answers are"),
    ("a/a", "a is named twice"),
]


@pytest.mark.parametrize(("typed", "tiers"), RANKINGS)
def test_rankings(typed: str, tiers: list[list[int]]) -> None:
    assert parse_ranking(typed, 3) == tiers


@pytest.mark.parametrize(("typed", "reason"), BAD_RANKINGS)
def test_what_is_no_ranking_says_why(typed: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        parse_ranking(typed, 3)


@settings(deadline=None)
@given(st.permutations(range(6)), st.lists(st.booleans(), min_size=5, max_size=5))
def test_every_ranking_with_ties_can_be_typed_as_it_is_shown(places: list[int], tied: list[bool]) -> None:
    tiers = [[places[0]]]
    for place, joins in zip(places[1:], tied, strict=True):
        if joins:
            tiers[-1].append(place)
        else:
            tiers.append([place])
    assert [sorted(tier) for tier in parse_ranking(show_ranking(tiers), 6)] == [sorted(tier) for tier in tiers]


@settings(deadline=None)
@given(st.text(alphabet="abc=/ >,x1", max_size=9))
def test_whatever_is_typed_is_a_ranking_of_all_or_refused(typed: str) -> None:
    try:
        tiers = parse_ranking(typed, 3)
    except UserError:
        return
    assert sorted(place for tier in tiers for place in tier) == [0, 1, 2]
    assert all(tiers)


def test_scores() -> None:
    seven = Scale.parse("1-7")
    for typed in ("5 3 7", "537", "5,3, 7\n"):
        assert parse_scores(typed, 3, seven) == [5, 3, 7]
    assert parse_scores("10 0", 2, Scale.parse("0-10")) == [10, 0]
    for typed, reason in [
        ("5 3", "2 numbers for 3 answers"),
        ("", "0 numbers for 3"),
        ("5 3 8", "8: not from 1 to 7"),
        ("530", "0: not from 1 to 7"),
        ("5 x 3", "'x': not a number"),
        ("5 -3 3", "'-3': not a number"),
        ("٣ 3 3", "not a number"),
    ]:
        with pytest.raises(UserError, match=re.escape(reason)):
            parse_scores(typed, 3, seven)


@pytest.mark.parametrize("text", ["7", "7-1", "1-1", "a-b", "1..7", "-1-7"])
def test_a_scale_is_two_numbers(text: str) -> None:
    with pytest.raises(UserError, match=r"--scale .*1-7"):
        Scale.parse(text)


def test_commands_are_no_answers_letters() -> None:
    assert [parse_command(text) for text in ("u", " S\n", "q", "?", "b", "")] == [
        Command.UNDO,
        Command.SKIP,
        Command.QUIT,
        Command.HELP,
        None,
        None,
    ]
    assert not {command.value for command in Command} & set(LETTERS)
