"""Whole texts of prompts, by whichever way `params` name: drawn, the best of several drawn, or searched for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.generate.beam import beam_completions
from gptcli.generate.engine import Completion, Engine, Prompt

Scorer = Callable[[list[str], list[str]], Sequence[float]]  # prompts, texts -> a number for each pair


def complete(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    streams: Sequence[int] | None = None,
    *,
    scorer: Scorer | None = None,
) -> list[Completion]:
    """params.num_return texts of each prompt, prompt by prompt, best first (beams: fewer where fewer exist).

    `streams` are Engine.stream's. `scorer` ranks the texts of best_of, instead of best_of_score.
    """
    if scorer is not None and params.best_of is None:
        raise UserError("a scorer chooses among the texts of best_of, which is not set")
    if engine.draft is not None and (params.num_beams > 1 or params.best_of is not None):
        raise UserError("a draft speeds up one text that is drawn; leave out either it, or num_beams and best_of")
    if params.num_beams > 1:
        return [c for prompt in prompts for c in beam_completions(engine, prompt, params)]
    if params.best_of is not None:
        return _best_of(engine, prompts, params, streams or range(len(prompts)), scorer)
    return engine.generate(prompts, params, streams)


def _best_of(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, streams: Sequence[int], scorer: Scorer | None
) -> list[Completion]:
    n = params.best_of
    assert n is not None
    drawn = engine.generate(
        [prompt for prompt in prompts for _ in range(n)],
        replace(params, best_of=None, num_return=1),
        [stream * n + i for stream in streams for i in range(n)],
    )
    if scorer is None:
        scores = [logprob_score(c, params.best_of_score) for c in drawn]
    else:
        scores = [float(s) for s in scorer([c.prompt for c in drawn], [c.text for c in drawn])]
        if len(scores) != len(drawn) or any(map(math.isnan, scores)):
            raise UserError(f"the scorer must give a number for each of {len(drawn)} texts, not {scores[:8]}")
    scored = [replace(c, score=score) for c, score in zip(drawn, scores, strict=True)]
    best = []
    for first in range(0, len(scored), n):
        of_prompt = sorted(scored[first : first + n], key=lambda c: -(c.score or 0.0))
        best += of_prompt[: params.num_return]
    return best


def logprob_score(completion: Completion, kind: str) -> float:
    """Log-probability under the model, the eos that ended the text included: in all ("sum"), or per token ("mean")."""
    logprobs = list(completion.logprobs)
    if completion.eos_logprob is not None:
        logprobs.append(completion.eos_logprob)
    return sum(logprobs) / (max(1, len(logprobs)) if kind == "mean" else 1)


def completion_row(id: str | int, completion: Completion, params: SamplingParams, logprobs: bool) -> dict[str, Any]:
    """What `gpt generate` writes of a text as JSON."""
    row: dict[str, Any] = {
        "id": id,
        "prompt": completion.prompt,
        "text": completion.text,
        "tokens": len(completion.ids),
        "finish_reason": completion.finish_reason,
        "seed": params.seed,
    }
    if completion.score is not None:
        row["score"] = completion.score
    if completion.draft is not None:
        row |= {f"draft_{name}": count for name, count in completion.draft._asdict().items()}
    return row | ({"logprobs": completion.logprobs} if logprobs else {})
