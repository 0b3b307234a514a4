"""Text held to a regular expression, to choices or to a JSON schema: which tokens may come next, row by row.

llguidance follows the grammar; it is optional (`pip install 'gptcli[constrain]'`) and imported at the first constraint.
A text keeps to its constraint unless its tokens run out before the grammar is satisfied (finish_reason "length") or a
stop string cuts it. Where the grammar is satisfied end-of-text may come, and where nothing may follow it must; a
tokenizer without one goes on as long as it may, and then stops.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.spelling import token_bytes

# Separators as json.dumps writes them and no other white space, of which there could be any amount.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_of(
    params: SamplingParams, vocab_size: int, tokenizer: Tokenizer | None, eos_id: int | None
) -> Grammar | None:
    """What `params` hold the text to; None where that is nothing. Raises UserError for what cannot be followed."""
    for key in ("regex", "choices", "json_schema"):
        if (value := getattr(params, key)) not in (None, []):
            if tokenizer is None:
                raise UserError(f"{key}: holds text, and this model has no tokenizer")
            return Grammar(key, value, tokenizer, vocab_size, eos_id)
    return None


class Grammar:
    """A compiled constraint, from which each row starts."""

    def __init__(self, key: str, value: Any, tokenizer: Tokenizer, vocab_size: int, eos_id: int | None) -> None:
        self.key, self.tokenizer, self.vocab_size, self.eos_id = key, tokenizer, vocab_size, eos_id
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise UserError(f"{key}: needs llguidance: pip install 'gptcli[constrain]'") from None
        self._matcher = LLMatcher(_vocabulary(tokenizer, vocab_size, eos_id), _source(key, value), log_level=0)
        if self._matcher.is_error():
            raise UserError(f"{key}: {_reason(self._matcher.get_error())}")

    def start(self, prompt: Sequence[int]) -> Constraint:
        """The state of a row that follows `prompt`. Raises UserError where no token can begin it."""
        constraint = Constraint(self, self._matcher.deep_copy())
        begins_text = not self.tokenizer.decode(prompt, skip_special=True)
        if begins_text and (dropped := _drops_first_space(self.tokenizer)):
            constraint.allowed[list(dropped)] = False
        if not constraint.allowed.any():
            raise UserError(f"{self.key}: no token of this tokenizer can begin a text that keeps to it")
        return constraint


class Constraint:
    """One row's place in its grammar. `allowed` (V,) are the tokens that may come next, end-of-text among them."""

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._look()

    def push(self, token: int) -> None:
        """`token`, one of those allowed, has come."""
        self._matcher.consume_token(token)
        self._look()

    def _look(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"{self._grammar.key}: {_reason(self._matcher.get_error())}")
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self.allowed = np.unpackbits(bits, bitorder="little")[: self._grammar.vocab_size].astype(bool)
        if self._grammar.eos_id is not None and not self._matcher.is_accepting():
            self.allowed[self._grammar.eos_id] = False  # it is offered where no other token fits, too

    @property
    def stuck(self) -> bool:
        """Whether nothing can come, not even end-of-text: there is none, or the vocabulary lacks what must follow."""
        return not self.allowed.any()

    @property
    def complete(self) -> bool:
        """Whether the text is whole and cannot become longer."""
        goes_on = self.allowed.sum() - (self._grammar.eos_id is not None and self.allowed[self._grammar.eos_id])
        return not goes_on and self._matcher.is_accepting()


def keep_allowed(logits: Tensor, constraints: Sequence[Constraint]) -> Tensor:
    """-inf for what each row's constraint forbids."""
    allowed = torch.from_numpy(np.stack([c.allowed for c in constraints])).to(logits.device)
    return logits.masked_fill(~allowed, -torch.inf)


# ---- for llguidance -----------------------------------------------------------------------------------------------


def _source(key: str, value: Any) -> str:
    """The grammar as llguidance reads it."""
    from llguidance import LLMatcher

    if key == "regex":
        return LLMatcher.grammar_from_regex(value)
    if key == "choices":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in value))
    return LLMatcher.grammar_from_json_schema(read_schema(value), defaults=JSON_STYLE)


def read_schema(value: str) -> dict[str, Any]:
    """A JSON schema out of a file, or out of the text itself where that begins with "{". Raises UserError."""
    inline = value.lstrip().startswith("{")
    name = "json_schema" if inline else f"json_schema: {value}"
    try:
        schema = json.loads(value if inline else Path(value).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{name}: not JSON ({error})") from error
    if not isinstance(schema, dict):
        raise UserError(f"{name}: expected a JSON object")
    return schema


class _Vocabulary:
    """A tokenizer as llguidance wants it: bytes of tokens, and tokens of bytes. Where a grammar leaves one way to go
    on, llguidance allows the tokens that this gives for it, and no other spelling of the same bytes."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], eos_id: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id, self.bos_token_id = tokens, special, eos_id, None
        self._tokenizer = tokenizer
        self._of_bytes = {token: i for i, token in enumerate(tokens) if token}
        self._longest = max(map(len, tokens))

    def __call__(self, data: bytes) -> list[int]:
        try:
            ids = self._tokenizer.encode(data.decode())
        except (UserError, UnicodeDecodeError):
            return self._longest_first(data)
        return ids if b"".join(self.tokens[i] for i in ids) == data else self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        """Ends where no token goes on."""
        ids, start = list[int](), 0
        while start < len(data):
            pieces = (data[start:end] for end in range(min(len(data), start + self._longest), start, -1))
            piece = next((p for p in pieces if p in self._of_bytes), None)
            if piece is None:
                break
            ids.append(self._of_bytes[piece])
            start += len(piece)
        return ids


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_id: int | None) -> Any:
    """The last id, one more than the model has, is the end of text of a tokenizer that has none."""
    from llguidance import LLTokenizer, TokenizerWrapper

    spelled = token_bytes(tokenizer)
    tokens = [spelled.get(i, b"") for i in range(vocab_size + 1)]
    special = [*(i for i in tokenizer.special_ids if i is not None), vocab_size]
    for i in special:
        tokens[i] = b"\xff<%d>" % i
    wrapper = TokenizerWrapper(_Vocabulary(tokenizer, tokens, special, vocab_size if eos_id is None else eos_id))
    return LLTokenizer(wrapper, n_vocab=vocab_size + 1)


@functools.lru_cache(maxsize=8)
def _drops_first_space(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that begin with a space which is dropped where they begin a text: of SentencePiece's kin, all such."""
    spaced = [i for i, spelled in token_bytes(tokenizer).items() if spelled.startswith(b" ")]
    drops = bool(spaced) and not tokenizer.decode(spaced[:1]).startswith(" ")
    return frozenset(spaced) if drops else frozenset()


def _reason(message: str) -> str:
    """llguidance's complaint on one line; of a regex's, which draws an arrow, the last one says it."""
    lines = [line.strip() for line in message.splitlines()]
    found = [re.sub("^error: ", "", line) for line in lines if line.startswith("error: ")]
    return found[0] if found else " ".join(filter(None, lines))[:300]
