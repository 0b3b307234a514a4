"""Rows that are continued together: they join and leave between steps, and share what they have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.generate.constrain import Constraint, keep_allowed
from gptcli.generate.decode import Decode
from gptcli.generate.native import Drawing, NativeDecode
from gptcli.generate.penalties import History
from gptcli.generate.processors import Processors
from gptcli.generate.sampling import choose, largest
from gptcli.model import GPT, KVCache
from gptcli.randomness import uniforms

PREFILL_TOKENS = 8192  # of prompts read in one forward, padding included
SHARED_PREFIX = 16  # a prompt's first tokens, by which another that begins alike is found


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `stream` numbers its random stream: with the same seed it gives the same tokens.

    top_logprobs: so many of the likeliest tokens are told with each one that is chosen.
    """

    key: Hashable
    ids: Sequence[int]
    params: SamplingParams
    stream: int = 0
    logprobs: bool = True
    top_logprobs: int = 0


class DraftCounts(NamedTuple):
    """Tokens that a draft has proposed for a request so far, and those of them that became its text."""

    proposed: int
    accepted: int


class Token(NamedTuple):
    """One new token of one request. finish_reason is set on its last: eos (not part of the text), length, or
    stop where a constraint has all it wants."""

    key: Hashable
    id: int
    logprob: float | None
    finish_reason: str | None
    top: Sequence[tuple[int, float]] = ()
    draft: DraftCounts | None = None


@dataclass(eq=False)
class Row:
    """A request under way: its prompt and what has followed."""

    request: Request
    processors: Processors
    ids: list[int]
    constraint: Constraint | None = None

    @property
    def new(self) -> int:
        return len(self.ids) - len(self.request.ids)

    def append(self, token: int) -> str | None:
        """The next id; the finish_reason where it is the last."""
        self.ids.append(token)
        if token in self.processors.ends:
            return "eos"
        spent = self.new >= self.request.params.max_new_tokens
        if self.constraint is not None:
            self.constraint.push(token)
            if self.constraint.stuck or (spent and self.constraint.complete):
                return "stop" if self.constraint.complete else "length"
        return "length" if spent else None


