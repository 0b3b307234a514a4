"""A model in a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.generate.completions import complete
from gptcli.generate.conversation import Conversation, view
from gptcli.generate.engine import Completion, Engine
from gptcli.tokenizer.chat_template import chat_stop, special_in

INTERRUPTED = "interrupted"
ATTEMPTS = 1 << 16  # random streams of one turn


@dataclass(frozen=True)
class Answer:
    """`left_out`: of the oldest turns, so many were not seen. `limit`: the tokens it could have had."""

    text: str
    finish_reason: str
    tokens: int
    left_out: int
    limit: int


class Chat:
    """Asks a model, and keeps what was said.

    The conversation always leaves an answer its max_new_tokens, or a quarter of the context where that is less; what
    it cannot hold beside them is left out, oldest turns first, which `note` tells. An answer's draws come from the
    seed, the turn's number and how often it was answered, so the same words give the same conversation.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.engine, self.params, self._note = engine, params, note
        self.tokenizer = engine.require_tokenizer()
        self.conversation = Conversation()
        self._attempt = self._left_out = 0
        self.set_system(system)

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def set_system(self, text: str | None) -> None:
        """Raises UserError, and changes nothing, for one that the model cannot take."""
        if text is not None:
            self._check(text)
        view(Conversation(text).asked(""), self.tokenizer, self._room())
        self.conversation = replace(self.conversation, system=text)

    def restart(self, conversation: Conversation) -> None:
        """Go on from another conversation. Raises UserError for one that the model cannot take."""
        for message in conversation.messages():
            if message["role"] != "assistant":
                self._check(message["content"])
        self.conversation, self._attempt, self._left_out = conversation, 0, 0

    def ask(
        self, text: str, write: Callable[[str], None] = lambda chunk: None, stopped: Callable[[], bool] = lambda: False
    ) -> Answer:
        """The answer to `text`, whose pieces `write` gets as they are certain. When `stopped` says so it ends with
        what was said. Raises UserError, and keeps nothing, for what the model cannot take."""
        self._check(text)
        return self._answer(self.conversation.asked(text), 0, write, stopped)

    def ask_again(self, write: Callable[[str], None], stopped: Callable[[], bool]) -> Answer:
        """Another answer in the place of the last."""
        return self._answer(self.conversation.unanswered(), self._attempt + 1, write, stopped)

    def _check(self, text: str) -> None:
        if self.has_template and (token := special_in(self.tokenizer, text)):
            raise UserError(f"the text holds {token}, which would be read as that token; write it another way")

    def _room(self) -> int:
        """Tokens that a prompt may have."""
        limit = self.engine.model.config.context_length
        return limit - min(self.params.max_new_tokens, max(1, limit // 4))

    def _answer(
        self, asked: Conversation, attempt: int, write: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Answer:
        seen = view(asked, self.tokenizer, self._room(), refuse=self.params.on_overflow == "refuse")
        self._tell_left_out(asked, seen.left_out)
        limit = min(self.params.max_new_tokens, self.engine.model.config.context_length - len(seen.ids))
        params = replace(
            self.params,
            max_new_tokens=limit,
            min_new_tokens=min(self.params.min_new_tokens, limit),
            stop=[*self.params.stop, *chat_stop(self.tokenizer)],
        )
        said, tokens, reason = "", 0, INTERRUPTED
        for chunk, done in self._pieces(seen.ids, params, (len(asked.turns) - 1) * ATTEMPTS + attempt):
            if not said and not self.has_template:
                chunk = chunk.lstrip()  # the space after "Assistant:" is the form's, not the answer's
            said += chunk
            tokens += 1
            if chunk:
                write(chunk)
            if done is not None:
                tokens, reason = len(done.ids), done.finish_reason or reason
            elif stopped():
                break
        self.conversation, self._attempt = asked.answered(said), attempt
        return Answer(said, reason, tokens, seen.left_out, limit)

    def _pieces(self, ids: list[int], params: SamplingParams, stream: int) -> Iterator[tuple[str, Completion | None]]:
        if params.num_beams > 1 or params.best_of is not None:
            [best, *_] = complete(self.engine, [ids], params, streams=[stream])
            yield best.text, best
        else:
            yield from ((chunk, done) for _, chunk, done in self.engine.stream([ids], params, streams=[stream]))

    def _tell_left_out(self, asked: Conversation, count: int) -> None:
        if count and count != self._left_out:
            first = asked.turns[count][0]["content"]
            turns = "turn 1 is" if count == 1 else f"turns 1 to {count} are"
            self._note(
                f"the context of {self.engine.model.config.context_length} tokens is full: {turns} left out of the "
                f"model's view, which begins with turn {count + 1}, {_shortened(first)!r}"
            )
        self._left_out = count


def _shortened(text: str, width: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
