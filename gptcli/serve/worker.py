"""The model's thread, which owns model and session: requests come in by a queue, text goes out to the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from gptcli.config.schema import SamplingParams
from gptcli.errors import GptError, UserError
from gptcli.generate import Completion, Engine
from gptcli.generate.engine import Piece, Session
from gptcli.generate.scoring import score_prompt
from gptcli.serve.logprobs import TokenView, TokenViews
from gptcli.tokenizer.texts import TokenTexts

T = TypeVar("T")
log = logging.getLogger(__name__)
PACE = 0.04  # seconds between deliveries: nobody sees a finer one, and each costs as much as a small model's step
MOST_PATIENCE = 0.1  # seconds that the model waits for the event loop to write what it got
INTERNAL = "internal error; the server's log has more"


class Busy(GptError):
    """As many texts as may wait are waiting."""


class Down(GptError):
    """The worker has ended, so nothing will be answered any more."""


@dataclass(frozen=True)
class Job:
    """One text to write. echo: text to begin with, the prompt's. top_logprobs None: no log-probabilities."""

    ids: list[int]
    params: SamplingParams
    stream: int = 0
    top_logprobs: int | None = None
    echo: str | None = None


@dataclass(frozen=True)
class Event:
    """What became certain of one job: text, its tokens where log-probabilities were asked for, the end."""

    index: int
    text: str
    tokens: Sequence[TokenView]
    completion: Completion | None


class Call:
    """The jobs of one HTTP request, and their events as they come. Lives on the event loop."""

    def __init__(self, jobs: Sequence[Job], timeout: float) -> None:
        self.jobs, self.unfinished = jobs, len(jobs)
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.timer = asyncio.get_running_loop().call_later(timeout, self.put, TimeoutError())

    async def next(self) -> list[Event]:
        """What has come since the last time, at least one event. Raises what befell the call."""
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        for event in events:
            if isinstance(event, Exception):
                raise event
        return [event for event in events if isinstance(event, Event)]

    def put(self, event: Event | Exception) -> None:
        self._events.put_nowait(event)


@dataclass(eq=False)
class _Row:
    """A job under way, as the model's thread knows it; its identity is its key in the session. text, tokens and
    completion: what the call has not been told yet."""

    call: Call
    index: int
    job: Job
    views: TokenViews | None = None
    text: str = ""
    tokens: list[TokenView] = field(default_factory=list)
    completion: Completion | None = None

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.completion = piece.completion
        if self.views is not None and piece.token.finish_reason != "eos":
            self.tokens.append(self.views.push(piece.token))

    def event(self) -> Event:
        """All that is to be told."""
        told = Event(self.index, self.text, self.tokens, self.completion)
        self.text, self.tokens = "", []
        return told


