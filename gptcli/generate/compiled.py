"""The step that gives every row one token, made once and called many times: where the model is small or the device
fast, Python takes longer to say what to compute than the computing takes.

On a CPU torch.compile makes it one program. On a GPU it is a CUDA graph, which costs nothing to make and is the
default; compiled as well, it has fewer kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptcli.config.gpus import has_cpp_compiler
from gptcli.dist.runtime import autocast
from gptcli.errors import UserError
from gptcli.model import GPT, KVCache
from gptcli.model.kv_cache import FixedSlots

Step = Callable[[Tensor, Tensor, list[Tensor], list[Tensor]], Tensor]


class FixedDecode:
    """A forward of one token per row over a whole cache, whose shapes stay.

    Keys up to the cache's capacity are read, those that a row has not written masked. Each new size of the cache is
    made anew (compiled: seconds), which is why its sizes are powers of two.
    """

    def __init__(self, model: GPT, *, compiled: bool, dtype: torch.dtype = torch.float32) -> None:
        """Raises UserError where there is no compiler that `compiled` needs."""
        self._device, self._sizes = model.wte.weight.device, set[tuple[int, int]]()
        self._config, self._dtype, self._fewest = model.config, dtype, 16 if compiled else 2
        self._graph: _Graph | None = None
        self._spare: KVCache | None = None
        on_gpu = self._device.type == "cuda"
        if compiled and not on_gpu and not has_cpp_compiler():
            raise UserError("compile: this machine has no C++ compiler (g++ or clang++), which torch.compile needs")
        narrower = dtype if model.wte.weight.dtype != dtype else torch.float32  # a policy in training has fp32 weights

        def step(tokens: Tensor, slots: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
            with autocast(self._device, narrower, cache=False):
                logits = model(tokens, cache=FixedSlots(k, v, slots), last_only=True).logits
            assert logits is not None
            return logits[:, -1]

        options: dict[str, Any] | None = None if on_gpu else {"cpp_wrapper": True}
        self._step: Step = torch.compile(step, fullgraph=True, dynamic=False, options=options) if compiled else step

    def size(self, rows: int, room: int) -> tuple[int, int]:
        """Rows and capacity of the cache for so many rows and tokens in each."""
        return rounded(rows, self._fewest), min(self._config.context_length, rounded(room, 16))

    def take(self, batch: int, capacity: int) -> KVCache:
        """An empty cache, with the graph of the last one that was given back if it has that size."""
        spare, self._spare = self._spare, None
        if spare is not None and (spare.batch, spare.capacity) == (batch, capacity):
            return spare
        return KVCache(self._config, batch, capacity, device=self._device, dtype=self._dtype)

    def give_back(self, cache: KVCache) -> None:
        """No row is in it any more."""
        self._spare = cache

    def __call__(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        """(rows, V): what follows `tokens`, one for each of the cache's first rows; on a GPU until the next call."""
        idle = cache.batch - len(tokens)
        # what an idle row writes into its first slot, a prompt overwrites
        inputs = torch.tensor([[*tokens, *[0] * idle], [*cache.lengths[: len(tokens)], *[0] * idle]])[..., None]
        if self._device.type == "cuda":
            if self._graph is None or not self._graph.is_of(cache):
                self._graph = None  # its memory first
                self._graph = _Graph(self._step, cache)
            logits = self._graph(inputs)
        else:
            with torch.compiler.set_stance(skip_guard_eval_unsafe=self._seen(cache)):
                logits = self._step(inputs[0], inputs[1], cache.k, cache.v)
        for row in range(len(tokens)):
            cache.set_length(row, cache.length(row) + 1)
        return logits[: len(tokens)]

    def _seen(self, cache: KVCache) -> bool:
        """Whether a cache of this size was compiled before; then nothing that was checked can have changed."""
        size = (cache.batch, cache.capacity)
        before = size in self._sizes
        self._sizes.add(size)
        return before


class _Graph:
    """A step on one cache as a CUDA graph, which remembers the places of all that it reads and writes."""

    def __init__(self, step: Step, cache: KVCache) -> None:
        self._memory = [*cache.k, *cache.v]
        self._inputs = torch.zeros(2, cache.batch, 1, dtype=torch.long, device=cache.k[0].device)
        self._inputs[1] = cache.capacity - 1  # free in every row that is to be given a token
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles, tunes and lets libraries take their work space
                step(self._inputs[0], self._inputs[1], cache.k, cache.v)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = step(self._inputs[0], self._inputs[1], cache.k, cache.v)

    def is_of(self, cache: KVCache) -> bool:
        now = [*cache.k, *cache.v]
        return len(now) == len(self._memory) and all(a is b for a, b in zip(now, self._memory, strict=True))

    def __call__(self, inputs: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._logits


def rounded(size: int, least: int) -> int:
    """The next power of two, at least `least` but for a single one."""
    return 1 if size == 1 else max(least, 1 << (size - 1).bit_length())
