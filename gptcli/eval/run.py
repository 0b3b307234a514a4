"""A task on a model: items in, a Result out."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from gptcli.errors import UserError
from gptcli.eval.perplexity import measure_documents
from gptcli.eval.results import Aggregate, Result
from gptcli.eval.rows import Placed, Shots, read_items
from gptcli.eval.scorer import Advance, Likelihood, Prompt, Scorer, encode
from gptcli.eval.task import METRICS, Task

Normalize = Literal["none", "chars", "bytes", "tokens", "answer-context"]
ANSWER_CONTEXT = "Answer:"  # GPT-3's: how likely is a choice as an answer to nothing?


@dataclass(frozen=True)
class Options:
    """How a task is asked, beyond its definition."""

    data: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = 0
    instruction: str = ""
    normalize: Normalize = "chars"
    stride: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Subject:
    """What is measured, as results name it."""

    scorer: Scorer
    checkpoint: str
    tokenizer: str
    settings: dict[str, Any]


def run_task(task: Task, subject: Subject, options: Options, advance: Advance = lambda _: None) -> Result:
    """Raises UserError for data that do not fit the task."""
    placed = everything = read_items(task, options.data, limit=options.limit)
    if options.limit is not None and shots_asked(task, options):
        everything = read_items(task, options.data)  # so that each item is asked as it is without a limit
    shots, number = make_shots(task, everything, options), {p.id: i for i, p in enumerate(everything)}
    heads = [shots.before(number[p.id], p.item) for p in placed]
    measure = {"choice": _choice, "text": _text, "generate": _generate}.get(task.kind, _word)
    rows, requests, corpus = measure(task, placed, heads, subject.scorer, options, advance)
    items: list[dict[str, Any]] = [{"id": p.id, **row} for p, row in zip(placed, rows, strict=True)]
    aggregates = {name: how for name, how in _metrics(task, rows).items() if how.value in rows[0]}
    estimates = {name: how(items) for name, how in aggregates.items()}
    settings = {
        **asdict(options), "data": options.data or list(task.sources.values()), "num_fewshot": shots.k,
        "separator": task.separator, "about": task.about, **subject.settings,
    }  # fmt: skip
    return Result(
        task=task.name,
        metrics=corpus | {name: estimate.value for name, estimate in estimates.items()},
        n=len(items),
        checkpoint=subject.checkpoint,
        tokenizer=subject.tokenizer,
        prompt_hash=prompt_hash(requests),
        stderr={name: e.stderr for name, e in estimates.items() if e.stderr is not None},
        aggregates=aggregates,
        settings=settings,
        groups=_groups(placed, items, aggregates),
        items=items,
    )


def run_perplexity(texts: Sequence[str], subject: Subject, options: Options, advance: Advance) -> Result:
    """Of text as a stream: per token, per word, and bits per byte."""
    engine = subject.scorer.engine
    documents = measure_documents(
        engine.model, subject.scorer.tokenizer, texts, stride=options.stride, dtype=engine.dtype, advance=advance
    )
    items = [{"id": str(i), **asdict(d)} for i, d in enumerate(documents)]
    aggregates = {
        "perplexity": Aggregate("nll", over="tokens", then="exp"),
        "word_perplexity": Aggregate("nll", over="words", then="exp"),
        "bits_per_byte": Aggregate("nll", over="bytes", then="bits"),
    }
    estimates = {name: how(items) for name, how in aggregates.items()}
    sums = {name: sum(item[name] for item in items) for name in ("tokens", "bytes", "words")}
    return Result(
        task="perplexity",
        metrics={name: e.value for name, e in estimates.items()} | {"nll": math.fsum(d.nll for d in documents), **sums},
        n=len(items),
        checkpoint=subject.checkpoint,
        tokenizer=subject.tokenizer,
        prompt_hash=prompt_hash(texts),
        stderr={name: e.stderr for name, e in estimates.items() if e.stderr is not None},
        aggregates=aggregates,
        settings={"data": options.data, "stride": options.stride, **subject.settings},
        items=items,
    )


def make_shots(task: Task, everything: list[Placed], options: Options) -> Shots:
    """Examples from --examples, else the task's own, else the other items of the data given."""
    own = [task.examples] if task.examples and not options.data else []
    specs, k = options.examples or own, shots_asked(task, options)
    examples = everything if not k or not specs else read_items(task, specs)
    return Shots(examples, k, options.seed, task.separator, options.instruction)


def shots_asked(task: Task, options: Options) -> int:
    return task.num_fewshot if options.num_fewshot is None else options.num_fewshot


