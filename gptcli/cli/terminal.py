"""A conversation in a terminal: line editing, commands, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.cli.sampling import changed_params, params_text
from gptcli.errors import Stopped, UserError, nearest

if TYPE_CHECKING:
    from gptcli.generate.chat import Answer, Chat

PROMPT, MORE = "> ", "… "
# Control characters as their pictures: what a model writes must not command the terminal.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Terminal:
    """Reads turns and commands until /quit, Ctrl-D or a second Ctrl-C. Answers go to stdout, all else to stderr."""

    def __init__(self, chat: Chat, note: Callable[[str], None], *, json: bool) -> None:
        self.chat, self._note, self._json = chat, note, json
        self._interrupted = False  # by the last key pressed
        self._file: Path | None = None  # where this conversation is kept
        self._open = True
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/help": (self._help, "", "this list"),
            "/reset": (self._reset, "", "begin anew; the system prompt stays"),
            "/regen": (self._regen, "", "another answer in the place of the last"),
            "/undo": (self._undo, "", "take the last turn back"),
            "/system": (self._system, "[TEXT|-]", "show or set the system prompt; -: none"),
            "/params": (self._params, "[KEY=VALUE ...]", "show or set the sampling, as in temperature=0.7 top_p=null"),
            "/save": (self._save, "FILE", 'keep the conversation as JSONL {"messages"}, which gpt sft reads'),
            "/load": (self._load, "FILE", "go on from such a file"),
            "/quit": (self._quit, "", "leave; so do Ctrl-D and a second Ctrl-C"),
        }

    def run(self) -> None:
        with contextlib.suppress(ImportError):  # not on every system; input() edits lines where it is
            import readline  # noqa: F401
        self._note("/help lists the commands, Ctrl-D leaves")
        while self._open:
            text = self._read()
            if text is None:
                return
            try:
                self._obey(text)
            except UserError as error:
                print(f"gpt: {error}", file=sys.stderr)

    def _obey(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if not text.startswith("/") or text.startswith("//"):
            self._answer(lambda write, stopped: self.chat.ask(text.removeprefix("/"), write, stopped))
        elif word in self.commands:
            self.commands[word][0](rest.strip())
        else:
            hint = nearest(word, list(self.commands)) or "; /help lists them"
            raise UserError(f"{word}: no such command{hint} (a turn that begins with / is written //)")

    def _read(self) -> str | None:
        """What the user enters next, perhaps several lines joined by backslashes at their ends; None at the end."""
        lines: list[str] = []
        while True:
            try:
                line = self._input(MORE if lines else PROMPT)
            except EOFError:
                print(file=sys.stderr)
                return None
            except KeyboardInterrupt:
                print(file=sys.stderr)
                if self._interrupted:
                    raise
                self._interrupted, lines = True, []
                self._note("Ctrl-C again or Ctrl-D leaves")
                continue
            self._interrupted = False
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                text = "\n".join(lines)
                if text.strip():
                    return text
                lines = []

    def _input(self, prompt: str) -> str:
        if self._json or not sys.stdout.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        return input(prompt)

    # ---- answers -------------------------------------------------------------------------------------------

    def _answer(self, ask: Callable[[Callable[[str], None], Callable[[], bool]], Answer]) -> None:
        """Write an answer as it comes. Ctrl-C ends it and keeps what was said, a second one leaves."""
        from gptcli.cli.chat import as_json
        from gptcli.train.stop import StopSignal

        with StopSignal() as stop:
            answer = ask(_ignore if self._json else _write, lambda: bool(stop.signum))
        print(as_json(answer) if self._json else "", flush=True)
        if stop.signum == signal.SIGTERM:
            raise Stopped(stop.signum, "stopped by SIGTERM")
        self._interrupted = bool(stop.signum)
        if self._interrupted:
            self._note("stopped; Ctrl-C again or Ctrl-D leaves")
        elif answer.finish_reason == "length" and answer.limit < self.chat.params.max_new_tokens:
            self._note(f"cut off after {answer.limit} tokens: the context is full; /reset begins anew")
        elif answer.finish_reason == "length":
            self._note(f"cut off after {answer.limit} tokens; /params max_new_tokens=N allows more")
        elif not answer.text.strip():
            self._note("an empty answer; /regen draws another")

    # ---- commands ------------------------------------------------------------------------------------------

    def _help(self, rest: str) -> None:
        for name, (_, arguments, meaning) in self.commands.items():
            print(f"  {name + ' ' + arguments:<26}{meaning}", file=sys.stderr)
        print("  A line that ends with \\ goes on in the next. Ctrl-C stops an answer.", file=sys.stderr)

    def _reset(self, rest: str) -> None:
        from gptcli.generate.conversation import Conversation

        self.chat.restart(Conversation(self.chat.conversation.system))
        self._file = None

    def _regen(self, rest: str) -> None:
        self._answer(self.chat.ask_again)

    def _undo(self, rest: str) -> None:
        self.chat.restart(self.chat.conversation.undone())
        self._note(f"{len(self.chat.conversation.turns)} turns left")

    def _system(self, rest: str) -> None:
        if rest:
            self.chat.set_system(None if rest == "-" else rest)
        system = self.chat.conversation.system
        self._note("no system prompt" if system is None else f"system prompt: {system}")

    def _params(self, rest: str) -> None:
        if rest:
            self.chat.params = changed_params(self.chat.params, rest)
        self._note(params_text(self.chat.params))

    def _save(self, rest: str) -> None:
        from gptcli.generate.conversation import save_conversation

        path = _path(rest, "/save")
        if path.exists() and path != self._file:
            raise UserError(f"{path}: is there already; choose another name")
        left_out = save_conversation(self.chat.conversation, path)
        self._file = path
        said = f" without the {left_out} whose answer is empty" if left_out else ""
        self._note(f"{len(self.chat.conversation.turns) - left_out} turns in {path}{said}")

    def _load(self, rest: str) -> None:
        from gptcli.generate.conversation import load_conversation

        path = _path(rest, "/load")
        self.chat.restart(load_conversation(path))
        self._file = path
        self._note(f"{len(self.chat.conversation.turns)} turns from {path}")

    def _quit(self, rest: str) -> None:
        self._open = False


def _path(text: str, command: str) -> Path:
    if not text:
        raise UserError(f"{command}: name a file, as in {command} talk.jsonl")
    return Path(text).expanduser()


def _write(text: str) -> None:
    sys.stdout.write(text.translate(VISIBLE) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    pass
