"""gpt chat as people use it: in a pseudo-terminal, and in a pipe."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.tokenizer.build import byte_tokenizer
from tests.conftest import gpt
from tests.generate.test_chat import make_engine, save_engine

LETTERS = [part for letter in "abcd " for part in ("--logit-bias", f"{letter}=100")]
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that say nonsense: `chat`, `small` (a context of 96 tokens), and `base`, which has no template."""
    folder = tmp_path_factory.mktemp("models")
    save_engine(make_engine(context_length=8192), folder / "chat")
    save_engine(make_engine(context_length=96), folder / "small")
    save_engine(make_engine(byte_tokenizer()), folder / "base")
    return folder


class Session:
    """`gpt chat` in a terminal of its own; what it shows is kept in `screen`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 500, 0, 0))  # wide: no line is scrolled
        tty, self.screen, self._seen = os.ttyname(slave), "", 0
        command = [sys.executable, "-m", "gptcli", "chat", *arguments]
        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" <{tty}', "sh", *command],  # opening it makes it the one whose keys signal
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def enter(self, line: str) -> str:
        """Enter a line at the prompt; what is shown until the next prompt."""
        self.type(line + "\n")
        self.until(re.escape(line) + "\n")  # the echo
        return self.until("> $")

    def until(self, pattern: str) -> str:
        """Wait until it shows `pattern` after what was waited for before; the text up to there."""
        while (found := re.search(pattern, self.screen[self._seen :])) is None:
            assert self._read(), f"no {pattern!r} in {self.screen[self._seen :]!r}"
        text = self.screen[self._seen : self._seen + found.start()]
        self._seen += found.end()
        return text

    def interrupt(self, answered: Callable[[], bool]) -> None:
        """Press Ctrl-C at the prompt until it is answered: readline loses a signal before its first wait."""
        for _ in range(20):
            self.type(CTRL_C)
            while self._read(seconds=3):
                pass
            if answered():
                return
        raise AssertionError(f"Ctrl-C was not answered: {self.screen[self._seen :]!r}")

    def has_ended(self) -> bool:
        """Soon: a process that has closed its terminal still takes a moment to end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=3)
        return self.process.poll() is not None

    def code(self) -> int:
        while self._read():
            pass
        return self.process.wait(timeout=60)

    def _read(self, seconds: float = 60) -> bool:
        """Whether something more was shown in that time."""
        try:
            ready, _, _ = select.select([self.master], [], [], seconds)
            data = os.read(self.master, 65536) if ready else b""
        except OSError:  # the other end is closed
            return False
        self.screen += self._decoder.decode(data).replace("\r", "")
        return bool(data)


