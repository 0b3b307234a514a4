"""The three questions of an evaluation: how likely is a continuation, how likely a text, and what follows a prompt.

Token for token they are asked as EleutherAI's harness asks them, so that the figures can be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gptcli.config.schema import SamplingParams
from gptcli.contracts import IGNORE_INDEX
from gptcli.dist.runtime import autocast
from gptcli.errors import UserError
from gptcli.eval.perplexity import stream_logprobs
from gptcli.generate import Engine
from gptcli.model.kv_cache import KVCache
from gptcli.tokenizer import Tokenizer

BATCH_TOKENS = {"cpu": 4096}  # of one forward; a GPU wants more
BATCH_TOKENS_ELSEWHERE = 16384
SHARED_TOKENS = 8  # a context of fewer is read again for each of its continuations

Advance = Callable[[float], None]
Pair = tuple[str, str]  # context, continuation
Ids = tuple[int, ...]
TokenPair = tuple[Ids, Ids]
Group = tuple[Ids, list[Ids]]  # a context and its continuations


class Likelihood(NamedTuple):
    """Of a continuation: the sum of its log-probabilities in nats, whether each token was the likeliest, how many."""

    logprob: float
    greedy: bool
    tokens: int


class Prompt(NamedTuple):
    """Continue `context` greedily until one of `until`, or for max_new_tokens."""

    context: str
    until: tuple[str, ...]
    max_new_tokens: int


class Scorer:
    """Asks one model, on its one engine: longest first, in batches of tokens, nothing twice."""

    def __init__(self, engine: Engine, *, batch_tokens: int | None = None) -> None:
        self.engine, self.model = engine, engine.model
        self.tokenizer = engine.require_tokenizer()
        self.limit = engine.model.config.context_length
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(engine.device.type, BATCH_TOKENS_ELSEWHERE)

    # ---- continuations ---------------------------------------------------------------------------------------

    def loglikelihood(self, pairs: Sequence[Pair], advance: Advance = lambda _: None) -> list[Likelihood]:
        """Raises UserError naming the pair's number for a continuation that has no tokens, or not its own."""
        return self.loglikelihood_tokens(encode_pairs(self.tokenizer, pairs), advance)

    @torch.inference_mode()
    def loglikelihood_tokens(self, pairs: Sequence[TokenPair], advance: Advance = lambda _: None) -> list[Likelihood]:
        """The same of ids. What does not fit the context is cut off on the left. Each distinct pair is scored once,
        and of pairs with one context that context is read once."""
        cut = [self._fit(context, continuation) for context, continuation in pairs]
        groups: dict[Ids, list[Ids]] = {}
        for context, continuation in dict.fromkeys(cut):
            groups.setdefault(context, []).append(continuation)
        shared = {c: g for c, g in groups.items() if len(g) > 1 and len(c) >= SHARED_TOKENS}
        alone = [(c, [continuation]) for c, g in groups.items() if c not in shared for continuation in g]
        known: dict[TokenPair, Likelihood] = {}
        total = sum(map(len, groups.values()))
        for kind, score in ((alone, self._score_alone), (list(shared.items()), self._score_shared)):
            for batch in batches(kind, self.batch_tokens):
                known |= score(batch)
                advance(len(known) / total)
        return [known[pair] for pair in cut]

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> TokenPair:
        """Only context is ever cut; its last token, which predicts the first of the continuation, is always there."""
        room = self.limit + 1 - len(continuation)
        if room < 1:
            raise UserError(f"a continuation of {len(continuation)} tokens exceeds the model's context of {self.limit}")
        return tuple(context[-room:]), tuple(continuation)

    def _score_alone(self, batch: Sequence[Group]) -> dict[TokenPair, Likelihood]:
        pairs = [(context, continuations[0]) for context, continuations in batch]
        return self._read(pairs, [(*context, *continuation)[:-1] for context, continuation in pairs])

    def _score_shared(self, batch: Sequence[Group]) -> dict[TokenPair, Likelihood]:
        """Contexts but for their last token go through the model once; each continuation goes on from a copy."""
        contexts = [context[:-1] for context, _ in batch]
        pairs = [(context, continuation) for context, continuations in batch for continuation in continuations]
        room = max(map(len, contexts)) + max(len(continuation) for _, continuation in pairs)
        device, dtype = self.engine.device, self.engine.dtype
        cache = KVCache(self.model.config, len(batch), room, device=device, dtype=dtype)
        tokens = padded(contexts, 0).to(device)
        with autocast(device, dtype):
            self.model(tokens, targets=torch.full_like(tokens, IGNORE_INDEX), cache=cache, greedy=True)
        for row, context in enumerate(contexts):
            cache.set_length(row, len(context))  # the padding after it is forgotten
        cache.select([row for row, (_, continuations) in enumerate(batch) for _ in continuations])
        return self._read(pairs, [(context[-1], *continuation[:-1]) for context, continuation in pairs], cache)

    def _read(
        self, pairs: Sequence[TokenPair], inputs: Sequence[Sequence[int]], cache: KVCache | None = None
    ) -> dict[TokenPair, Likelihood]:
        """One forward of right-padded `inputs`, which end where the last token of each continuation is predicted."""
        device, tokens = self.engine.device, padded(inputs, 0)
        targets = torch.full_like(tokens, IGNORE_INDEX)
        for row, (ids, (_, continuation)) in enumerate(zip(inputs, pairs, strict=True)):
            targets[row, len(ids) - len(continuation) : len(ids)] = torch.tensor(continuation)
        places = torch.arange(tokens.shape[1])[None]
        if cache is not None:  # padding must not leave the table of positions
            places = (torch.tensor(cache.lengths)[:, None] + places).clamp(max=self.limit - 1)
        with autocast(device, self.engine.dtype):
            output = self.model(
                tokens.to(device), targets=targets.to(device), position_ids=places.to(device), cache=cache, greedy=True
            )
        assert output.logprobs is not None
        assert output.greedy is not None
        sums, hits = output.logprobs.double().sum(1).tolist(), output.greedy.sum(1).tolist()
        return {
            pair: Likelihood(logprob, hit == len(pair[1]), len(pair[1]))
            for pair, logprob, hit in zip(pairs, sums, hits, strict=True)
        }

    # ---- texts -------------------------------------------------------------------------------------------------

    def loglikelihood_rolling(
        self, texts: Sequence[str], *, stride: int | None = None, advance: Advance = lambda _: None
    ) -> list[Likelihood]:
        """Of whole texts, each after the token that begins a text; stride: by default the context, so that windows are
        disjoint. A bos that the tokenizer adds by itself is scored like any token, as the harness does."""
        start = start_token(self.tokenizer)
        streams = [[start, *encode(self.tokenizer, text)] for text in texts]
        scored = stream_logprobs(
            self.model, streams, stride=stride or self.limit, dtype=self.engine.dtype, advance=advance
        )
        return [Likelihood(row.double().sum().item(), False, len(row)) for row in scored]

    # ---- what follows ------------------------------------------------------------------------------------------

    def generate_until(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        advance: Advance = lambda _: None,
    ) -> list[str]:
        """The texts, without the stop that ended them; end-of-text stops too. params: other than greedy. A prompt
        that leaves no room for its new tokens is cut off on the left."""
        params = params or SamplingParams(temperature=0.0)
        distinct = list(dict.fromkeys(prompts))
        session, texts = self.engine.session(), [""] * len(distinct)
        for number in sorted(range(len(distinct)), key=lambda i: -len(distinct[i].context)):
            context, until, new = distinct[number]
            if new >= self.limit:
                raise UserError(f"{new} new tokens leave no room for a prompt in the model's context of {self.limit}")
            ids = encode(self.tokenizer, context) or [start_token(self.tokenizer)]
            asked = replace(params, stop=list(until), max_new_tokens=new)
            session.add(number, ids[-(self.limit - new) :], asked, stream=number)
        done = 0
        while session.busy:
            for piece in session.step():
                if piece.completion is not None:
                    assert isinstance(piece.key, int)
                    texts[piece.key] = piece.completion.text
                    done += 1
                    advance(done / len(distinct))
        known = dict(zip(distinct, texts, strict=True))
        return [known[prompt] for prompt in prompts]


