"""The step that gives every row one token, compiled: for models so small that Python takes longer than arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli.config.gpus import has_cpp_compiler
from gptcli.errors import UserError
from gptcli.model import GPT, KVCache
from gptcli.model.kv_cache import FixedSlots


class CompiledDecode:
    """A forward of one token per row over a whole cache, whose shapes stay, so that torch.compile sees one program.

    Keys up to the cache's capacity are read, those that a row has not written masked. Each new size of the cache is
    compiled anew (seconds), which is why `rounded` sizes are powers of two. On a CPU the program is called from C++;
    on a GPU it is a CUDA graph.
    """

    def __init__(self, model: GPT) -> None:
        self._device, self._sizes = model.wte.weight.device, set[tuple[int, int]]()
        if self._device.type == "cpu" and not has_cpp_compiler():
            raise UserError("compile: this machine has no C++ compiler (g++ or clang++), which torch.compile needs")

        def step(tokens: Tensor, slots: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
            logits = model(tokens, cache=FixedSlots(k, v, slots), last_only=True).logits
            assert logits is not None
            return logits[:, -1]

        if self._device.type == "cuda":
            self._step = torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")
        else:
            self._step = torch.compile(step, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})

    def __call__(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """(rows, V): what follows `tokens`, one for each of the cache's first rows."""
        idle = cache.batch - len(tokens)
        ids = torch.tensor([*tokens, *[0] * idle], device=self._device)[:, None]
        # what an idle row writes into its first slot, a prompt overwrites
        slots = torch.tensor([*cache.lengths[: len(tokens)], *[0] * idle], device=self._device)[:, None]
        with torch.compiler.set_stance(skip_guard_eval_unsafe=self._seen(cache)):
            logits = self._step(ids, slots, cache.k, cache.v)
        for row in range(len(tokens)):
            cache.set_length(row, cache.length(row) + 1)
        return logits[: len(tokens)]

    def _seen(self, cache: KVCache) -> bool:
        """Whether a cache of this size was compiled before; then nothing that was checked can have changed."""
        size = (cache.batch, cache.capacity)
        before = size in self._sizes
        self._sizes.add(size)
        return before


def rounded(size: int) -> int:
    """The next power of two, at least 16 but for a single row."""
    return 1 if size == 1 else max(16, 1 << (size - 1).bit_length())
