"""All that SamplingParams do to logits, in their order."""

from __future__ import annotations

import contextlib
from collections import defaultdict

import torch
from torch import Tensor

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.generate.constrain import grammar_of
from gptcli.generate.penalties import (
    History,
    ban,
    ends_repeated_ngram,
    ends_sequence,
    penalize_generated,
    penalize_repetition,
)
from gptcli.generate.sampling import keep_min_p, keep_top_k, keep_top_p, keep_typical, top_k
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.chat_template import end_ids


class Processors:
    """Raw logits (B, V) in, the logits to choose from out. What `params` leave off costs nothing.

    `grammar` starts each row's Constraint, which bans tokens before all else here (see constrain.py).
    `constrain`: logit bias, repetition, presence and frequency penalties, bans. It needs the rows' History where
    `needs_history` says so, and serves beam search too. `warp`, where a token is drawn: temperature, top-k, top-p,
    min-p, typical. A row's result depends on that row alone. `ends` are the ids that end a text.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises UserError for a bad word, a bias or a constraint that this tokenizer cannot write."""
        self.params = params
        self.ends = () if params.ignore_eos or tokenizer is None else end_ids(tokenizer)
        self.bias = bias_vector(params, vocab_size, tokenizer, device)
        self.bad_words = bad_sequences(params, tokenizer, device)
        self.grammar = grammar_of(params, vocab_size, tokenizer, next(iter(self.ends), None))
        self.minimum = params.min_new_tokens if self.ends else 0
        self.needs_history = bool(
            params.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
            or params.no_repeat_ngram
            or self.bad_words
            or self.minimum
        )

    @property
    def plain(self) -> bool:
        """Whether only temperature and top-k stand between logits and a draw."""
        params = self.params
        narrows = params.min_p or any(p is not None and p < 1.0 for p in (params.top_p, params.typical_p))
        return not (self.needs_history or self.bias is not None or self.grammar is not None or narrows)

    def __call__(self, logits: Tensor, history: History | None) -> Tensor:
        logits = self.constrain(logits.float(), history)
        return logits if self.params.temperature == 0.0 else self.warp(logits)

    def candidates(self, logits: Tensor, history: History | None) -> tuple[Tensor, Tensor | None]:
        """The same for a draw: logits (B, n), and the ids (B, n) that they are of, rising; None: the whole vocabulary.

        After top-k nothing needs to look at all tokens again, which takes longer than a small model's forward.
        """
        params = self.params
        logits = self.constrain(logits.float(), history)
        if params.temperature == 0.0:
            return logits, None
        if params.top_k is not None and params.top_k < logits.shape[-1] and (best := top_k(logits, params.top_k)):
            return self.narrow(best[0] / params.temperature), best[1]
        return self.warp(logits), None

    def constrain(self, logits: Tensor, history: History | None) -> Tensor:
        params, V = self.params, logits.shape[-1]
        if self.bias is not None:
            logits = logits + self.bias
        if not self.needs_history:
            return logits
        assert history is not None
        if params.repetition_penalty != 1.0:
            logits = penalize_repetition(logits, history.counts(V) > 0, params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            counts = history.counts(V, new_only=True)
            logits = penalize_generated(logits, counts, params.presence_penalty, params.frequency_penalty)
        # Bad words first: should the bans together leave nothing, it is a later one that gives way.
        for sequences in self.bad_words:
            logits = ban(logits, ends_sequence(history, sequences, V))
        if self.minimum:
            is_end = torch.isin(torch.arange(V), torch.tensor(self.ends)).to(logits.device)
            logits = ban(logits, is_end & (history.new < self.minimum)[:, None])
        if params.no_repeat_ngram:
            logits = ban(logits, ends_repeated_ngram(history, params.no_repeat_ngram, V))
        return logits

    def warp(self, logits: Tensor) -> Tensor:
        params = self.params
        if params.temperature != 1.0:
            logits = logits / params.temperature
        if params.top_k is not None:
            logits = keep_top_k(logits, params.top_k)
        return self.narrow(logits)

    def narrow(self, logits: Tensor) -> Tensor:
        """What follows top-k."""
        params = self.params
        if params.top_p is not None and params.top_p < 1.0:
            logits = keep_top_p(logits, params.top_p, params.top_p_mode)
        if params.min_p:
            logits = keep_min_p(logits, params.min_p)
        if params.typical_p is not None and params.typical_p < 1.0:
            logits = keep_typical(logits, params.typical_p)
        return logits


# ---- texts to ids ---------------------------------------------------------------------------------------------


def bias_vector(
    params: SamplingParams, vocab_size: int, tokenizer: Tokenizer | None, device: torch.device | str
) -> Tensor | None:
    """(V,), or None where nothing is biased."""
    if not params.logit_bias:
        return None
    bias = torch.zeros(vocab_size, device=device)
    for name, value in params.logit_bias.items():
        bias[_token_id(name, vocab_size, tokenizer)] += value
    return bias


def _token_id(name: str, vocab_size: int, tokenizer: Tokenizer | None) -> int:
    """Digits are an id, all else is the text of one token; a special token's name is its text."""
    if name.isdecimal():
        if int(name) >= vocab_size:
            raise UserError(f"logit_bias: {name} is no token id; this vocabulary has {vocab_size:,}")
        return int(name)
    if tokenizer is None:
        raise UserError(f"logit_bias: {name!r} is text, and this model has no tokenizer; give a token id")
    spelled = _spellings(tokenizer, name, parse_special=True)
    ids = next((ids for ids in spelled if len(ids) == 1), spelled[0])
    if len(ids) != 1:
        raise UserError(f"logit_bias: {name!r} is {len(ids)} tokens, and a bias belongs to one (`gpt tokenize` shows)")
    return ids[0]


def _spellings(tokenizer: Tokenizer, text: str, *, parse_special: bool = False) -> list[list[int]]:
    """Ids of a text that begins a document, and of one that goes on after a line break: where tokenizers put a space
    before a document, as Llama's do, those are others. Raises UserError for what it cannot write."""
    spellings = [tokenizer.encode(text, parse_special=parse_special)]
    with contextlib.suppress(UserError):  # one without a line break
        before, whole = tokenizer.encode("\n"), tokenizer.encode("\n" + text, parse_special=parse_special)
        if whole[: len(before)] == before:
            spellings.append(whole[len(before) :])
    return spellings


def bad_sequences(params: SamplingParams, tokenizer: Tokenizer | None, device: torch.device | str) -> list[Tensor]:
    """The bad words' token sequences, those of one length in one tensor (N, L)."""
    if params.bad_words and tokenizer is None:
        raise UserError("bad_words: these are texts, and this model has no tokenizer")
    by_length: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for word in params.bad_words:
        assert tokenizer is not None
        spellings = _spellings(tokenizer, word)
        # In running text a word begins with its space. A tokenizer without a space cannot write that one at all.
        with contextlib.suppress(UserError):
            spellings += _spellings(tokenizer, " " + word)
        for ids in filter(None, spellings):
            by_length[len(ids)].add(tuple(ids))
    return [torch.tensor(sorted(group), device=device) for _, group in sorted(by_length.items())]
