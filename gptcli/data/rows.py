"""The order in which rows of tokens are seen: a pure function of (seed, row number)."""

from __future__ import annotations

import numpy as np

from gptcli.errors import UserError
from gptcli.randomness import Permutation, derive


class RowOrder:
    """Row g (from 0, over the whole training) -> where it starts in the token stream.

    Each epoch cuts the stream into windows of `seq_len` that do not overlap, from an offset of its own, and
    visits every window once in an order of its own.
    """

    def __init__(self, n_tokens: int, seq_len: int, seed: int, *, stream: int = 0) -> None:
        if n_tokens < seq_len + 1:
            raise UserError(
                f"the corpus has {n_tokens} tokens, and one row needs {seq_len + 1} (train.seq_len {seq_len} + 1): "
                "use more text or a smaller train.seq_len"
            )
        self.seq_len, self._seed, self._stream = seq_len, seed, stream
        # One window less than fits leaves room for the offset, unless there is but one.
        self.windows = max(1, (n_tokens - seq_len) // seq_len)
        self._slack = min(seq_len - 1, n_tokens - 1 - self.windows * seq_len)
        self._epoch = -1

    def starts(self, rows: np.ndarray) -> np.ndarray:
        """Start offsets of the rows with these numbers."""
        rows = np.asarray(rows, np.int64)
        out = np.empty_like(rows)
        for epoch in np.unique(rows // self.windows):
            here = rows // self.windows == epoch
            permutation, offset = self._of_epoch(int(epoch))
            out[here] = permutation[rows[here] % self.windows] * self.seq_len + offset
        return out

    def _of_epoch(self, epoch: int) -> tuple[Permutation, int]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = Permutation(self.windows, derive(self._seed, "row order", self._stream, epoch))
            self._offset = derive(self._seed, "row offset", self._stream, epoch) % (self._slack + 1)
        return self._permutation, self._offset


class TokenRows:
    """Rows of one token file."""

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, *, stream: int = 0) -> None:
        self._tokens = tokens
        self._order = RowOrder(len(tokens), seq_len, seed, stream=stream)
        self.seq_len = seq_len

    def get(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), seq_len + 1) ids."""
        starts = self._order.starts(rows)
        out = np.empty((len(rows), self.seq_len + 1), np.int64)
        for i, start in enumerate(starts):
            out[i] = self._tokens[start : start + self.seq_len + 1]
        return out


class MixtureRows:
    """Rows of several token files in given proportions, still without any state.

    Rows come in blocks of PERIOD, each with the same share of every part (to one row), spread evenly.
    """

    PERIOD = 1024

    def __init__(self, parts: list[TokenRows], weights: list[float]) -> None:
        self._parts, self.seq_len = parts, parts[0].seq_len
        share = np.array(weights) / sum(weights) * self.PERIOD
        counts = np.floor(share).astype(int)
        for part in np.argsort(counts - share)[: self.PERIOD - counts.sum()]:
            counts[part] += 1
        if (counts == 0).any():
            raise UserError(f"data.mixture: a weight below 1/{self.PERIOD} of the sum would never be seen; raise it")
        self.counts = counts
        # Part p's k-th row sits at (k + 1/2) / count of the block.
        places = [((np.arange(c) + 0.5) / c, np.full(c, p), np.arange(c)) for p, c in enumerate(counts) if c]
        when, part, index = (np.concatenate(column) for column in zip(*places, strict=True))
        order = np.argsort(when, kind="stable")
        self._part, self._index = part[order], index[order]

    def get(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        block, place = rows // self.PERIOD, rows % self.PERIOD
        out = np.empty((len(rows), self.seq_len + 1), np.int64)
        for p, source in enumerate(self._parts):
            here = self._part[place] == p
            if here.any():
                out[here] = source.get(block[here] * self.counts[p] + self._index[place[here]])
        return out
