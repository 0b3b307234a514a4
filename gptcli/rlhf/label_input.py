"""What a person types about the answers shown as a, b, c, ...: a ranking, or scores, or a command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from gptcli.errors import UserError

LETTERS = "abcdefghijklmnop"  # up to the first command's


class Command(Enum):
    UNDO = "u"
    SKIP = "s"
    QUIT = "q"
    HELP = "?"


@dataclass(frozen=True)
class Scale:
    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Scale:
        found = re.fullmatch(r"(\d+)-(\d+)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise UserError(f"--scale {text}: write it as LOW-HIGH, as in 1-7")
        return cls(int(found[1]), int(found[2]))


def parse_command(text: str) -> Command | None:
    return next((command for command in Command if text.strip().lower() == command.value), None)


def parse_ranking(text: str, count: int) -> list[list[int]]:
    """Tiers of places, the best first: "b a c", "bac", "a=b c"; "b" or "b/c" name the best, or the best and the worst,
    and tie the others; "=" ties all. Raises UserError with what is wrong."""
    compact = re.sub(r"[\s>,]+", "", text.lower())
    if not compact:
        raise UserError("nothing was typed; ? explains")
    if compact == "=":
        return [list(range(count))]
    best, slash, worst = compact.partition("/")
    tiers, last = _tiers(best, count), _tiers(worst, count)
    if slash and (len(tiers) > 1 or len(last) > 1 or not (tiers or last)):
        raise UserError("write best and worst as b/c")
    named = [place for tier in tiers + last for place in tier]
    twice = next((place for place in named if named.count(place) > 1), None)
    if twice is not None:
        raise UserError(f"{LETTERS[twice]} is named twice")
    rest = [place for place in range(count) if place not in named]
    if not slash and rest and len(tiers) > 1:
        raise UserError(f"{' '.join(LETTERS[place] for place in rest)}: not named")
    return [tier for tier in (*tiers, rest, *last) if tier]


def _tiers(text: str, count: int) -> list[list[int]]:
    """ "ba=c" -> [[1], [0, 2]]"""
    if stray := re.search(rf"[^{LETTERS[:count]}=]", text):
        raise UserError(f"{stray[0]!r}: the answers are {LETTERS[0]} to {LETTERS[count - 1]}; ? explains")
    if not re.fullmatch(r"(\w(=?\w)*)?", text):
        raise UserError("= stands between two answers that are as good")
    tiers: list[list[int]] = []
    for tied, letter in re.findall(r"(=?)(\w)", text):
        if tied:
            tiers[-1].append(LETTERS.index(letter))
        else:
            tiers.append([LETTERS.index(letter)])
    return tiers


def parse_scores(text: str, count: int, scale: Scale) -> list[int]:
    """A number for each answer as shown: "5 3 7", or "537" where the scale has single digits."""
    words = text.replace(",", " ").split()
    if len(words) == 1 and count > 1 and scale.high <= 9:
        words = list(words[0])
    if stray := next((word for word in words if not re.fullmatch("[0-9]+", word)), None):
        raise UserError(f"{stray!r}: not a number; ? explains")
    scores = [int(word) for word in words]
    if out := [score for score in scores if not scale.low <= score <= scale.high]:
        raise UserError(f"{out[0]}: not from {scale.low} to {scale.high}")
    if len(scores) != count:
        raise UserError(f"{len(scores)} numbers for {count} answers")
    return scores


def show_ranking(tiers: list[list[int]]) -> str:
    return " > ".join(" = ".join(LETTERS[place] for place in sorted(tier)) for tier in tiers)
