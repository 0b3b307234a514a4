"""Speculative decoding (Leviathan et al. 2023, algorithm 1; Chen et al. 2023): a small model, the draft, proposes some
tokens one by one, and the target, whose text it is, reads them all in one forward.

With p what the target may draw from and q what the draft does, both as SamplingParams make them, a proposal x is
accepted with probability min(1, p(x) / q(x)), and the first that is not gives way to a draw from (p - q)+. Either way
the token is distributed as p: the draft decides how fast a text comes, never how likely it is. At temperature 0 the
text is plain decoding's (but for ties that rounding breaks: several tokens read at once round otherwise than one). Else
it is not plain sampling's of the same seed, whose numbers are spent otherwise here.

Where all are accepted the paper draws one more token from p at once. Here the draft, which has to read the last
proposal anyway, proposes that one too. So every token comes about in one way, and the text depends on the models, the
seed and the stream, but not on where rounds end, that is, on draft_tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.errors import UserError
from gptcli.generate.penalties import History
from gptcli.generate.processors import Processors
from gptcli.generate.sampling import draw
from gptcli.generate.scheduler import DraftCounts, Request, Row, Token, check_room, window_start
from gptcli.model import GPT, KVCache
from gptcli.randomness import uniform


class SpeculativeScheduler:
    """A Scheduler that continues one request after the other, since a draft is for the latency of one text."""

    def __init__(self, model: GPT, draft: GPT, draft_tokens: int, *, dtype: torch.dtype = torch.float32) -> None:
        self.draft_tokens = draft_tokens
        self._target, self._draft = _Reader(model, dtype), _Reader(draft, dtype)
        self._requests: deque[tuple[Hashable, Iterator[Token]]] = deque()

    def add(self, request: Request, processors: Processors) -> None:
        """Queue a request. Raises UserError if it cannot be continued at all."""
        check_room(len(request.ids), request.params, self._target.limit)
        if processors.grammar is not None:
            raise UserError("a draft does not go with regex, choices or json_schema; leave out one of them")
        self._requests.append((request.key, self._continue(Row(request, processors, list(request.ids)))))

    def cancel(self, key: Hashable) -> None:
        self._requests = deque(entry for entry in self._requests if entry[0] != key)

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[Token]:
        """One token of the request under way."""
        if not self._requests:
            return []
        token = next(self._requests[0][1])
        if token.finish_reason is not None:
            self._requests.popleft()
        return [token]

    @torch.inference_mode()
    def _continue(self, row: Row) -> Iterator[Token]:
        request, proposed, accepted, reason = row.request, 0, 0, None
        for reader in (self._target, self._draft):
            reader.reserve(len(row.ids) + request.params.max_new_tokens)
        while reason is None:
            ids, q = self._proposals(row)
            logits = self._target.logits(ids, len(q) + 1)
            p = _distributions(row, logits, ids)
            for i in range(len(p)):
                if i == len(q):  # all were accepted, and the target has spoken of one token more
                    q.append(self._propose(row, ids))
                proposal = ids[len(row.ids)]
                token = _judge(row, proposal, p[i], q[i])
                accepted += token == proposal
                reason = row.append(token)
                logprob = logits[i].float().log_softmax(-1)[token].item() if request.logprobs else None
                yield Token(request.key, token, logprob, reason, draft=DraftCounts(proposed + len(q), accepted))
                if reason is not None or token != proposal:
                    break
            proposed += len(q)

    def _proposals(self, row: Row) -> tuple[list[int], list[Tensor]]:
        """The row's ids with proposals after them, and the distributions (V,) that those were drawn from."""
        ids, q, limit = list(row.ids), list[Tensor](), self._target.limit
        room = limit - (len(ids) - window_start(len(ids), limit))  # what is read in one forward has one view
        left = row.request.params.max_new_tokens - row.new
        for _ in range(min(self.draft_tokens, room, left - 1)):
            q.append(self._propose(row, ids))
            if ids[-1] in row.processors.ends:
                break
        return ids, q

    def _propose(self, row: Row, ids: list[int]) -> Tensor:
        """Add the draft's next token to `ids`; the distribution (V,) that it was drawn from."""
        q = _distributions(row, self._draft.logits(ids), ids)[0]
        ids.append(_draw(row, q, "draft", len(ids) - len(row.request.ids)))
        return q


class _Reader:
    """A model that reads one row through a cache. It keeps what it has read as far as it is asked of that again, so a
    proposal that was turned down, a view that has slid and another prompt are all one to it."""

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.model, self.limit, self.device = model, model.config.context_length, model.wte.weight.device
        self._cache = KVCache(model.config, 1, 0, device=self.device, dtype=dtype)
        self._read: list[int] = []

    def reserve(self, length: int) -> None:
        """Room for a row of so many ids, as far as the model sees them."""
        self._cache.grow(1, min(self.limit, length))

    def logits(self, ids: list[int], n: int = 1) -> Tensor:
        """(n, V): what the model says after each of the last n ids, which must share one view (see window_start)."""
        view = ids[window_start(len(ids) - n + 1, self.limit) :]
        most = min(self._cache.length(0), len(view) - n)
        kept = next((i for i in range(most) if view[i] != self._read[i]), most)
        self._cache.set_length(0, kept)
        self._read = view
        if n > 1 and kept < len(view) - n:  # a prompt, of whose logits most would be made in vain
            self._forward(view[kept:-n], last_only=True)
            kept = len(view) - n
        return self._forward(view[kept:], last_only=n == 1)

    def _forward(self, ids: list[int], *, last_only: bool) -> Tensor:
        tokens = torch.tensor([ids], device=self.device)
        logits = self.model(tokens, cache=self._cache, last_only=last_only).logits
        assert logits is not None
        return logits[0]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(V,): weights of the tokens that may take the place of a proposal turned down, (p - q)+."""
    excess = (p - q).clamp(min=0)
    return excess if excess.any() else p  # where p and q differ by rounding alone, nothing exceeds


def _judge(row: Row, proposal: int, p: Tensor, q: Tensor) -> int:
    """The row's next token: the proposal, or what takes its place."""
    number = uniform(row.request.params.seed, "accept", row.request.stream, row.new)
    if number * q[proposal].item() < p[proposal].item():
        return proposal
    return _draw(row, residual(p, q), "residual", row.new)


def _distributions(row: Row, logits: Tensor, ids: list[int]) -> Tensor:
    """(n, V): what the row's params make of a model's logits (n, V) after each of the last n of `ids`."""
    n, history = len(logits), None
    if row.processors.needs_history:
        prefixes = [ids[: len(ids) - n + 1 + i] for i in range(n)]
        history = History(prefixes, [len(row.request.ids)] * n, logits.device)
    logits = row.processors(logits, history)
    if row.request.params.temperature == 0.0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return logits.softmax(-1)


def _draw(row: Row, weights: Tensor, purpose: str, position: int) -> int:
    """A token by `weights` (V,), which need not sum to 1."""
    number = uniform(row.request.params.seed, purpose, row.request.stream, position)
    return int(draw(weights.log()[None], torch.tensor([number], device=weights.device)))