def test_a_conversation_in_a_terminal(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    with Session(models, "-c", "chat", "--seed", "1", "-n", "20", "--ignore-eos", "--system", "Hi.", *LETTERS) as chat:
        assert "/help lists the commands" in chat.until("> $")
        first = chat.enter("hello").splitlines()[0]
        assert re.fullmatch("[abcd ]{20}", first)
        chat.type("two \\\n")
        chat.until("… ")
        second = chat.enter("lines").splitlines()[0]
        other = chat.enter("/regen").splitlines()[0]
        assert len({first, second, other}) == 3
        assert f"2 turns in {file}" in chat.enter(f"/save {file}")
        texts = ["Hi.", "hello", first, "two \nlines", other]
        assert [m["content"] for m in json.loads(file.read_text())["messages"]] == texts
        assert f"2 turns in {file}" in chat.enter(f"/save {file}")  # its own file
        assert "is there already" in chat.enter(f"/save {models}")
        assert "1 turns left" in chat.enter("/undo")
        assert "system prompt: Hi." in chat.enter("/system")
        assert "no system prompt" in chat.enter("/system -")
        chat.enter("/reset")
        assert "nothing was said yet" in chat.enter("/undo")
        assert "nothing was asked yet" in chat.enter("/regen")
        assert f"2 turns from {file}" in chat.enter(f"/load {file}")
        assert "system prompt: Hi." in chat.enter("/system")
        assert "No such file" in chat.enter("/load nowhere.jsonl")
        assert "max_new_tokens=3" in chat.enter("/params max_new_tokens=3")
        assert "cut off after 3 tokens" in chat.enter("short")
        assert "did you mean 'top_p'" in chat.enter("/params topp=1")
        assert "temperature: must be at least 0" in chat.enter("/params temperature=-1")
        assert "write it as key=value" in chat.enter("/params x")
        assert "did you mean '/regen'" in chat.enter("/regn")
        assert "another answer in the place of the last" in chat.enter("/help")
        assert re.match("[abcd ]{3}\n", chat.enter("//etc is a folder"))
        chat.type("/quit\n")
        assert chat.code() == 0
    again = gpt("chat", "-c", "chat", "--seed", "1", "-n", "20", "--ignore-eos", "--system", "Hi.", *LETTERS,
                cwd=models, stdin=b"hello\n")  # fmt: skip
    assert again.out == first + "\n"


LONG = ("-c", "chat", "-n", "8000", "--ignore-eos", *LETTERS)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    with Session(models, *LONG) as chat:
        chat.until("> $")
        chat.type("hello\n")
        chat.until("hello\n[abcd ]{30}")  # it streams
        chat.type(CTRL_C)
        assert "stopped; Ctrl-C again or Ctrl-D leaves" in chat.until("> $")
        shown = re.findall(r"hello\n([abcd ]+)(?:\^C)?([abcd ]*)\n", chat.screen)[-1]
        chat.enter(f"/save {file}")
        [_, answer] = json.loads(file.read_text())["messages"]
        assert answer["content"] == "".join(shown)
        chat.type("half a line")
        chat.until("half a line")  # a Ctrl-C empties the terminal's queue, and readline would wait for what was in it
        chat.interrupt(lambda: chat.screen.count("Ctrl-C again") == 2)
        chat.interrupt(chat.has_ended)
        assert chat.code() == 130
        assert chat.screen.count("Ctrl-C again") == 2  # of the answer and of the line, not of the last


def test_ctrl_d_leaves_and_so_does_a_second_ctrl_c(models: Path) -> None:
    with Session(models, *LONG) as chat:
        chat.until("> $")
        chat.type("hello\n")
        chat.until("hello\n[abcd ]{30}")
        chat.type(CTRL_C)
        chat.until("> $")
        chat.type(CTRL_D)
        assert chat.code() == 0
        assert "Traceback" not in chat.screen


@pytest.mark.slow
def test_sigterm_ends_an_answer(models: Path) -> None:
    with Session(models, *LONG, "--json") as chat:
        chat.until("> $")
        chat.type("hello\n")
        time.sleep(1)
        chat.process.send_signal(signal.SIGTERM)
        chat.until('"finish_reason": "interrupted"')
        assert chat.code() == 143


def test_each_line_of_a_pipe_is_a_turn(models: Path) -> None:
    stdin = "first\n\n/second ☃\n".encode()
    plain = gpt("chat", "-c", "chat", "--seed", "3", "-n", "40", cwd=models, stdin=stdin)
    rows = gpt("chat", "-c", "chat", "--seed", "3", "-n", "40", "--json", "-q", cwd=models, stdin=stdin)
    answers = [json.loads(line) for line in rows.out.splitlines()]
    assert len(answers) == 2
    assert all(list(row) == ["role", "content", "finish_reason", "tokens"] for row in answers)
    written = [row["content"].replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for row in answers]
    assert plain.out.split("\n") == [*written, ""]
    assert (plain.err, rows.err) == ("", "")


def test_what_a_pipe_leaves_out_is_told(models: Path) -> None:
    lines = b"".join(b"question %d\n" % n for n in range(4))
    run = ("chat", "-c", "small", "-n", "8", "--ignore-eos", "--json")
    slid = gpt(*run, cwd=models, stdin=lines)
    rows = [json.loads(line) for line in slid.out.splitlines()]
    assert slid.code == 0
    assert "left_out" not in rows[0]
    assert rows[3]["left_out"] >= 1
    assert "gpt: the context of 96 tokens is full: turn 1 is left out" in slid.err
    refused = gpt(*run, "--on-overflow", "refuse", cwd=models, stdin=lines)
    assert refused.code == 2
    assert 0 < len(refused.out.splitlines()) < 4
    assert re.fullmatch(r"gpt: <stdin>:\d: the conversation has \d+ tokens, .*refuse.*\n", refused.err)


def test_a_base_model_says_that_it_has_no_template(models: Path) -> None:
    done = gpt("chat", "-c", "base", "-n", "5", cwd=models, stdin=b"hello\n")
    assert done.code == 0
    assert done.err.splitlines() == [
        "gpt: this model has no chat template, so it continues `User: ... Assistant:` as plain text; gpt sft gives one"
    ]


@pytest.mark.parametrize(
    ("arguments", "stdin", "reason"),
    [
        ((), b"a\n\xff\n", "<stdin>:2: not UTF-8"),
        ((), b"say <|im_end|>\n", "<stdin>:1: the text holds <|im_end|>"),
        (("--on-overflow", "x"), b"", "on_overflow: 'x' is none of slide, refuse"),
        (("--system", "<|im_end|>"), b"", "the text holds <|im_end|>"),
    ],
)
def test_mistakes_are_one_line(models: Path, arguments: tuple[str, ...], stdin: bytes, reason: str) -> None:
    done = gpt("chat", "-c", "chat", "-n", "2", *arguments, cwd=models, stdin=stdin)
    assert done.code == 2
    assert reason in done.err
    assert len(done.err.splitlines()) == 1
