"""gpt generate -i FILE: a file of prompts becomes a file of rows."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, NoReturn

from gptcli.errors import Stopped, UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from gptcli.config.schema import SamplingParams
    from gptcli.generate import Engine
    from gptcli.generate.rowfile import RowFile

STDOUT = "-"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of a call, beside its sampling. `output` is None or "-" where rows go to stdout."""

    source: str
    output: str | None
    overwrite: bool
    batch_size: int
    skip_bad: bool
    logprobs: bool
    json: bool
    quiet: bool
    int8: bool = False
    prompter: Callable[[str], str] | None = None  # puts each prompt into words (generate/shots.py)
    compile: bool = False


def run_pipeline(engine: Engine, params: SamplingParams, options: Options, *, seed_given: bool) -> None:
    """Continue every line of the source. Where no seed is given, a file that was begun goes on with its own."""
    from gptcli.generate.pipeline import made_by
    from gptcli.generate.rowfile import RowFile, begun_with

    engine.processors(params)  # a mistake of the command line is no line's
    path = _output_path(options)
    if path is None:
        _run(engine, params, options, _writer(sys.stdout.buffer), None)
    elif path.exists() and not path.is_file() and not path.is_dir():  # a device or a named pipe
        with path.open("wb") as stream:
            _run(engine, params, options, _writer(stream), None)
    else:
        if not seed_given and not options.overwrite and (seed := begun_with(path, "seed")) is not None:
            params = replace(params, seed=seed)
        rows = {**made_by(engine, params, logprobs=options.logprobs), "int8": options.int8, "compile": options.compile}
        with RowFile(path, rows, overwrite=options.overwrite) as file:
            _run(engine, params, options, file.write, file)


def _run(
    engine: Engine, params: SamplingParams, options: Options, write: Callable[[bytes], None], file: RowFile | None
) -> None:
    from gptcli.data.sources import refuse
    from gptcli.generate.pipeline import generate_rows

    # after the model's fingerprint was taken
    engine.pack(int8=options.int8, compile=options.compile)
    with _Report(options, file) as report, _signals_raise(report):
        completions = generate_rows(
            engine,
            options.source,
            params,
            write,
            on_bad=report.left_out if options.skip_bad else refuse,
            resume=file,
            max_rows=options.batch_size,
            logprobs=options.logprobs,
            prompter=options.prompter,
        )
        for completion in completions:
            report.row(len(completion.ids) if completion is not None else None)
    report.end()


def _output_path(options: Options) -> Path | None:
    from gptcli.data.sources import COMPRESSED

    if options.output in (None, STDOUT):
        return None
    path = Path(options.output or "")
    if path.suffix in COMPRESSED:
        raise UserError(f"-o {path}: rows are written plain; write {path.stem}, and compress that when it is done")
    source = Path(options.source)
    if path.is_file() and source.is_file() and path.samefile(source):
        raise UserError(f"-o {path}: is the input")
    return path


def _writer(stream: IO[bytes]) -> Callable[[bytes], None]:
    def write(line: bytes) -> None:
        stream.write(line)
        stream.flush()

    return write


@contextmanager
def _signals_raise(report: _Report) -> Iterator[None]:
    """SIGINT and SIGTERM end the block at once, even where it waits for stdin: each row is written when it is done."""

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(signum, f"stopped by {signal.Signals(signum).name}: {report.words}")

    previous = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class _Report:
    """What happened so far: a bar on a terminal; elsewhere bad lines alone, and with --json figures at the end."""

    def __init__(self, options: Options, file: RowFile | None) -> None:
        self.options, self.name = options, str(file.path) if file is not None else "stdout"
        self.rows = self.kept = self.tokens = self.bad = 0
        self._bar: Progress | None = None

    def __enter__(self) -> _Report:
        if not self.options.quiet and sys.stderr.isatty() and (self.name != "stdout" or not sys.stdout.isatty()):
            self._bar = _start_bar(self.options.source)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def row(self, tokens: int | None) -> None:
        """One row more; tokens is None where it was there before."""
        self.rows += 1
        self.kept += tokens is None
        self.tokens += tokens or 0
        self._move()

    def left_out(self, error: UserError) -> None:
        self.bad += 1
        self._say(f"gpt: left out: {error}")
        self._move()

    def end(self) -> None:
        if self.options.json and self.name != "stdout":
            row = {"output": self.name, "rows": self.rows, "kept": self.kept, "tokens": self.tokens, "bad": self.bad}
            print(json.dumps(row))
        if self.bad or sys.stderr.isatty():
            self._say(f"gpt: {self.words}")

    @property
    def words(self) -> str:
        parts = [f"{self.rows:,} rows in {self.name}"]
        parts += [f"{self.kept:,} of them from before"] * bool(self.kept)
        parts += [f"{self.bad:,} bad lines left out"] * bool(self.bad)
        return ", ".join(parts)

    def _move(self) -> None:
        if self._bar is not None:
            words = f"{self.tokens:,} tokens"
            self._bar.update(self._bar.task_ids[0], completed=self.rows + self.bad, description=words)

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, soft_wrap=True)
        elif not self.options.quiet:
            print(line, file=sys.stderr)


def _start_bar(source: str) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gptcli.data.sources import count_lines

    console = Console(file=sys.stderr, highlight=False, markup=False)
    columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task("0 tokens", total=None if source == "-" else count_lines(Path(source)))
    bar.start()
    return bar
