"""The step that gives every row one token, made once and called many times: where the model is small or the device
fast, Python takes longer to say what to compute than the computing takes.

On a CPU torch.compile makes one program of it. On a GPU it is a CUDA graph, which costs nothing to make and is the
default; compiled as well, it has fewer kernels.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from types import FunctionType

import torch
from torch import Tensor

from gptcli.config.gpus import has_cpp_compiler
from gptcli.dist.runtime import autocast
from gptcli.errors import UserError
from gptcli.generate.decode import Decode
from gptcli.model import GPT, KVCache
from gptcli.model.kv_cache import SlotView

Step = Callable[[Tensor, Tensor, list[Tensor], list[Tensor]], Tensor]


class _Step(Decode, ABC):
    """A step of torch's operations."""

    def __init__(self, model: GPT, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model, dtype)
        narrower = dtype if model.wte.weight.dtype != dtype else torch.float32  # a policy in training has fp32 weights

        def step(tokens: Tensor, slots: Tensor, k: list[Tensor], v: list[Tensor]) -> Tensor:
            with autocast(self._device, narrower, cache=False):
                logits = model(tokens, cache=SlotView(k, v, slots), last_only=True).logits
            assert logits is not None
            return logits[:, -1]

        # torch.compile counts its programs by code object, and gives up at the ninth: each model has one of its own
        self._step: Step = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)


class CompiledDecode(_Step):
    """On a CPU: a program of loops for any number of rows, which reads as far as the longest is written, and one for a
    single row. Each is compiled, for seconds, when it is first needed."""

    def __init__(self, model: GPT, dtype: torch.dtype = torch.float32) -> None:
        """Raises UserError where there is no compiler."""
        super().__init__(model, dtype)
        if not has_cpp_compiler():
            raise UserError("compile: this machine has no C++ compiler (g++ or clang++), which torch.compile needs")
        # without size_asserts: at each call they look at every weight again, a tenth of a small model's time
        self._step = torch.compile(self._step, fullgraph=True, options={"cpp_wrapper": True, "size_asserts": False})
        self._compiled = set[bool]()  # for a single row, for several

    def _logits(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        rows, lengths = len(tokens), cache.lengths[: len(tokens)]
        end, alone = max(1, *lengths) + 1, rows == 1  # a size of 1 would be a constant
        inputs, slots = torch.tensor([tokens, lengths])[..., None]
        k, v = ([stored[:rows, :, :end] for stored in kind] for kind in (cache.k, cache.v))
        compiled = alone in self._compiled
        if not compiled:
            _sizes_vary([inputs, slots, *k, *v] if not alone else [], dim=0)
            _sizes_vary([*k, *v], dim=2)
        # Once compiled, nothing that its guards would check can have changed: looking at them takes 0.1 ms.
        with torch.compiler.set_stance(skip_guard_eval_unsafe=compiled):
            logits = self._step(inputs, slots, k, v)
        self._compiled.add(alone)  # now: compiling may be stopped, and then is to be done again
        return logits


def _sizes_vary(tensors: Sequence[Tensor], dim: int) -> None:
    """Compiling raises an error rather than take such a size for a constant."""
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, dim)


class GraphDecode(_Step):
    """On a GPU: a graph over a whole cache, in which keys up to the capacity are read, those not written masked. Each
    new size of the cache is made anew (compiled: seconds), which is why its sizes are powers of two."""

    def __init__(self, model: GPT, dtype: torch.dtype = torch.float32, *, compiled: bool = False) -> None:
        super().__init__(model, dtype)
        self._fewest = 16 if compiled else 2
        self._graph: _Graph | None = None
        if compiled:
            self._step = torch.compile(self._step, fullgraph=True, dynamic=False)

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
        self._memory = [*cache.k, *cache.v]
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
        now = [*cache.k, *cache.v]
        return len(now) == len(self._memory) and all(a is b for a, b in zip(now, self._memory, strict=True))

    def __call__(self, inputs: Tensor) -> Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._logits


def rounded(size: int, least: int) -> int:
    """The next power of two, at least `least` but for a single one."""
    return 1 if size == 1 else max(least, 1 << (size - 1).bit_length())
