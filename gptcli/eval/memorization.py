"""Does the model recite its training text? The prefix of a passage goes in, greedily it continues, and the passage
either follows word for word or does not (Carlini et al. 2023, section 3.2). Held-out text, which it cannot recite,
gives the share that comes of mere predictability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.eval.results import Aggregate
from gptcli.generate import Engine
from gptcli.randomness import Permutation, derive
from gptcli.tokenizer import Tokenizer

AGGREGATES = {"exact": Aggregate("exact"), "matched": Aggregate("matched")}


@dataclass(frozen=True)
class Passage:
    """`document` and `start` (in its tokens) say where it is from."""

    document: int
    start: int
    prefix: list[int]
    rest: list[int]


def draw_passages(
    tokenizer: Tokenizer, texts: Sequence[str], *, prefix: int, continuation: int, count: int, seed: int = 0
) -> list[Passage]:
    """At most `count` passages from places that the seed decides, evenly over the documents, none sharing a token.
    Raises UserError where no document is long enough."""
    size = prefix + continuation
    out: list[Passage] = []
    order = Permutation(len(texts), derive(seed, "passage documents"))[np.arange(len(texts))]
    share = -(-count // len(texts))  # of each document
    for document in order.tolist():
        if len(out) >= count:
            break
        ids = tokenizer.encode(texts[document])
        rows = len(ids) // size
        if not rows:
            continue
        places = Permutation(rows, derive(seed, "passage", document))[np.arange(min(rows, share, count - len(out)))]
        for start in (places * size).tolist():
            out.append(Passage(document, start, ids[start : start + prefix], ids[start + prefix : start + size]))
    if not out:
        raise UserError(f"no document has {size} tokens (--prefix {prefix} + --continuation {continuation})")
    return out


def recite(
    engine: Engine, passages: Sequence[Passage], advance: Callable[[float], None] = lambda _: None
) -> list[dict[str, Any]]:
    """An item for each passage: exact (0 or 1), and matched, the share of tokens before the first that differs."""
    written: list[list[int]] = [[] for _ in passages]
    params = SamplingParams(temperature=0.0, max_new_tokens=len(passages[0].rest))
    expected = sum(len(p.rest) for p in passages)
    for done, token in enumerate(engine.tokens([p.prefix for p in passages], params, logprobs=False), start=1):
        assert isinstance(token.key, int)
        written[token.key].append(token.id)
        advance(done / expected)
    return [_item(i, *pair) for i, pair in enumerate(zip(passages, written, strict=True))]


def _item(number: int, passage: Passage, written: list[int]) -> dict[str, Any]:
    same = _common(passage.rest, written) / len(passage.rest)
    return {
        "id": str(number), "document": passage.document, "start": passage.start, "exact": float(same == 1),
        "matched": same,
    }  # fmt: skip


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
