"""What a labeller sees and types; on stderr, so that --json has stdout for itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gptcli.rlhf.label_input import LETTERS, Scale

LEAST_WIDTH = 32  # of an answer's column; below it, answers stand one under the other
# What would move the cursor, or turn the text's direction
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

RANKING_HELP = """\
b a c    b is the best, then a, then c (also bac, b>a>c)
a=b c    a and b are as good; =: all are
b        b is the best, the others tie
b/c      b is the best and c the worst
u undo   s skip (it comes again next time)   q quit   ? this"""
SCORES_HELP = """\
5 3 7    a number for each answer from {low} to {high}, in the order shown{short}
u undo   s skip (it comes again next time)   q quit   ? this"""


class Screen:
    def __init__(self, scale: Scale | None, *, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, markup=False)
        self._scale = scale

    def question(self, heading: str, prompt: str, answers: Sequence[str]) -> None:
        """The prompt, and the answers as a, b, c, ..."""
        self.console.print(Rule(heading))
        self.console.print(Panel(visible(prompt), title="prompt", title_align="left", border_style="dim"))
        panels = [Panel(visible(text), title=LETTERS[i]) for i, text in enumerate(answers)]
        if self.console.width // len(panels) < LEAST_WIDTH:
            self.console.print(*panels, sep="\n")
            return
        row = Table.grid(expand=True)
        for _ in panels:
            row.add_column(ratio=1)
        row.add_row(*panels)
        self.console.print(row)

    def ask(self) -> str | None:
        """A line; None at the input's end."""
        self.console.print("ranking> " if self._scale is None else "scores> ", end="")
        line = sys.stdin.readline()
        if not line:
            self.console.print()
        return line or None

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def help(self) -> None:
        if self._scale is None:
            self.say(RANKING_HELP)
        else:
            short = " (also 537)" if self._scale.high <= 9 else ""
            self.say(SCORES_HELP.format(low=self._scale.low, high=self._scale.high, short=short))


def visible(text: str) -> Text:
    """As it is, but for characters that would do something to the terminal."""
    return Text(CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.rstrip("\n")))


@contextmanager
def progress(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, moved by (done, total)."""
    hidden = quiet or not sys.stderr.isatty()
    with Progress(console=Console(file=sys.stderr), transient=True, disable=hidden) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
