"""On a GPU the step that gives every row one token is a CUDA graph: Python takes longer to say what to compute than the
computing takes. It costs nothing to make and is the default; compiled as well, it has fewer kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType

import torch
from torch import Tensor

from gptcli.dist.runtime import autocast
from gptcli.generate.decode import Decode
from gptcli.model import GPT, KVCache
from gptcli.model.kv_cache import SlotView

Step = Callable[[Tensor, Tensor, list[Tensor], list[Tensor]], Tensor]


class GraphDecode(Decode):
    """A graph over a whole cache, in which keys up to the capacity are read, those not written masked. Each new size of
    the cache is made anew (compiled: seconds), which is why its sizes are powers of two."""

    def __init__(self, model: GPT, dtype: torch.dtype = torch.float32, *, compiled: bool = False) -> None:
        super().__init__(model, dtype)
        self._fewest = 16 if compiled else 2
        self._graph: _Graph | None = None
        narrower = dtype if model.wte.weight.dtype != dtype else torch.float32  # a policy in training has fp32 weights

        def step(tokens: Tensor, slots: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
            with autocast(self._device, narrower, cache=False):
                logits = model(tokens, cache=SlotView(k, v, slots), last_only=True).logits
            assert logits is not None
            return logits[:, -1]

        # torch.compile counts its programs by code object, and gives up at the ninth: each model has one of its own
        own = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
        self._step: Step = torch.compile(own, fullgraph=True, dynamic=False) if compiled else own

    def size(self, rows: int, room: int) -> tuple[int, int]:
        return rounded(rows, self._fewest), min(self._config.context_length, rounded(room, 16))

    def _logits(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        idle = [0] * (cache.batch - len(tokens))
        # what an idle row writes into its first slot, a prompt overwrites
        inputs = torch.tensor([[*tokens, *idle], [*cache.lengths[: len(tokens)], *idle]])[..., None]
        if self._graph is None or not self._graph.is_of(cache):
            self._graph = None  # its memory first
            self._graph = _Graph(self._step, cache)
        return self._graph(inputs)[: len(tokens)]


class _Graph:
    """A step on one cache as a CUDA graph, which remembers the places of all that it reads and writes."""

    def __init__(self, step: Step, cache: KVCache) -> None:
        self._memory = cache.memory
        k, v = ([stored[:, :, : cache.capacity] for stored in kind] for kind in (cache.k, cache.v))
        self._inputs = torch.zeros(2, cache.batch, 1, dtype=torch.long, device=cache.k[0].device)
        self._inputs[1] = cache.capacity - 1  # free in every row that is to be given a token
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles, tunes and lets libraries take their work space
                step(self._inputs[0], self._inputs[1], k, v)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = step(self._inputs[0], self._inputs[1], k, v)

    def is_of(self, cache: KVCache) -> bool:
        return cache.is_in(self._memory)

    def __call__(self, inputs: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._logits


def rounded(size: int, least: int) -> int:
    """The next power of two, at least `least` but for a single one."""
    return 1 if size == 1 else max(least, 1 << (size - 1).bit_length())
