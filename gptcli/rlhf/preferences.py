"""Preferences in all their formats -> several responses to a prompt and pairs of them, the better one first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.chat_template import Message, are_messages, encode_chat

FORMATS = (
    "expected prompt, chosen, rejected; chosen, rejected as transcripts; or prompt, responses, ranking | scores "
    "(messages: a conversation instead of the prompt)"
)
TURN = "\n\nAssistant:"  # of Anthropic's transcripts; the last one that both share begins the answers
EncodePrompt = Callable[[str | list[int]], list[int]]  # Engine.encode_prompt


@dataclass(frozen=True)
class Pair:
    """responses[better] over responses[worse], with probability p, by `margin` at least."""

    better: int
    worse: int
    p: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class Preference:
    """messages: the conversation that the responses answer, of which `prompt` is only the text."""

    prompt: str
    responses: list[str]
    pairs: list[Pair]
    messages: list[dict[str, str]] | None = None


@dataclass(frozen=True)
class Comparison:
    """A preference as ids; each response ends with end-of-text. cut: the prompt has lost its beginning."""

    prompt: list[int]
    responses: list[list[int]]
    pairs: list[Pair]
    cut: bool = False

    @property
    def rows(self) -> list[list[int]]:
        return [self.prompt + response for response in self.responses]


# ---- from JSON ------------------------------------------------------------------------------------------------


def parse_preference(row: dict[str, Any]) -> Preference:
    """Raises UserError with the reason; the reader of the file adds its place."""
    if "chosen" in row or "rejected" in row:
        preference = _pair(row)
    elif "responses" in row:
        preference = _several(row)
    else:
        raise UserError(FORMATS)
    for pair in preference.pairs:
        if preference.responses[pair.better] == preference.responses[pair.worse]:
            raise UserError("chosen and rejected are the same text, so nothing is preferred")
    return preference


def _pair(row: dict[str, Any]) -> Preference:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    messages = _messages(row)
    if messages or "prompt" in row:
        prompt = _prompt(row, messages)
    else:
        prompt, chosen, rejected = split_transcripts(chosen, rejected)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise UserError(f"{name}: the answer is empty")
    p, margin = _number(row, "p_chosen", 1.0), _number(row, "margin", 0.0)
    if not 0 <= p <= 1:
        raise UserError(f"p_chosen: {p} is no probability")
    if margin < 0:
        raise UserError(f"margin: {margin}: it is by how much the chosen answer is better, and that is not below 0")
    return Preference(prompt, [chosen, rejected], [Pair(0, 1, p, margin)], messages)


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Anthropic's HH: whole dialogues that part ways in the answer to be judged -> prompt, chosen, rejected."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    common = chosen[: min(len(chosen), len(rejected)) if shared is None else shared]
    if (at := common.rfind(TURN)) < 0:
        raise UserError(f"no prompt, and chosen and rejected share no turn that ends with {TURN!r}")
    cut = at + len(TURN)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _several(row: dict[str, Any]) -> Preference:
    responses = row["responses"]
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(r, str) for r in responses):
        raise UserError("responses: expected a list of at least two texts")
    if empty := [i for i, r in enumerate(responses) if not r.strip()]:
        raise UserError(f"responses[{empty[0]}]: is empty")
    if ("ranking" in row) == ("scores" in row):
        raise UserError("responses: need a ranking or scores, one of them")
    pairs = _ranked(row["ranking"], len(responses)) if "ranking" in row else _rated(row["scores"], len(responses))
    messages = _messages(row)
    return Preference(_prompt(row, messages), responses, pairs, messages)


def _ranked(ranking: Any, count: int) -> list[Pair]:
    """Places in `responses`, from 0, best first; those of one list are tied: [2, [0, 3], 1]."""
    tiers = [tier if isinstance(tier, list) else [tier] for tier in ranking] if isinstance(ranking, list) else []
    places = list(itertools.chain(*tiers))
    if not all(type(place) is int for place in places) or sorted(places) != list(range(count)):
        raise UserError(f"ranking: {ranking}: expected each place from 0 to {count - 1} once, the best first")
    return [Pair(a, b) for high, low in itertools.combinations(tiers, 2) for a in high for b in low]


def _rated(scores: Any, count: int) -> list[Pair]:
    """Each pair's margin is the difference of its scores."""
    numbers = [_finite(score) for score in scores] if isinstance(scores, list) else []
    if len(numbers) != count or None in numbers:
        raise UserError(f"scores: {scores}: expected {count} numbers, one a response")
    order = sorted(range(count), key=lambda i: -numbers[i])  # type: ignore[operator]
    gaps = [(a, b, numbers[a] - numbers[b]) for a, b in itertools.combinations(order, 2)]  # type: ignore[operator]
    return [Pair(a, b, margin=gap) for a, b, gap in gaps if gap > 0]


def _messages(row: dict[str, Any]) -> list[dict[str, str]] | None:
    messages = row.get("messages")
    if messages is not None and not are_messages(messages):
        raise UserError("messages: expected a list of {role, content}")
    if messages and messages[-1]["role"] == "assistant":  # as in data that keeps the chosen answer there too
        raise UserError("messages: ends with an answer; it is the conversation before those that are compared")
    return messages


def _prompt(row: dict[str, Any], messages: Any) -> str:
    return "" if messages and "prompt" not in row else _text(row, "prompt", may_be_empty=True)


def _text(row: dict[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{name}: missing; {FORMATS}" if name not in row else f"{name}: expected text, not {value!r}")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{name}: the answer is empty")
    return value


def _number(row: dict[str, Any], name: str, default: float) -> float:
    value = _finite(row[name]) if row.get(name) is not None else default
    if value is None:
        raise UserError(f"{name}: expected a number, not {row[name]!r}")
    return value


def _finite(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


# ---- to ids ---------------------------------------------------------------------------------------------------


def encode_asked(
    prompt: str, messages: Sequence[Message] | None, tokenizer: Tokenizer, encode_prompt: EncodePrompt
) -> list[int]:
    """What is answered: a conversation's ids, or else a prompt's."""
    return encode_prompt(encode_chat(tokenizer, messages) if messages else prompt)


def encode_preference(
    preference: Preference, tokenizer: Tokenizer, encode_prompt: EncodePrompt, limit: int
) -> Comparison:
    """Prompt and responses are encoded apart, as they are when a response is written, and never merge across the seam.

    A prompt that leaves no room loses its beginning. Raises UserError where a response alone is more than `limit`.
    """
    end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    responses = [ids + end for ids in tokenizer.encode_batch(preference.responses)]
    longest = max(map(len, responses))
    if longest >= limit:
        raise UserError(
            f"a response of {longest} tokens leaves no room for its prompt in {limit} (train.seq_len, or the model's "
            "context)"
        )
    prompt = encode_asked(preference.prompt, preference.messages, tokenizer, encode_prompt)
    return Comparison(prompt[longest - limit :], responses, preference.pairs, cut=longest + len(prompt) > limit)


def length_accuracy(comparisons: Sequence[Comparison]) -> float:
    """The share of pairs that "the longer one" gets right, ties as half, each comparison counted once."""
    right = 0.0
    for c in comparisons:
        for pair in c.pairs:
            longer = len(c.responses[pair.better]) - len(c.responses[pair.worse])
            agrees = 0.5 if longer == 0 else float(longer > 0)
            right += (pair.p * agrees + (1 - pair.p) * (1 - agrees)) / len(c.pairs)
    return right / max(1, len(comparisons))
