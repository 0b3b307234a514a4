"""One check after the other; a check that breaks has failed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gptcli.doctor.checks import CHECKS, Check, NotHere
from gptcli.doctor.subject import Subject
from gptcli.errors import Stopped, UserError, nearest


@dataclass(frozen=True)
class Finding:
    """passed is None for a check that does not apply; `note` then says why, and for one that broke, how."""

    check: str
    meaning: str
    passed: bool | None
    figure: float | None
    tolerance: float
    note: str
    seconds: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


def pick_checks(names: Sequence[str]) -> list[Check]:
    """The checks of these names, or all. Raises UserError for a name that is none."""
    for name in names:
        if name not in CHECKS:
            raise UserError(f"--check {name}: no such check{nearest(name, list(CHECKS))}; known: {', '.join(CHECKS)}")
    return [c for c in CHECKS.values() if not names or c.name in names]


def examine(subject: Subject, checks: Sequence[Check]) -> Iterator[Finding]:
    for each in checks:
        began = time.perf_counter()
        figure, note, applies = None, "", True
        try:
            with torch.set_grad_enabled(each.trains):
                figure = each.measure(subject)
        except NotHere as reason:
            note, applies = str(reason), False
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever breaks here is what the user wants to know about
            note = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        # written so that NaN fails
        passed = (figure is not None and figure <= each.tolerance) if applies else None
        seconds = round(time.perf_counter() - began, 2)
        yield Finding(each.name, each.meaning, passed, figure, each.tolerance, note, seconds)