def batches(groups: list[Group], most: int) -> Iterator[list[Group]]:
    """Longest first, so that rows read together need little padding: at most so many tokens, padding and all."""
    groups.sort(key=lambda group: -len(group[0]) - max(map(len, group[1])))
    batch: list[Group] = []
    rows = context = longest = 0
    for group in groups:
        rows += len(group[1])
        context, longest = max(context, len(group[0])), max(longest, max(map(len, group[1])))
        if batch and rows * (context + longest) > most:
            yield batch
            batch, rows = [], len(group[1])
            context, longest = len(group[0]), max(map(len, group[1]))
        batch.append(group)
    if batch:
        yield batch


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids with the bos that the tokenizer's own files put before every text, if they do. As the harness has it, special
    tokens in the text count as such: WikiText's <unk> is a Llama's."""
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return [*bos, *tokenizer.encode(text, parse_special=True)]


def start_token(tokenizer: Tokenizer) -> int:
    if tokenizer.start_id is None:
        raise UserError("this tokenizer names no token that begins a text, so a text without context has no likelihood")
    return tokenizer.start_id


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[TokenPair]:
    """Contexts and continuations are encoded together and split after as many tokens as the context has alone; white
    space that ends a context goes to the continuation; nothing before a continuation is the token that begins a text.
    """
    moved = []
    for context, continuation in pairs:
        stem = context.rstrip() if context else ""
        moved.append((stem, context[len(stem) :] + continuation))
    contexts = dict.fromkeys(context for context, _ in moved)
    lengths: dict[str, list[int]] = dict(
        zip(contexts, tokenizer.encode_batch(list(contexts), parse_special=True), strict=True)
    )
    texts = [context + continuation for context, continuation in moved]
    wholes = tokenizer.encode_batch(texts, parse_special=True)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    out: list[TokenPair] = []
    for number, ((context, continuation), whole) in enumerate(zip(moved, wholes, strict=True)):
        split = len(lengths[context])
        head, tail = whole[:split], whole[split:]
        if not head:
            head = [start_token(tokenizer)]
        elif bos is not None:
            head = [bos, *head]
        check_spelled(tokenizer, tail, continuation, number)
        out.append((tuple(head), tuple(tail)))
    return out


def check_spelled(tokenizer: Tokenizer, ids: Sequence[int], text: str, number: int) -> None:
    unknown = tokenizer.special.get("unk")
    if not ids:
        raise UserError(f"request {number}: the tokenizer has no tokens of its own for the continuation {text!r}")
    if unknown is not None and tokenizer.backend.token_to_id(unknown) in ids:
        raise UserError(f"request {number}: the tokenizer cannot spell the continuation {text!r} ({unknown} stands in)")


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(rows, longest), filled up on the right, where causality keeps it from mattering."""
    return torch.tensor(list(itertools.zip_longest(*rows, fillvalue=fill))).T.contiguous()
