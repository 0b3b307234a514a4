"""Words as vectors: neighbours, sums like `king - man + woman`, directions."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.errors import UserError
from gptcli.generate.sampling import largest
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.texts import TokenTexts


def unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


def nearest_rows(table: Tensor, query: Tensor, *, top: int, exclude: Collection[int] = ()) -> list[tuple[int, float]]:
    """(row, cosine) of the rows of `table` (V, C), of unit length, that are closest to `query` (C,)."""
    cosines = table @ unit(query)
    cosines[list(exclude)] = -torch.inf
    return largest(cosines[None], min(top, len(table) - len(exclude)))[0]


def pca(points: Tensor) -> Tensor:
    """(N, 2): `points` (N, C) on the two directions in which they differ most."""
    centred = points - points.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    flat = u[:, :2] * s[:2]
    return F.pad(flat, (0, 2 - flat.shape[1]))


@dataclass(frozen=True)
class Term:
    sign: int
    word: str


def parse_sum(expression: str) -> list[Term]:
    """`king - man + woman`; a sign stands between spaces, so `well-known` is a word."""
    first, *rest = re.split(r"\s+([+-])(?:\s+|$)", expression)
    terms = [Term(1, first), *(Term(1 if s == "+" else -1, w) for s, w in zip(rest[::2], rest[1::2], strict=True))]
    if not all(term.word.strip() for term in terms):
        raise UserError(f"{expression!r}: not a word or a sum of words, as in 'king - man + woman'")
    return terms


class WordSpace:
    """A vocabulary's embeddings (V, C) as unit vectors, as word vectors are compared (Mikolov et al. 2013)."""

    def __init__(self, embedding: Tensor, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.table = unit(embedding[: tokenizer.vocab_size])

    def forms(self, word: str) -> list[int]:
        """The single tokens that are this word: after a space, which is how a text has it, then bare."""
        spellings = [word] if word.startswith(" ") else [f" {word}", word]
        return [id for spelling in spellings if (id := self.single_token(spelling)) is not None]

    def single_token(self, spelling: str) -> int | None:
        try:
            ids = self.tokenizer.encode(spelling)
        except UserError:  # a character that a char tokenizer does not have
            return None
        return ids[0] if len(ids) == 1 and ids[0] not in self.tokenizer.special_ids else None

    def ids(self, expression: str) -> list[tuple[int, int]]:
        """(sign, token) of each term. Raises UserError for a word of several tokens."""
        return [(term.sign, self._id(term.word)) for term in parse_sum(expression)]

    def vector(self, expression: str) -> Tensor:
        """(C,): the sum of the terms' unit vectors."""
        return torch.stack([sign * self.table[id] for sign, id in self.ids(expression)]).sum(0)

    def neighbours(self, expression: str, top: int) -> list[tuple[int, float]]:
        """(token, cosine), closest first; the expression's own words, in either form, are no answer."""
        own = {id for term in parse_sum(expression) for id in self.forms(term.word)}
        return nearest_rows(self.table, self.vector(expression), top=top, exclude=own)

    def projection(self, word: str, direction: str) -> float:
        """The word's unit vector on the unit direction (Bolukbasi et al. 2016): a cosine, -1 to 1."""
        return float(unit(self.vector(word)) @ unit(self.vector(direction)))

    def _id(self, word: str) -> int:
        if forms := self.forms(word):
            return forms[0]
        texts = TokenTexts(self.tokenizer)
        pieces = ", ".join(map(texts.shown, self.tokenizer.encode(word)))
        raise UserError(
            f"{word!r} is no single token of this model ({pieces}), so it has no embedding of its own; "
            'its hidden states: --in "a sentence with the word"'
        )
