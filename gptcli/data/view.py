"""What the training sees, for people: rows as text, with what is to be learned told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gptcli.contracts import IGNORE_INDEX, Batch
from gptcli.tokenizer import Tokenizer

LEARNED = ("\x1b[32m", "\x1b[0m")  # green on a terminal
MARKED = ("⟦", "⟧")  # elsewhere


@dataclass(frozen=True)
class View:
    """A document of a row: its text in pieces that are learned or not."""

    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    trained_tokens: int

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "text": "".join(text for text, _ in self.pieces),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "pieces": [{"text": text, "trained": trained} for text, trained in self.pieces],
        }

    def text(self, *, mask: bool, colour: bool) -> str:
        begin, end = LEARNED if colour else MARKED
        return "".join(f"{begin}{text}{end}" if mask and trained else text for text, trained in self.pieces)


def view_of(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer) -> View:
    """Special tokens are shown."""
    runs = groupby(zip(ids, trained, strict=True), key=lambda pair: bool(pair[1]))
    pieces = tuple((tokenizer.decode([int(i) for i, _ in run]), learned) for learned, run in runs)
    return View(pieces, len(ids), sum(map(bool, trained)))


def views_of(batch: Batch, tokenizer: Tokenizer) -> Iterator[list[View]]:
    """Each row of a batch, document by document, put together again from its tokens and targets."""
    tokens, targets = batch["tokens"], batch["targets"]
    documents = batch.tensors.get("document_ids")
    for r in range(len(tokens)):
        row = []
        labels = tokens[r] * 0 if documents is None else documents[r]
        for document in dict.fromkeys(labels.tolist()):
            places = (labels == document).nonzero()[:, 0]
            learned = targets[r, places] != IGNORE_INDEX
            if document >= 0 and learned.any():
                last = int(learned.nonzero()[-1, 0]) + 1
                ids = [*tokens[r, places].tolist()[:last], int(targets[r, places[last - 1]])]
                row.append(view_of(ids, [False, *learned.tolist()[:last]], tokenizer))
        yield row
