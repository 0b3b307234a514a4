"""Beam search: the likeliest continuations there are, rather than drawn ones.

Semantics are Hugging Face's (transformers 5): of each step's 2 x num_beams likeliest candidates only the first
num_beams may end, and processors act on log-probabilities. A score is the log-probability of all new tokens, eos
included, over their number ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.config.schema import SamplingParams
from gptcli.generate.engine import Completion, Engine, Prompt
from gptcli.generate.penalties import History
from gptcli.generate.processors import Processors
from gptcli.generate.scheduler import window_start
from gptcli.generate.text import TextStream
from gptcli.model import KVCache


@dataclass(frozen=True)
class Beam:
    """New tokens (a final eos among them), each with its log-probability under the model; `total` is the sum of
    the processed ones. `score` and `finish_reason` are those of a beam that ended: eos, stop or length."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0
    score: float = 0.0
    finish_reason: str | None = None


def beam_completions(engine: Engine, prompt: Prompt, params: SamplingParams) -> list[Completion]:
    """The params.num_return best texts that follow `prompt`, best first."""
    prompt_ids = engine.encode_prompt(prompt)
    beams = beam_search(engine, prompt_ids, params)
    assert engine.tokenizer is not None  # or the prompt could not be encoded
    text = prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt)
    completions = []
    for beam in beams:
        ids, logprobs, eos_logprob = list(beam.ids), list(beam.logprobs), None
        if beam.finish_reason == "eos":
            ids.pop()
            eos_logprob = logprobs.pop()
        stream = TextStream(engine.tokenizer, params.stop, context=prompt_ids)
        for token in ids:
            stream.push(token)
        stream.flush()
        completions.append(Completion(text, stream.text, ids, logprobs, eos_logprob, beam.finish_reason, beam.score))
    return completions


@torch.inference_mode()
def beam_search(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[Beam]:
    """The params.num_return best continuations of `prompt`, best first; fewer where fewer exist."""
    processors = Processors(params, engine.model.vocab_size, engine.tokenizer, engine.device)
    history = History([prompt], [len(prompt)], engine.device) if processors.needs_history else None
    reader = _Reader(engine, prompt, params.max_new_tokens)
    beams, ended = [Beam()], list[Beam]()
    logits = reader.begin(beams)
    for length in range(1, params.max_new_tokens + 1):
        logprobs = logits.float().log_softmax(-1)
        totals = torch.tensor([b.total for b in beams], device=logits.device)[:, None]
        totals = totals + processors.constrain(logprobs, history)
        beams, parents, ending = _extend(engine, beams, totals, logprobs, processors.ends, params)
        ended = sorted(ended + ending, key=lambda b: -b.score)[: params.num_beams]
        if not beams or _settled(beams[0].total, ended, length, params):
            break
        if history is not None:
            history.select(parents)
            history.append(torch.tensor([b.ids[-1] for b in beams], device=logits.device))
        logits = reader.advance(beams, parents)
    return ended[: params.num_return]


def _extend(
    engine: Engine, beams: list[Beam], totals: Tensor, logprobs: Tensor, ends: Sequence[int], params: SamplingParams
) -> tuple[list[Beam], list[int], list[Beam]]:
    """One token more, from the totals (beams, V) of all candidates: the beams that go on, their parents' places,
    and the beams that end. Twice as many candidates as beams, so that enough are left when each may end in eos."""
    V, going, parents, ending = totals.shape[1], list[Beam](), list[int](), list[Beam]()
    best, places = totals.flatten().topk(min(2 * params.num_beams, totals.numel()))
    chosen = logprobs.flatten()[places]
    for rank, (total, place, logprob) in enumerate(zip(best.tolist(), places.tolist(), chosen.tolist(), strict=True)):
        if total == -torch.inf:
            break
        parent, token = divmod(place, V)
        ids = (*beams[parent].ids, token)
        score = total / len(ids) ** params.length_penalty
        reason = _finish_reason(engine, ids, ends, params)
        beam = Beam(ids, (*beams[parent].logprobs, logprob), total, score, reason)
        if reason is None and len(going) < params.num_beams:
            going.append(beam)
            parents.append(parent)
        elif reason is not None and rank < params.num_beams:
            ending.append(beam)
    return going, parents, ending


def _finish_reason(engine: Engine, ids: tuple[int, ...], ends: Sequence[int], params: SamplingParams) -> str | None:
    if ids[-1] in ends:
        return "eos"
    if params.stop and engine.tokenizer is not None:
        text = engine.tokenizer.decode(ids, skip_special=True)
        if any(stop in text for stop in params.stop if stop):
            return "stop"
    return "length" if len(ids) == params.max_new_tokens else None


def _settled(best_total: float, ended: list[Beam], length: int, params: SamplingParams) -> bool:
    """Whether the search is over, given the best running beam's total after `length` tokens.

    The best score it can still reach is that of adding tokens at no cost: with a positive length penalty as many as
    may come, else none. So `never` is exact (where no bias lifts a log-probability above 0); `false` takes the
    length it has in any case, which is a guess.
    """
    if len(ended) < params.num_beams:
        return False
    if params.early_stopping is True:
        return True
    to_the_end = params.early_stopping == "never" and params.length_penalty > 0
    reach = params.max_new_tokens if to_the_end else length
    return best_total / reach**params.length_penalty <= ended[-1].score


class _Reader:
    """Feeds beams to the model. All have one length, so the view (see window_start) slides for all at once."""

    def __init__(self, engine: Engine, prompt: Sequence[int], max_new_tokens: int) -> None:
        self.engine, self.prompt = engine, list(prompt)
        self.limit = engine.model.config.context_length
        self.most = len(prompt) + max_new_tokens

    def begin(self, beams: list[Beam]) -> Tensor:
        """Read every beam from the start of its view; logits (B, V) of the next tokens."""
        rows = [self.prompt + list(b.ids) for b in beams]
        start = window_start(len(rows[0]), self.limit)
        config, device = self.engine.model.config, self.engine.device
        room = min(self.limit, self.most - start)
        self.cache = KVCache(config, len(rows), room, device=device, dtype=self.engine.dtype)
        return self._forward(torch.tensor([row[start:] for row in rows], device=device))

    def advance(self, beams: list[Beam], parents: list[int]) -> Tensor:
        """Beams that each add one token to a parent, which is given by its place among the beams before."""
        length = len(self.prompt) + len(beams[0].ids)
        if window_start(length, self.limit) != window_start(length - 1, self.limit):
            return self.begin(beams)
        self.cache.select(parents)
        last = [b.ids[-1] for b in beams]
        if self.engine.native is not None:
            return self.engine.native(last, self.cache)
        return self._forward(torch.tensor(last, device=self.engine.device)[:, None])

    def _forward(self, tokens: Tensor) -> Tensor:
        output = self.engine.model(tokens, cache=self.cache, last_only=True)
        assert output.logits is not None
        return output.logits[:, -1]
