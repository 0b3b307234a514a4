"""Bars and columns line up, whatever the characters' width."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from gptcli.inspect.terminal import bar, bars, columns, cut, flow, pad, signed_bar


def test_bars_start_in_one_column_and_fill_the_line() -> None:
    lines = bars([("a", " 50.0%", 0.5), ("你好", " 25.0%", 0.25), ("🙂", "  0.0%", 0.0)], width=40)
    assert cell_len(lines[0]) == 40
    starts = {cell_len(line[: line.index("%")]) for line in lines}
    assert starts == {4 + 2 + 5}
    assert lines[0].count("█") == 2 * lines[1].count("█")
    assert lines[2] == "🙂      0.0%"


@pytest.mark.parametrize(
    ("share", "drawn"), [(1.0, "████"), (0.5, "██"), (0.53125, "██▏"), (0.22, "▉"), (1e-9, "▏"), (0.0, "")]
)
def test_a_bar_is_drawn_to_an_eighth(share: float, drawn: str) -> None:
    assert bar(share, 4) == drawn


def test_negative_values_go_to_the_left() -> None:
    assert signed_bar(-1.0, 9) == "████│"
    assert signed_bar(0.5, 9) == "    │██"
    lines = bars([("he", "-0.4", -0.4), ("she", " 0.2", 0.2)], width=40)
    assert lines[0].index("│") == lines[1].index("│")


def test_columns_of_ragged_rows() -> None:
    lines = columns([["a", "1"], ["你好", "22", "x"]])
    assert lines == ["a     1", "你好  22  x"]


def test_long_labels_are_cut_by_cells() -> None:
    assert cut("a" * 24) == "a" * 24
    assert cut("a" * 25) == "a" * 23 + "…"
    assert cell_len(cut("你" * 20)) <= 24
    assert {cell_len(cell) for cell in pad(["é", "你", "🙂", "abc"])} == {3}


def test_flow_breaks_lines_under_their_beginning() -> None:
    assert flow(["aa", "bb", "cc"], first="x:", width=10) == ["x:  aa  bb", "    cc"]
    assert flow(["a" * 30], first="x:", width=10) == ["x:", "    " + "a" * 30]