def prompt_hash(requests: Iterable[Any]) -> str:
    """sha256 over all requests in order."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps(request, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


Measured = tuple[list[dict[str, Any]], list[Any], dict[str, float]]  # items' values, requests, corpus metrics


def _choice(
    task: Task, placed: list[Placed], heads: list[str], scorer: Scorer, options: Options, advance: Advance
) -> Measured:
    """The choice of the highest likelihood, and the same after a normalisation."""
    pairs = [(head + c, a) for head, p in zip(heads, placed, strict=True) for c, a in p.item.pairs]
    if prior := options.normalize == "answer-context":
        pairs += [(ANSWER_CONTEXT, a) for p in placed for _, a in p.item.pairs]
    scored = scorer.loglikelihood(pairs, advance)
    count = len(pairs) // (2 if prior else 1)
    rows, at = [], 0
    for p in placed:
        item, here = p.item, slice(at, at + len(p.item.pairs))
        logprobs = np.array([s.logprob for s in scored[here]])
        row = {"acc": float(logprobs.argmax() == item.gold), "gold": item.gold, "predicted": int(logprobs.argmax())}
        if options.normalize != "none":
            priors = scored[count + at : count + at + len(item.pairs)]
            normal = _normalized(logprobs, scored[here], priors, item.choices, options.normalize)
            row["acc_norm"] = float(normal.argmax() == item.gold)
        rows.append({**row, "logprobs": logprobs.tolist()})
        at += len(item.pairs)
    return rows, pairs, {}


def _normalized(
    logprobs: np.ndarray,
    scored: Sequence[Likelihood],
    priors: Sequence[Likelihood],
    choices: Sequence[str],
    normalize: Normalize,
) -> np.ndarray:
    if normalize == "answer-context":
        return logprobs - [prior.logprob for prior in priors]
    if normalize == "tokens":
        return logprobs / [s.tokens for s in scored]
    return logprobs / [max(1, len(c if normalize == "chars" else c.encode())) for c in choices]


def _word(
    task: Task, placed: list[Placed], heads: list[str], scorer: Scorer, options: Options, advance: Advance
) -> Measured:
    """Whether the continuation is what the model would have said, and its surprise."""
    pairs = [(head + p.item.pairs[0][0], p.item.pairs[0][1]) for head, p in zip(heads, placed, strict=True)]
    if task.kind == "last_token":
        ids = [encode(scorer.tokenizer, context + word) for context, word in pairs]
        scored = scorer.loglikelihood_tokens([(tuple(row[:-1]), (row[-1],)) for row in ids], advance)
    else:
        scored = scorer.loglikelihood(pairs, advance)
    return [{"acc": float(s.greedy), "nll": -s.logprob, "tokens": s.tokens} for s in scored], pairs, {}


def _text(
    task: Task, placed: list[Placed], heads: list[str], scorer: Scorer, options: Options, advance: Advance
) -> Measured:
    if any(heads):
        raise UserError(f"--task {task.name}: is likelihood of whole texts, so it takes no examples and no instruction")
    texts = [p.item.pairs[0][0] for p in placed]
    scored = scorer.loglikelihood_rolling(texts, stride=options.stride, advance=advance)
    rows = [
        {"nll": -s.logprob, "tokens": s.tokens, "words": p.item.words, "bytes": p.item.bytes}
        for s, p in zip(scored, placed, strict=True)
    ]
    return rows, texts, {}


def _generate(
    task: Task, placed: list[Placed], heads: list[str], scorer: Scorer, options: Options, advance: Advance
) -> Measured:
    assert task.metric is not None
    new = options.max_new_tokens or task.max_new_tokens
    prompts = [Prompt(head + p.item.pairs[0][0], task.until, new) for head, p in zip(heads, placed, strict=True)]
    texts, references = scorer.generate_until(prompts, advance=advance), [p.item.references for p in placed]
    rows = [{**task.metric.each(text, r), "text": text} for text, r in zip(texts, references, strict=True)]
    return rows, prompts, task.metric.corpus(texts, references) if task.metric.corpus else {}


def _metrics(task: Task, rows: list[dict[str, Any]]) -> dict[str, Aggregate]:
    """The kind's, or of written answers whatever each is judged by."""
    judged = [name for name, value in rows[0].items() if isinstance(value, float)]
    return METRICS.get(task.kind, {name: Aggregate(name) for name in judged})


def _groups(
    placed: list[Placed], items: list[dict[str, Any]], aggregates: dict[str, Aggregate]
) -> dict[str, dict[str, float]]:
    names = list(dict.fromkeys(p.group for p in placed))
    if len(names) < 2:
        return {}
    members = {name: [row for row, p in zip(items, placed, strict=True) if p.group == name] for name in names}
    return {
        name: {metric: how(rows).value for metric, how in aggregates.items()} | {"n": len(rows)}
        for name, rows in members.items()
    }