def window_start(length: int, context_length: int) -> int:
    """Where the model's view begins when it continues `length` tokens.

    Up to the context's length it sees all. Beyond, the view slides by half a context at a time and is computed
    anew, since shifted positions make old keys worthless; so a token's view depends on its place alone.
    """
    if length <= context_length:
        return 0
    stride = max(1, context_length // 2)
    return -(-(length - context_length) // stride) * stride


def check_room(prompt_length: int, params: SamplingParams, context_length: int) -> None:
    """Raises UserError where a view that would slide is to be refused."""
    if params.on_overflow == "refuse" and prompt_length + params.max_new_tokens > context_length:
        raise UserError(
            f"the prompt's {prompt_length} tokens and max_new_tokens {params.max_new_tokens} exceed the context of "
            f"{context_length} (on_overflow: refuse)"
        )


class Scheduler:
    """Continuous batching over one cache, whose first rows are the requests under way.

    A step reads the prompts that have joined, gives every row one token, and lets go of those that are done, the
    last row taking a freed place. A row's tokens do not depend on what runs beside it.
    """

    def __init__(
        self,
        model: GPT,
        *,
        max_rows: int,
        dtype: torch.dtype = torch.float32,
        decode: Decode | None = None,
    ) -> None:
        self.model, self.max_rows, self._decode = model, max_rows, decode
        self.device, self.limit = model.wte.weight.device, model.config.context_length
        self._dtype = dtype
        self._cache: KVCache | None = None
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._histories: dict[tuple[int, ...], History] = {}

    def add(self, request: Request, processors: Processors) -> None:
        """Queue a request; it joins when a row is free. Raises UserError if it cannot be continued at all."""
        check_room(len(request.ids), request.params, self.limit)
        constraint = processors.grammar.start(request.ids) if processors.grammar is not None else None
        self._waiting.append(Row(request, processors, list(request.ids), constraint))

    @torch.inference_mode()
    def cancel(self, key: Hashable) -> None:
        """Drop a request, waiting or under way; its row is free for the next step."""
        self._waiting = deque(row for row in self._waiting if row.request.key != key)
        self._leave([i for i, row in enumerate(self._rows) if row.request.key == key])

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One token for every request under way, or several: equally many for each, row by row."""
        self._join()
        if not self._rows:
            return []
        if not self._all_follow():
            tokens = self._choose(self._read_prompts())
        elif self._may_write():
            tokens = self._write()
        else:
            tokens = self._choose(self._follow())
        last = tokens[-len(self._rows) :]
        self._leave([i for i, token in enumerate(last) if token.finish_reason is not None])
        return tokens

    # ---- rows ----------------------------------------------------------------------------------------------

    def _join(self) -> None:
        before = len(self._rows)
        while self._waiting and len(self._rows) < self.max_rows:
            self._rows.append(self._waiting.popleft())
        if len(self._rows) == before:
            return
        self._histories.clear()
        room = max(min(self.limit, len(r.request.ids) + r.request.params.max_new_tokens) for r in self._rows)
        batch = len(self._rows)
        if self._decode is not None:
            batch, room = self._decode.size(batch, room)
        if self._cache is None and self._decode is not None:
            self._cache = self._decode.take(batch, room)
        elif self._cache is None:
            self._cache = KVCache(self.model.config, batch, room, device=self.device, dtype=self._dtype)
        self._cache.grow(batch, room)

    def _leave(self, places: Sequence[int]) -> None:
        """Free these rows. The last row moves into each hole."""
        for i in sorted(places, reverse=True):
            last = len(self._rows) - 1
            assert self._cache is not None
            if i != last:
                self._cache.copy_row(last, i)
            self._cache.set_length(last, 0)
            self._rows[i] = self._rows[last]
            self._rows.pop()
        if places:
            self._histories.clear()
        if places and not self._rows and self._decode is not None:
            assert self._cache is not None
            self._decode.give_back(self._cache)
            self._cache = None

    # ---- several steps at once -------------------------------------------------------------------------------

    def _may_write(self) -> bool:
        """Whether the decode can draw for all rows itself."""
        plain = all(row.processors.plain and not row.request.top_logprobs for row in self._rows)
        return plain and isinstance(self._decode, NativeDecode)

    def _write(self) -> list[Token]:
        """Steps until a row may end, or whoever waits has waited for long enough."""
        assert isinstance(self._decode, NativeDecode)
        assert self._cache is not None
        rows = self._rows
        left = min(row.request.params.max_new_tokens - row.new for row in rows)
        steps = min(left, self.limit - max(self._cache.lengths[: len(rows)]), self._decode.steps())
        ends = {end for row in rows for end in row.processors.ends}
        last, drawing = [row.ids[-1] for row in rows], self._drawing(rows, steps)
        asked = [row.request.logprobs for row in rows]
        ids, logprobs = self._decode.write(last, self._cache, drawing, ends, logprobs=any(asked))
        tokens = []
        for step, chosen in enumerate(ids):
            told = logprobs[step] if logprobs is not None else [0.0] * len(rows)
            for row, token, logprob, wanted in zip(rows, chosen, told, asked, strict=True):
                tokens.append(Token(row.request.key, token, logprob if wanted else None, row.append(token)))
        return tokens

    def _drawing(self, rows: Sequence[Row], steps: int = 1) -> Drawing:
        V, params = self.model.vocab_size, [row.processors.params for row in rows]
        places = [(row.request.params.seed, row.request.stream, row.new) for row in rows]
        numbers = uniforms("sample", ((seed, stream, new + i) for i in range(steps) for seed, stream, new in places))
        return Drawing(
            torch.tensor([min(p.top_k or V, V) for p in params]),
            torch.tensor([p.temperature for p in params]),
            torch.from_numpy(numbers).float().view(steps, len(rows)),
        )

    # ---- reading -------------------------------------------------------------------------------------------

    def _unread(self, i: int) -> int:
        """How many of a row's last ids are not in the cache yet."""
        assert self._cache is not None
        length = len(self._rows[i].ids)
        return length - window_start(length, self.limit) - self._cache.length(i)

    def _all_follow(self) -> bool:
        """Whether each row has one new token alone, as at most steps."""
        assert self._cache is not None
        read, limit, lengths = self._cache.lengths, self.limit, [len(row.ids) for row in self._rows]
        return all(n - window_start(n, limit) == read[i] + 1 for i, n in enumerate(lengths))

    def _follow(self) -> Tensor:
        """Feed each row its last token; logits (rows, V) of the next."""
        assert self._cache is not None
        last = [row.ids[-1] for row in self._rows]
        if self._decode is not None:
            return self._decode(last, self._cache)
        return self._read(0, len(last), [[token] for token in last])

    def _read_prompts(self) -> Tensor:
        """Feed each row what it has not seen; logits (rows, V) of the next."""
        parts = []
        for start, stop in self._segments():
            fresh = [self._rows[i].ids[-self._unread(i) :] for i in range(start, stop)]
            parts.append(self._read(start, stop, fresh))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _segments(self) -> Iterator[tuple[int, int]]:
        """Places [start, stop) of rows to read in one forward: those with one new token together, prompts in
        batches. A prompt that begins like one of the same batch waits for the next, and copies."""
        assert self._cache is not None
        for i, row in enumerate(self._rows):
            if window_start(len(row.ids), self.limit) != window_start(len(row.ids) - 1, self.limit):
                self._cache.set_length(i, 0)  # the view has slid
        beginnings: dict[tuple[int, ...], int] = {}
        start, widest = 0, 0
        for i in range(len(self._rows)):
            fresh, alike = self._unread(i), self._alike(i, beginnings)
            if i > start and (
                (fresh == 1) != (widest == 1)
                or (fresh > 1 and max(widest, fresh) * (i + 1 - start) > PREFILL_TOKENS)
                or (alike is not None and alike >= start and fresh > 1)
            ):
                yield start, i
                start, widest = i, 0
            if alike is not None and self._cache.length(i) == 0 and alike < start:
                fresh -= self._copy_beginning(alike, i)
            widest = max(widest, fresh)
        yield start, len(self._rows)

    def _alike(self, i: int, beginnings: dict[tuple[int, ...], int]) -> int | None:
        """An earlier row whose view begins as this one's does, by the `beginnings` seen so far."""
        ids = self._rows[i].ids
        start = window_start(len(ids), self.limit)
        beginning = tuple(ids[start : start + SHARED_PREFIX])
        earlier = beginnings.setdefault(beginning, i)
        return earlier if earlier != i and len(beginning) == SHARED_PREFIX else None

    def _copy_beginning(self, source: int, target: int) -> int:
        """Take over what another row has read of the same tokens; how many. The last token is always read anew."""
        assert self._cache is not None
        theirs, ours = (self._rows[i].ids for i in (source, target))
        their_start, our_start = (window_start(len(ids), self.limit) for ids in (theirs, ours))
        most = min(len(ours) - our_start - 1, self._cache.length(source))
        shared = next((n for n in range(most) if ours[our_start + n] != theirs[their_start + n]), most)
        if shared:
            self._cache.copy_row(source, target, shared)
        return shared

    def _read(self, start: int, stop: int, fresh: list[list[int]]) -> Tensor:
        """Feed rows [start, stop) these ids; logits (rows, V) of their next tokens."""
        assert self._cache is not None
        whole = (start, stop) == (0, self._cache.batch)
        cache = self._cache if whole else self._cache.rows(start, stop)
        width = max(map(len, fresh))
        if width == 1 and isinstance(self._decode, NativeDecode):
            return self._decode([token for (token,) in fresh], cache)
        mask = None
        if min(map(len, fresh)) < width:
            # padding needs room too, which the longest row may not have left
            if max(cache.lengths) + width > cache.capacity:
                return torch.cat([self._read(start + i, start + i + 1, [ids]) for i, ids in enumerate(fresh)])
            mask = torch.tensor([[j < len(ids) for j in range(width)] for ids in fresh], device=self.device)
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in fresh], device=self.device)
        logits = self.model(tokens, attention_mask=mask, cache=cache, last_only=True).logits
        return logits[:, -1]

    # ---- choosing ------------------------------------------------------------------------------------------

    def _choose(self, logits: Tensor) -> list[Token]:
        """The next token of each row, and its log-probability under the model itself."""
        picked = [0] * len(self._rows)
        for processors, places in self._groups():
            together = len(places) == len(self._rows)
            chosen = self._choose_group(logits if together else logits[places], processors, places)
            for place, token in zip(places, chosen, strict=True):
                picked[place] = token
        told = zip(self._rows, picked, *self._measure(logits, picked), strict=True)
        return [Token(row.request.key, token, logprob, row.append(token), top) for row, token, logprob, top in told]

    def _measure(self, logits: Tensor, picked: list[int]) -> tuple[list[float | None], list[list[tuple[int, float]]]]:
        """For each row, as its request asks: the token's log-probability, and the likeliest tokens with theirs."""
        asked = [row.request.logprobs for row in self._rows]
        if not any(asked):
            return [None] * len(picked), [[] for _ in picked]
        index = torch.tensor(picked, device=self.device)[:, None]
        every = logits.float().log_softmax(-1)
        logprobs = every.gather(1, index)[:, 0].tolist()
        counts = [row.request.top_logprobs for row in self._rows]
        tops = [row[:count] for row, count in zip(largest(every, max(counts)), counts, strict=True)]
        return [logprob if wanted else None for logprob, wanted in zip(logprobs, asked, strict=True)], tops

    def _groups(self) -> list[tuple[Processors, list[int]]]:
        """Rows by the processors that they share."""
        groups: dict[int, tuple[Processors, list[int]]] = {}
        for i, row in enumerate(self._rows):
            groups.setdefault(id(row.processors), (row.processors, []))[1].append(i)
        return list(groups.values())

    def _choose_group(self, logits: Tensor, processors: Processors, places: list[int]) -> list[int]:
        rows = [self._rows[i] for i in places]
        if processors.plain and isinstance(self._decode, NativeDecode):
            return self._decode.choose(logits, self._drawing(rows))  # as where it draws alone, to the last bit
        history = self._history(rows) if processors.needs_history else None
        if processors.grammar is not None:
            logits = keep_allowed(logits, [row.constraint for row in rows if row.constraint is not None])
        candidates, ids = processors.candidates(logits, history)
        streams, positions = [row.request.stream for row in rows], [row.new for row in rows]
        seeds = [row.request.params.seed for row in rows]
        picked = choose(candidates, processors.params.temperature, seeds, streams, positions)
        if ids is not None:
            picked = ids.gather(1, picked[:, None])[:, 0]
        if history is not None:
            history.append(picked)
        return picked.tolist()

    def _history(self, rows: list[Row]) -> History:
        """The rows' ids as a tensor, kept from step to step as long as the same rows go on."""
        members = tuple(map(id, rows))
        if members not in self._histories:
            prompts = [len(row.request.ids) for row in rows]
            self._histories[members] = History([row.ids for row in rows], prompts, self.device)
        return self._histories[members]
