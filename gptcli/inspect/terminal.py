"""Bars and columns of plain Unicode, aligned by the width that characters take on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

EIGHTHS = " ▏▎▍▌▋▊▉"
LABEL_CELLS = 24  # a longer token is cut


def bars(rows: Sequence[tuple[str, str, float]], *, width: int | None = None) -> list[str]:
    """(label, figure, value) as lines; the largest value fills the line. Where one is negative, zero is inside."""
    width = width or terminal_width()
    labels = pad([cut(label) for label, _, _ in rows])
    figures = [figure for _, figure, _ in rows]
    room = max(8, width - max(map(cell_len, labels)) - max(map(len, figures)) - 4)
    values = [value for _, _, value in rows]
    scale = max(map(abs, values)) or 1.0
    negative = any(value < 0 for value in values)
    drawn = [signed_bar(v / scale, room) if negative else bar(v / scale, room) for v in values]
    return [
        f"{label}  {figure}  {paint(line)}".rstrip() for label, figure, line in zip(labels, figures, drawn, strict=True)
    ]


def bar(share: float, room: int) -> str:
    """`share` of `room` cells, to an eighth of a cell; anything above nothing shows."""
    full, rest = divmod(max(round(share * room * 8), int(share > 0)), 8)
    return "█" * full + (EIGHTHS[rest] if rest else "")


def signed_bar(share: float, room: int) -> str:
    """To the right of a line in the middle, or to its left."""
    half = (room - 1) // 2
    blocks = "█" * round(abs(share) * half)
    return f"{'':{half}}│{blocks}" if share >= 0 else f"{blocks:>{half}}│"


def columns(rows: Sequence[Sequence[str]], *, whole: bool = False) -> list[str]:
    """Cells below each other, two spaces apart; rows may be of different lengths. Long cells are cut, or left whole."""
    count, shown = max(map(len, rows)), str if whole else cut
    padded = [pad([shown(row[i]) if i < len(row) else "" for row in rows]) for i in range(count)]
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def flow(cells: Sequence[str], *, first: str, width: int | None = None) -> list[str]:
    """Cells one after the other, in as many lines as they need; `first` begins the first line."""
    width = width or terminal_width()
    lines = [first]
    for cell in cells:
        if cell_len(lines[-1]) + 2 + cell_len(cell) > width:
            lines.append(" " * cell_len(first))
        lines[-1] += f"  {cell}"
    return lines


def pad(cells: Sequence[str]) -> list[str]:
    widest = max(map(cell_len, cells))
    return [cell + " " * (widest - cell_len(cell)) for cell in cells]


def cut(cell: str, limit: int = LABEL_CELLS) -> str:
    return cell if cell_len(cell) <= limit else set_cell_size(cell, limit - 1).rstrip() + "…"


def paint(text: str) -> str:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\x1b[36m{text}\x1b[0m" if colour and text else text


def terminal_width() -> int:
    return shutil.get_terminal_size((80, 24)).columns
