"""Where questions come from: answers that checkpoints write, kept in a file beside the labels, or a file of answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptcli.config.load import to_tree
from gptcli.config.schema import SamplingParams
from gptcli.data.sources import has_surrogates, read_jsonl, stamp
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.generate.engine import MAX_ROWS
from gptcli.generate.pipeline import complete_in_order
from gptcli.generate.prompts import Job, read_jobs
from gptcli.generate.rowfile import RowFile
from gptcli.modeldir import open_model_dir, weight_files
from gptcli.rlhf.labels import Id, Question, Source, question_of
from gptcli.tokenizer.chat_template import are_messages

Advance = Callable[[int, int], None]  # answers there are, of so many
Key = tuple[str, Id, str, int]
KEY = ("checkpoint", "id", "prompt", "seed")


@dataclass(frozen=True)
class Sampling:
    """`samples` answers of each checkpoint to every prompt of the file `source`."""

    source: str
    checkpoints: Sequence[Path]
    samples: int
    params: SamplingParams
    open_engine: Callable[[Path], Engine]

    def made_by(self) -> dict[str, Any]:
        """What an answer hangs on beside its prompt."""
        weights = [
            [str(path), *(fact for file in weight_files(path) for fact in stamp(file)[1:])] for path in self.checkpoints
        ]
        return {"checkpoints": weights, "samples": self.samples, **to_tree(self.params)}

    def jobs(self) -> list[tuple[Path, list[Job]]]:
        """Each answer's own job, by checkpoint. `gpt generate -i` with a line of the same id and the seed writes the
        same text. Raises UserError, file and line, for a bad prompt."""
        out = []
        for place, path in enumerate(self.checkpoints):
            tokenizer, jobs = open_model_dir(path).require_tokenizer(), list[Job]()
            for job in _distinct(read_jobs(self.source, self.params, tokenizer)):
                first = job.params.seed + place * self.samples
                jobs += [replace(job, params=replace(job.params, seed=first + i)) for i in range(self.samples)]
            out.append((path, jobs))
        return out


def answers_path(labels: Path) -> Path:
    return labels.with_suffix(".answers.jsonl")


def sample_questions(sampling: Sampling, path: Path, *, overwrite: bool, advance: Advance) -> list[Question | None]:
    """A question a prompt; None where the answers leave nothing to choose. Answers that `path` holds are taken from
    there, so that a session which goes on shows the same ones."""
    with RowFile(path, sampling.made_by(), overwrite=overwrite) as file:
        known: dict[Key, str] = {tuple(row[name] for name in KEY): row["text"] for _, row in file.kept()}
        jobs = sampling.jobs()
        total = sum(len(of_checkpoint) for _, of_checkpoint in jobs)
        for checkpoint, of_checkpoint in jobs:
            missing = [job for job in of_checkpoint if _key(checkpoint, job) not in known]
            if not missing:
                continue
            engine = sampling.open_engine(checkpoint)
            for job, completion in complete_in_order(engine, _checked(engine, missing), max_rows=MAX_ROWS):
                key = _key(checkpoint, job)
                known[key] = completion.text
                row = dict(zip(KEY, key, strict=True)) | {"text": completion.text}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                advance(len(known), total)
    return _questions(jobs, known)


def _questions(jobs: list[tuple[Path, list[Job]]], known: dict[Key, str]) -> list[Question | None]:
    asked: dict[Id, Job] = {}
    answers: dict[Id, list[tuple[str, Source | None]]] = {}
    for checkpoint, of_checkpoint in jobs:
        for job in of_checkpoint:
            asked.setdefault(job.id, job)  # a chat's is in the words of the first checkpoint's template
            source = {"checkpoint": str(checkpoint), "seed": job.params.seed}
            answers.setdefault(job.id, []).append((known[_key(checkpoint, job)], source))
    return [question_of(id, asked[id].prompt, found, asked[id].messages) for id, found in answers.items()]


def _key(checkpoint: Path, job: Job) -> Key:
    return str(checkpoint), job.id, job.prompt, job.params.seed


def _checked(engine: Engine, jobs: list[Job]) -> Iterator[Job]:
    for job in jobs:
        try:
            engine.check(job.feed, job.params)
        except UserError as error:
            raise UserError(f"{job.where}: {error}") from error
        yield job


def _distinct(jobs: Iterator[Job]) -> Iterator[Job]:
    places: dict[Id, str] = {}
    for job in jobs:
        if (first := places.setdefault(job.id, job.where)) != job.where:
            raise UserError(f"{job.where}: id {job.id!r} is that of {first} too; labels are known by their ids")
        yield job


# ---- answers that are there already -----------------------------------------------------------------------------


def read_questions(path: Path) -> list[Question | None]:
    """Lines of {"prompt", "responses", "id"?, "sources"?}; a file of labels is one, to be labelled by somebody else.
    Raises UserError, file and line, for a bad one."""
    found: dict[Id, Question | None] = {}
    texts: dict[Id, tuple[str, list[str]]] = {}
    for number, row in read_jsonl(path):
        id, prompt, responses, sources = _fields(row, f"{path}:{number}")
        messages = row["messages"] if are_messages(row.get("messages")) else None
        id = number if id is None else id
        if texts.setdefault(id, (prompt, responses)) != (prompt, responses):
            raise UserError(f"{path}:{number}: id {id!r} has other answers on an earlier line; labels go by their ids")
        answers = [(text, source) for text, of_text in zip(responses, sources, strict=True) for source in of_text]
        found.setdefault(id, question_of(id, prompt, answers, messages))
    return list(found.values())


def _fields(row: dict[str, Any], where: str) -> tuple[Id | None, str, list[str], list[list[Source | None]]]:
    id, prompt, responses = row.get("id"), row.get("prompt"), row.get("responses")
    if id is not None and (not isinstance(id, str | int) or isinstance(id, bool)):
        raise UserError(f"{where}: id: expected text or a whole number, not {json.dumps(id)}")
    if not isinstance(prompt, str):
        raise UserError(f"{where}: prompt: expected text")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(r, str) for r in responses):
        raise UserError(f"{where}: responses: expected a list of at least two texts")
    if has_surrogates(json.dumps([prompt, responses], ensure_ascii=False)):
        raise UserError(f"{where}: holds half of a surrogate pair")
    sources = row.get("sources", [[] for _ in responses])
    if not isinstance(sources, list) or len(sources) != len(responses) or not all(isinstance(s, list) for s in sources):
        raise UserError(f"{where}: sources: expected a list for each of {len(responses)} responses")
    return id, prompt, responses, [of_text or [None] for of_text in sources]
