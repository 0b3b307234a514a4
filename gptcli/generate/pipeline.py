"""Files of prompts in, rows of texts out: in the input's order, as many at once as fit, never held as a whole."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gptcli.config.load import to_tree
from gptcli.config.schema import SamplingParams
from gptcli.data.sources import OnBad, refuse
from gptcli.errors import UserError
from gptcli.generate.completions import complete, completion_row
from gptcli.generate.constrain import read_schema
from gptcli.generate.engine import MAX_ROWS, Completion, Engine
from gptcli.generate.prompts import Job, read_jobs
from gptcli.generate.rowfile import RowFile

WINDOW = 8  # times max_rows: lines under way, or done and waiting for one before them
SAMPLE = 256  # values of each tensor that tell one checkpoint from another


@dataclass
class _Slot:
    job: Job
    completion: Completion | None = None


def generate_rows(
    engine: Engine,
    source: str,
    params: SamplingParams,
    write: Callable[[bytes], None],
    *,
    on_bad: OnBad = refuse,
    resume: RowFile | None = None,
    max_rows: int = MAX_ROWS,
    logprobs: bool = False,
    prompter: Callable[[str], str] | None = None,
) -> Iterator[Completion | None]:
    """Write a row for every prompt of `source` (see read_jobs), and yield its completion; None for one that
    `resume` has already.

    A line's text depends on its id, prompt and params alone. Where `on_bad` raises its error, as it does
    if left out, the lines before it are finished first.
    """
    jobs = read_jobs(source, params, engine.require_tokenizer(), on_bad=on_bad)
    if prompter is not None:
        jobs = (replace(job, prompt=prompter(job.prompt)) if job.ids is None else job for job in jobs)
    jobs = _continuable(engine, jobs, on_bad)
    if resume is not None:
        for _ in _skip_kept(jobs, resume):
            yield None
    for job, completion in complete_in_order(engine, jobs, max_rows=max_rows):
        row = completion_row(job.id, completion, job.params, logprobs) | {"prompt": job.prompt}
        if job.changes:
            row["params"] = job.changes
        write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        yield completion


def made_by(engine: Engine, params: SamplingParams, *, logprobs: bool) -> dict[str, Any]:
    """All that decides a row beside its line."""
    assert engine.tokenizer is not None
    digest = hashlib.blake2b(json.dumps(to_tree(engine.model.config)).encode(), digest_size=8)
    for name, tensor in sorted(engine.model.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // SAMPLE)]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    precision = str(engine.dtype).removeprefix("torch.")
    model = {"checkpoint": digest.hexdigest(), "tokenizer": engine.tokenizer.hash, "precision": precision}
    tree = {**model, "logprobs": logprobs, **to_tree(params)}
    if params.json_schema is not None:  # the schema itself: its file may change
        tree["json_schema"] = read_schema(params.json_schema)
    return tree


def complete_in_order(engine: Engine, jobs: Iterator[Job], *, max_rows: int) -> Iterator[tuple[Job, Completion]]:
    """Each job with its completion, in order and as soon as it may. A UserError of `jobs` comes after those before
    it."""
    session, running = engine.session(max_rows), dict[Hashable, _Slot]()
    window, count, end = deque[_Slot](), 0, None
    while window or end is None:
        while window and (done := window[0].completion) is not None:
            yield window.popleft().job, done
        while end is None and len(running) < max_rows and len(window) < WINDOW * max_rows:
            try:
                job = next(jobs)
            except (StopIteration, UserError) as error:
                end = error
                break
            slot = _Slot(job)
            window.append(slot)
            if job.params.num_beams > 1 or job.params.best_of is not None:
                slot.completion = complete(engine, [job.feed], job.params, [job.stream])[0]
            else:
                session.add(count, job.feed, job.params, job.stream)
                running[count] = slot
            count += 1
        for piece in session.step():
            if piece.completion is not None:
                running.pop(piece.key).completion = piece.completion
    if isinstance(end, UserError):
        raise end


def _continuable(engine: Engine, jobs: Iterator[Job], on_bad: OnBad) -> Iterator[Job]:
    """Those whose prompts the engine takes."""
    for job in jobs:
        try:
            engine.check(job.feed, job.params)
        except UserError as error:
            on_bad(UserError(f"{job.where}: {error}"))
        else:
            yield job


def _skip_kept(jobs: Iterator[Job], file: RowFile) -> Iterator[None]:
    """Pass over the jobs whose rows are there. Raises UserError where a row is not of the job in its place."""
    for number, row in file.kept():
        job = next(jobs, None)
        where = "the input's end" if job is None else job.where
        shown = (row.get("id"), row.get("prompt"), row.get("params", {}))
        if job is None or shown != (job.id, job.prompt, job.changes):
            raise UserError(
                f"{file.path}:{number}: its row is of another input than {where}; "
                "take another -o, or begin anew with --overwrite"
            )
        yield None