class ModelThread:
    """The one thread that should compute, from the loading of the model on.

    OpenMP keeps threads for each thread that computes. Where those of two are more than the cores, they sleep instead
    of waiting for the next loop, and a step takes 1.3 times as long, even if one of the two never computes again.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="gpt-serve-model", daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        done: Future[T] = Future()
        self._work.put((work, done))
        return done

    def _run(self) -> None:
        while True:
            work, done = self._work.get()
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            del work, done  # not to be held on to while waiting


@dataclass
class Worker:
    """Takes calls on the event loop, and steps them together in the model's thread."""

    engine: Engine
    thread: ModelThread
    max_rows: int = 64
    max_waiting: int = 256
    error: BaseException | None = None
    _calls: set[Call] = field(default_factory=set)
    _commands: SimpleQueue[Callable[[], None]] = field(default_factory=SimpleQueue)
    _rows: dict[Call, list[_Row]] = field(default_factory=dict)
    _untold: dict[_Row, None] = field(default_factory=dict)  # in their order
    _last_sent: float = 0.0
    _delivered: threading.Event = field(default_factory=threading.Event)
    _closing: bool = False

    # ---- on the event loop ---------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._session: Session = self.engine.session(self.max_rows)
        self._texts = TokenTexts(self.engine.require_tokenizer())
        self._ended = self.thread.submit(self._run)

    def stop(self) -> None:
        """End after the step in flight; calls under way fail."""
        self._commands.put(self._close)
        self._ended.result()

    @property
    def alive(self) -> bool:
        return self.error is None and not self._ended.done()

    @property
    def unfinished(self) -> int:
        """Texts under way or waiting."""
        return sum(call.unfinished for call in self._calls)

    def submit(self, jobs: Sequence[Job], timeout: float) -> Call:
        """Begin jobs; `finish` the call whatever comes of it. Raises Busy or Down, and UserError for more than there
        may ever be; the call's events end with TimeoutError if they are not all there in time."""
        if not self.alive:
            raise Down(f"the model's thread has stopped: {self.error}")
        if len(jobs) > self.max_rows + self.max_waiting:
            raise UserError(f"{len(jobs)} texts are more than this server writes and lets wait; ask for fewer")
        if self.unfinished + len(jobs) > self.max_rows + self.max_waiting:
            raise Busy(f"{self.unfinished} texts are under way or waiting already; try again soon")
        call = Call(jobs, timeout)
        self._calls.add(call)
        self._commands.put(partial(self._add, call))
        return call

    def finish(self, call: Call) -> None:
        """Free whatever of a call is still under way."""
        call.timer.cancel()
        self._calls.discard(call)
        if call.unfinished:
            self._commands.put(partial(self._cancel, call))

    def _deliver(self, events: Sequence[tuple[Call, Event | Exception]]) -> None:
        for call, event in events:
            if isinstance(event, Exception):
                call.unfinished = 0
            elif event.completion is not None:
                call.unfinished -= 1
            call.put(event)
        # Two rounds of the loop later each call's task has written what it got.
        self._loop.call_soon(self._loop.call_soon, self._delivered.set)

    def _fail_all(self) -> None:
        self._deliver([(call, Down(f"the model's thread has stopped: {self.error}")) for call in self._calls])

    # ---- in the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_commands()
                for piece in self._session.step():
                    self._take(piece)
                if time.monotonic() - self._last_sent >= PACE or not self._session.busy:
                    self._tell()
        except BaseException as error:
            log.exception("the worker has crashed")
            self.error = error
        finally:
            self.error = self.error or Down("the server is stopping")
            self._to_loop(self._fail_all)

    def _tell(self) -> None:
        self._send([(row.call, row.event()) for row in self._untold])
        self._untold.clear()
        # Two threads that contend for the interpreter cost far more than turns.
        self._delivered.wait(MOST_PATIENCE)
        self._last_sent = time.monotonic()

    def _take_commands(self) -> None:
        """All there are; with nothing to do, wait for one."""
        while not self._session.busy and not self._closing:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _close(self) -> None:
        self._closing = True

    def _add(self, call: Call) -> None:
        self._rows[call] = [_Row(call, index, job) for index, job in enumerate(call.jobs)]
        try:
            for row in list(self._rows[call]):
                self._begin(row)
        except Exception as error:
            self._cancel(call)
            if not isinstance(error, GptError):
                log.exception("a request has failed")
                error = GptError(INTERNAL)
            self._send([(call, error)])

    def _begin(self, row: _Row) -> None:
        job, scored = row.job, []
        if job.top_logprobs is not None:
            context = job.ids if job.echo is None else ()
            row.views = TokenViews(self.engine.require_tokenizer(), self._texts, context)
            if job.echo is not None:
                scored = [row.views.push(token) for token in score_prompt(self.engine, job.ids, job.top_logprobs)]
        if job.echo is not None:
            self._send([(row.call, Event(row.index, job.echo, scored, None))])
        if job.params.max_new_tokens == 0:  # only the prompt was asked about
            self._forget(row)
            self._send([(row.call, Event(row.index, "", [], Completion("", finish_reason="length")))])
            return
        self._session.add(row, job.ids, job.params, job.stream, top_logprobs=job.top_logprobs or 0)

    def _forget(self, row: _Row) -> None:
        rows = self._rows[row.call]
        rows.remove(row)
        if not rows:
            del self._rows[row.call]

    def _cancel(self, call: Call) -> None:
        for row in self._rows.pop(call, []):
            self._session.cancel(row)

    def _take(self, piece: Piece) -> None:
        row = piece.key
        assert isinstance(row, _Row)
        row.take(piece)
        if piece.completion is not None:
            self._forget(row)
        self._untold[row] = None

    def _send(self, events: Sequence[tuple[Call, Event | Exception]]) -> None:
        """One wake-up of the event loop for all."""
        self._delivered.clear()
        self._to_loop(partial(self._deliver, events))

    def _to_loop(self, action: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            log.debug("the event loop is gone")
