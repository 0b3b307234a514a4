"""Ctrl-C and SIGTERM end a training after the step in flight, saved; a second signal ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


def stop_signals() -> list[signal.Signals]:
    """Those that ask for an end. A closed terminal does, but not under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


class StopSignal:
    """A context in which SIGINT, SIGTERM and SIGHUP only set `signum`."""

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for signum in stop_signals():
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
