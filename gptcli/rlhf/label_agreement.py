"""How far labellers agree: on which of two answers is the better one, or that neither is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptcli.data.sources import read_jsonl
from gptcli.errors import UserError
from gptcli.rlhf.preferences import parse_preference

Duel = tuple[str, str, str]  # a prompt and two answers to it, in the order of the alphabet
Choices = dict[Duel, int]  # 1: the first is better, -1: the second, 0: neither


@dataclass(frozen=True)
class Agreement:
    """kappa: Cohen's, None where chance alone would agree always."""

    a: str
    b: str
    prompts: int
    pairs: int
    equal: float
    kappa: float | None


def read_choices(paths: Sequence[Path]) -> dict[str, Choices]:
    """Each labeller's choices, a file's own name where its rows name none; a later label of the same answers counts.
    Raises UserError, file and line, for a row that is no preference."""
    found: dict[tuple[Path, str], Choices] = {}
    for path in paths:
        for number, row in read_jsonl(path):
            try:
                preference = parse_preference(row)
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from error
            choices = found.setdefault((path, str(row.get("labeller") or path)), {})
            better = {(pair.better, pair.worse): (pair.p > 0.5) - (pair.p < 0.5) for pair in preference.pairs}
            for i, j in itertools.combinations(range(len(preference.responses)), 2):
                first, second = preference.responses[i], preference.responses[j]
                choice = better.get((i, j), 0) - better.get((j, i), 0)
                swap = first > second
                duel = (preference.prompt, *((second, first) if swap else (first, second)))
                choices[duel] = -choice if swap else choice
    names = Counter(labeller for _, labeller in found)
    return {
        labeller if names[labeller] == 1 else f"{labeller} ({path})": choices
        for (path, labeller), choices in found.items()
    }


def agreements(choices: dict[str, Choices]) -> list[Agreement]:
    """Of every two labellers that share answers. Raises UserError where none do."""
    found = [_agreement(a, b, choices) for a, b in itertools.combinations(choices, 2) if choices[a].keys() & choices[b]]
    if not found:
        raise UserError(
            f"agreement: {', '.join(choices) or 'no labels'}: no two labellers have judged the same answers; "
            "`gpt rlhf-label --responses A.jsonl -o B.jsonl --labeller NAME` labels those of A anew"
        )
    return found


def _agreement(a: str, b: str, choices: dict[str, Choices]) -> Agreement:
    shared = sorted(choices[a].keys() & choices[b].keys())
    pairs = [(choices[a][duel], choices[b][duel]) for duel in shared]
    equal = sum(x == y for x, y in pairs) / len(pairs)
    return Agreement(a, b, len({duel[0] for duel in shared}), len(pairs), equal, kappa(pairs))


def kappa(pairs: Sequence[tuple[int, int]]) -> float | None:
    """Cohen's kappa. Which answer of two comes first means nothing, so each pair counts in both orders, and "first" and
    "second" are equally likely by chance."""
    n = len(pairs)
    equal = sum(a == b for a, b in pairs) / n
    ties_a, ties_b = sum(a == 0 for a, _ in pairs) / n, sum(b == 0 for _, b in pairs) / n
    chance = ties_a * ties_b + (1 - ties_a) * (1 - ties_b) / 2
    return (equal - chance) / (1 - chance) if chance < 1 else None
