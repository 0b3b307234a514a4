"""Questions for a labeller, the order they come in, and the rows that the answers become."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from gptcli.generate.prompts import stream_of
from gptcli.randomness import derive

Id = str | int
Source = dict[str, Any]  # checkpoint and seed of a response


@dataclass(frozen=True)
class Question:
    """A prompt and different responses to it; those that several samples gave have several sources."""

    id: Id
    prompt: str
    responses: list[str]
    sources: list[list[Source]] = field(default_factory=list)
    messages: list[dict[str, str]] | None = None  # the conversation that `prompt` is the text of

    def order(self, seed: int) -> list[int]:
        """Places in `responses` as they are shown: it tells nothing of where a response came from."""
        places = range(len(self.responses))
        return sorted(places, key=lambda place: derive(seed, "label order", stream_of(self.id), place))


def question_of(
    id: Id, prompt: str, answers: Iterable[tuple[str, Source | None]], messages: list[dict[str, str]] | None = None
) -> Question | None:
    """Equal answers become one, empty ones are left out: of neither could a preference be learned. None where fewer
    than two remain."""
    sources: dict[str, list[Source]] = {}
    for text, source in answers:
        if text.strip():
            sources.setdefault(text, []).extend([source] if source else [])
    if len(sources) < 2:
        return None
    return Question(id, prompt, list(sources), list(sources.values()) if any(sources.values()) else [], messages)


def ranking_row(tiers: Sequence[Sequence[int]], order: Sequence[int]) -> dict[str, Any]:
    """Tiers of shown places -> `ranking`: places in `responses`, the best first, tied ones in a list of their own."""
    ranking = [sorted(order[place] for place in tier) for tier in tiers]
    return {"ranking": [tier[0] if len(tier) == 1 else tier for tier in ranking]}


def scores_row(scores: Sequence[float], order: Sequence[int]) -> dict[str, Any]:
    """Scores as shown -> `scores`, in the order of `responses`."""
    by_place = dict(zip(order, scores, strict=True))
    return {"scores": [by_place[place] for place in range(len(order))]}


def rank_by_number(numbers: Sequence[float]) -> list[list[int]]:
    """Places by their numbers, the highest first; equal ones tie."""
    return [[i for i, x in enumerate(numbers) if x == number] for number in sorted(set(numbers), reverse=True)]


def label_row(question: Question, judgement: dict[str, Any], labeller: str, **more: Any) -> dict[str, Any]:
    """A line of the file of preferences: rlhf/preferences.py reads it."""
    row: dict[str, Any] = {"id": question.id, "prompt": question.prompt}
    row |= {"messages": question.messages} if question.messages else {}
    row |= {"responses": question.responses, **judgement}
    row |= {"labeller": labeller, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **more}
    return row | ({"sources": question.sources} if question.sources else {})


class Queue:
    """Which question comes next. Those skipped come again in another session."""

    def __init__(self, questions: Sequence[Question], labelled: Sequence[Id]) -> None:
        """`labelled`: the ids that were, in their order."""
        by_id = {question.id: question for question in questions}
        done = set(labelled)
        self.pending = deque(question for question in questions if question.id not in done)
        self._past = [(by_id[id], True) for id in labelled if id in by_id]
        self.total, self.skipped = len(questions), 0

    @property
    def current(self) -> Question | None:
        return self.pending[0] if self.pending else None

    @property
    def labelled(self) -> int:
        return sum(was_labelled for _, was_labelled in self._past)

    def label(self) -> None:
        self._past.append((self.pending.popleft(), True))

    def skip(self) -> None:
        self._past.append((self.pending.popleft(), False))
        self.skipped += 1

    def undo(self, take_back: Callable[[Id], bool]) -> bool:
        """Ask the last question again. `take_back` removes its label, and may refuse."""
        if not self._past or (self._past[-1][1] and not take_back(self._past[-1][0].id)):
            return False
        question, was_labelled = self._past.pop()
        self.skipped -= not was_labelled
        self.pending.appendleft(question)
        return True
