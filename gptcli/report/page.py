"""A page is a title and sections; a section is a heading and what stands under it. Reports differ in their sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Section:
    """`body` is HTML; empty where there is nothing to say, and then the section is left out."""

    title: str
    body: str


def page(title: str, sections: Sequence[Section]) -> str:
    body = "\n".join(f"<section>\n<h2>{escape(s.title)}</h2>\n{s.body}\n</section>" for s in sections if s.body)
    return TEMPLATE.read_text("utf-8").replace("__TITLE__", escape(title)).replace("__BODY__", body)


def table(rows: Sequence[Sequence[str]], *, heading: bool = False) -> str:
    """Cells of text. The first row is a heading, or else the first column."""
    lines = []
    for i, row in enumerate(rows):
        tags = ["th" if (i == 0 if heading else j == 0) else "td" for j in range(len(row))]
        cells = [f"<{tag}>{escape(cell)}</{tag}>" for tag, cell in zip(tags, row, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>" if lines else ""


def pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def details(summary: str, body: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{body}</details>"
