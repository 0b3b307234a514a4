"""Batched generation with a cache: prompts of any lengths go in, tokens come out row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.generate.penalties import History
from gptcli.generate.processors import Processors
from gptcli.generate.sampling import choose
from gptcli.generate.text import TextStream
from gptcli.model import GPT, KVCache
from gptcli.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """One new token of one row. finish_reason is set on the row's last: eos (not part of the text) or length."""

    row: int
    id: int
    logprob: float | None
    finish_reason: str | None


@dataclass
class Completion:
    """A text and its tokens, without the eos that ended it. score: a beam's, or what best_of chose by."""

    prompt: str
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    eos_logprob: float | None = None
    finish_reason: str | None = None
    score: float | None = None


def window_start(length: int, context_length: int) -> int:
    """Where the model's view begins when it continues `length` tokens.

    Up to the context's length it sees all. Beyond, the view slides by half a context at a time and is computed
    anew, since shifted positions make old keys worthless; so a token's view depends on its place alone.
    """
    if length <= context_length:
        return 0
    stride = max(1, context_length // 2)
    return -(-(length - context_length) // stride) * stride


class Engine:
    """One model and its tokenizer, generating."""

    def __init__(self, model: GPT, tokenizer: Tokenizer | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.device = model.wte.weight.device

    # ---- text ------------------------------------------------------------------------------------------------

    def stream(
        self, prompts: Sequence[str], params: SamplingParams, streams: Sequence[int] | None = None
    ) -> Iterator[tuple[int, str, Completion | None]]:
        """(row, new text, its completion when done) as they come; prompts run as one batch.

        `streams` numbers the rows' random streams (0, 1, ... by default): the same prompt, number and seed give
        the same text. Raises UserError for an empty prompt where nothing marks a beginning.
        Beams and best_of are in `generate/completions.py`.
        """
        assert params.num_beams == 1, "complete() searches"
        assert params.best_of is None, "complete() chooses"
        tokenizer = self._require_tokenizer()
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        texts = [TextStream(tokenizer, params.stop, context=ids) for ids in encoded]
        done = [Completion(prompt) for prompt in prompts]
        stopped: set[int] = set()
        for token in self.tokens(encoded, params, streams, stopped=stopped):
            row, c, text = token.row, done[token.row], texts[token.row]
            if token.finish_reason == "eos":
                c.eos_logprob = token.logprob
            else:
                c.ids.append(token.id)
                if token.logprob is not None:
                    c.logprobs.append(token.logprob)
            chunk = "" if token.finish_reason == "eos" else text.push(token.id)
            reason = token.finish_reason
            if text.stopped:
                reason = "stop"
                stopped.add(row)
            elif reason is not None:
                chunk += text.flush()
                reason = "stop" if text.stopped else reason
            if reason is not None:
                c.text, c.finish_reason = text.text, reason
            yield row, chunk, c if reason is not None else None

    def generate(
        self, prompts: Sequence[str], params: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[Completion]:
        """The same, all at once and in order."""
        out: list[Completion | None] = [None] * len(prompts)
        for row, _, completion in self.stream(prompts, params, streams):
            out[row] = completion or out[row]
        return [c for c in out if c is not None]

    def encode_prompt(self, prompt: str) -> list[int]:
        """A prompt's ids, after bos where the tokenizer's files say so; an empty one begins a document, that is,
        follows bos or end-of-text. Raises UserError where nothing marks a beginning."""
        tokenizer = self._require_tokenizer()
        ids = tokenizer.encode(prompt)
        if ids and not tokenizer.adds_bos:
            return ids
        if tokenizer.start_id is None:
            raise UserError("the prompt is empty, and this tokenizer names no token that begins a text")
        return [tokenizer.start_id, *ids]

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer, so it can neither read nor write text")
        return self.tokenizer

    # ---- tokens ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def tokens(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        streams: Sequence[int] | None = None,
        *,
        logprobs: bool = True,
        stopped: set[int] | None = None,
    ) -> Iterator[Token]:
        """New tokens of every row, until each has met eos, max_new_tokens or the caller's `stopped`."""
        batch = _Rows(self, prompts, params, streams if streams is not None else range(len(prompts)))
        logits = batch.prefill()
        while True:
            picked, picked_logprobs = batch.choose(logits, logprobs)
            going = []
            for i, row in enumerate(batch.rows):
                batch.ids[row].append(picked[i])
                reason = "eos" if picked[i] == batch.processors.eos_id else None
                if reason is None and batch.new_tokens(row) >= params.max_new_tokens:
                    reason = "length"
                yield Token(row, picked[i], picked_logprobs[i] if picked_logprobs else None, reason)
                if reason is None and not (stopped and row in stopped):
                    going.append(i)
            if not going:
                return
            logits = batch.advance(going)


class _Rows:
    """The rows still going, their ids so far, and the cache that holds them."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, streams: Sequence[int]
    ) -> None:
        self.engine, self.model, self.params = engine, engine.model, params
        self.limit = engine.model.config.context_length
        self.ids = [list(p) for p in prompts]
        self.prompt_lengths = [len(p) for p in prompts]
        self.streams = list(streams)
        self.rows = list(range(len(prompts)))
        self.processors = Processors(params, engine.model.vocab_size, engine.tokenizer, engine.device)
        self.history = History(self.ids, self.prompt_lengths, engine.device) if self.processors.needs_history else None

    def new_tokens(self, row: int) -> int:
        return len(self.ids[row]) - self.prompt_lengths[row]

    def prefill(self) -> Tensor:
        """Compute every row's view from scratch; logits (B, V) of the next tokens."""
        views = [self.ids[r][window_start(len(self.ids[r]), self.limit) :] for r in self.rows]
        longest = max(map(len, views))
        room = min(self.limit, longest + max(self.params.max_new_tokens - self.new_tokens(r) for r in self.rows))
        device, config = self.engine.device, self.model.config
        self.cache = KVCache(config, len(views), room, device=device, dtype=self.engine.dtype)
        tokens = torch.zeros(len(views), longest, dtype=torch.long)
        mask = torch.zeros(len(views), longest, dtype=torch.bool)
        for i, view in enumerate(views):
            tokens[i, : len(view)] = torch.tensor(view)
            mask[i, : len(view)] = True
        ragged = None if bool(mask.all()) else mask.to(device)
        return self._forward(tokens.to(device), ragged)

    def advance(self, going: list[int]) -> Tensor:
        """Keep the rows at these places and feed each its newest token; logits (B, V)."""
        if len(going) < len(self.rows):
            self.rows = [self.rows[i] for i in going]
            self.cache.select(torch.tensor(going, device=self.engine.device))
            if self.history is not None:
                self.history.select(going)
        before = [len(self.ids[r]) - 1 for r in self.rows]
        views = [n - window_start(n, self.limit) for n in before]
        if any(window_start(n, self.limit) != window_start(n + 1, self.limit) for n in before):
            return self.prefill()
        self.cache.tighten(max(views))
        newest = torch.tensor([[self.ids[r][-1]] for r in self.rows], device=self.engine.device)
        return self._forward(newest, None)

    def _forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        output = self.model(tokens, attention_mask=mask, cache=self.cache, last_only=True)
        assert output.logits is not None
        return output.logits[:, -1]

    def choose(self, logits: Tensor, logprobs: bool) -> tuple[list[int], list[float] | None]:
        """The next token of each row, and its log-probability under the model itself."""
        processed = self.processors(logits, self.history)
        positions = [self.new_tokens(r) for r in self.rows]
        picked = choose(processed, self.params, [self.streams[r] for r in self.rows], positions)
        if self.history is not None:
            self.history.append(picked)
        if not logprobs:
            return picked.tolist(), None
        chosen = logits.float().log_softmax(-1).gather(1, picked[:, None])[:, 0]
        return picked.tolist(), chosen.tolist()
