"""A person labels: question by question, each label on the disk before the next is shown."""

from __future__ import annotations

from typing import Any, Protocol

from gptcli.errors import UserError
from gptcli.rlhf.label_file import LabelFile
from gptcli.rlhf.label_input import Command, Scale, parse_command, parse_ranking, parse_scores, show_ranking
from gptcli.rlhf.labels import Question, Queue, label_row, rank_by_number, ranking_row, scores_row


class Asker(Protocol):
    """Where questions are shown and answered (label_screen.Screen)."""

    def question(self, heading: str, prompt: str, answers: list[str]) -> None: ...
    def ask(self) -> str | None: ...
    def say(self, text: str) -> None: ...
    def help(self) -> None: ...


class LabelSession:
    def __init__(
        self, queue: Queue, file: LabelFile, screen: Asker, *, labeller: str, seed: int, scale: Scale | None
    ) -> None:
        self.queue, self.file, self.screen = queue, file, screen
        self.labeller, self.seed, self.scale = labeller, seed, scale

    def run(self) -> None:
        """Until no question is left, or the person quits."""
        self.screen.help()
        while (question := self.queue.current) or self._reopened():
            if question and not self._settled(question):
                return

    def _settled(self, question: Question) -> bool:
        """Show a question and take lines until one decides which comes next. False: none does."""
        order = question.order(self.seed)
        heading = f"{self.queue.labelled + self.queue.skipped + 1} of {self.queue.total}"
        self.screen.question(heading, question.prompt, [question.responses[place] for place in order])
        while (line := self.screen.ask()) is not None:
            match parse_command(line):
                case Command.QUIT:
                    return False
                case Command.HELP:
                    self.screen.help()
                case Command.SKIP:
                    self.queue.skip()
                    return True
                case Command.UNDO:
                    if self._undo():
                        return True
                case None:
                    if self._label(question, order, line):
                        return True
        return False

    def _reopened(self) -> bool:
        """Whether the last label is taken back, now that no question is left."""
        self.screen.say("no question is left; u takes the last label back, Enter ends")
        line = self.screen.ask()
        return line is not None and parse_command(line) is Command.UNDO and self._undo()

    def _undo(self) -> bool:
        if self.queue.undo(lambda id: self.file.take_back(id, self.labeller)):
            return True
        self.screen.say("there is nothing to undo")
        return False

    def _label(self, question: Question, order: list[int], line: str) -> bool:
        try:
            judgement, shown = self._judge(line, order)
        except UserError as error:
            self.screen.say(str(error))
            return False
        self.file.add(label_row(question, judgement, self.labeller, shown=order))
        self.queue.label()
        self.screen.say(shown)
        return True

    def _judge(self, line: str, order: list[int]) -> tuple[dict[str, Any], str]:
        """What a row says of the answers, and the same in words for the person to see."""
        if self.scale is None:
            tiers = parse_ranking(line, len(order))
            return ranking_row(tiers, order), show_ranking(tiers)
        scores = parse_scores(line, len(order), self.scale)
        return scores_row(scores, order), show_ranking(rank_by_number(scores))
