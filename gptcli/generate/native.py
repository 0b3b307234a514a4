"""Decoding by native.c, which is compiled, in a second, when it is first needed on a machine.

It takes the weights where they are, so it follows a policy that is being trained.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence
from ctypes import POINTER, c_double, c_long, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptcli.config.flops import params_by_part
from gptcli.config.gpus import cpu_features
from gptcli.config.schema import ModelConfig
from gptcli.data.cache import cache_dir
from gptcli.generate.decode import Decode
from gptcli.generate.pack import BlockedLinear, Int8Linear
from gptcli.model import GPT, KVCache
from gptcli.model.linear import Linear
from gptcli.model.positions import alibi_slopes, rotary_angles, sinusoids

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "native_math.h"))
COMPILERS = ("cc", "gcc", "clang")
# -fschedule-insns: gcc keeps a product's operands in registers, which makes it 1.5 times as fast
FLAGS = (
    *("-O3", "-march=native", "-fschedule-insns", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)
EACH_THREAD = 1 << 18  # multiplications of a step that are worth a thread more
TOGETHER = 0.01  # seconds of steps that are made in one call, where nothing has to be decided between them
MOST = 64  # steps in one call
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "relu2", "swiglu")  # their order in native.c


class _Matrix(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("weight", "bias", "scale", "sums"))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("ln_1", "ln_1_bias", "ln_2", "ln_2_bias")),
        *((name, _Matrix) for name in ("c_attn", "attn_proj", "c_fc", "mlp_proj")),
        ("k", c_void_p),
        ("v", c_void_p),
        ("band", c_long),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, c_long) for name in ("n_layer", "n_head", "kv_heads", "n_embd", "inner", "vocab_size", "slots")),
        *((name, c_long) for name in ("threads", "activation", "post_norm", "rmsnorm", "qk_norm")),
        *((name, c_double) for name in ("norm_eps", "attention_scale", "embedding_scale")),
        *((name, c_void_p) for name in ("wte", "positions", "rope_cos", "rope_sin", "alibi_slopes")),
        *((name, c_void_p) for name in ("ln_f", "ln_f_bias")),
        ("head", _Matrix),
        ("blocks", POINTER(_Block)),
    )


class _Draws(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("top_k", "temperature", "uniforms", "ends"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """native.c for this machine, out of the cache or compiled into it; None where that cannot be done."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), *COMPILERS)))), None)
    if compiler is None or platform.system() == "Windows":
        return None
    what = "\0".join([*(path.read_text() for path in SOURCES), compiler, *FLAGS, platform.machine(), cpu_features()])
    try:
        built = cache_dir() / "native" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
        if not built.exists():
            _build(compiler, built)
        loaded = ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        return None
    loaded.has_int8.restype = loaded.choose.restype = loaded.decode.restype = c_long
    loaded.choose.argtypes = [c_long, c_long, c_long, POINTER(_Draws), *[c_void_p] * 2]
    loaded.decode.argtypes = [POINTER(_Model), c_long, c_long, *[c_void_p] * 2, POINTER(_Draws), *[c_void_p] * 3]
    return loaded


def _build(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *FLAGS, str(SOURCES[0]), "-o", str(work), "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    os.replace(work, target)


def suits(model: GPT, dtype: torch.dtype) -> bool:
    """Whether native.c can decode with this model: fp32 on a CPU, its layers as they are in gptcli/model, or in int8
    where the CPU multiplies that (VNNI)."""
    if type(model) is not GPT or dtype != torch.float32 or (loaded := library()) is None:
        return False
    plain = (Linear, nn.LayerNorm, nn.RMSNorm, *((Int8Linear,) if loaded.has_int8() else ()))
    layers = [
        layer for layer in model.h.modules() if layer._parameters or isinstance(layer, (BlockedLinear, Int8Linear))
    ]
    weights = [p.data for p in model.parameters()]
    return (
        all(type(layer) in plain for layer in layers)
        and (model.packed_head is None or type(model.packed_head) in plain)
        and all(type(w) is Tensor and w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)
        and all(w.is_contiguous() for w in weights)
    )


class Drawing(NamedTuple):
    """How each row's tokens are drawn."""

    top_k: Tensor  # (rows) long, the vocabulary's size where all may be drawn
    temperature: Tensor  # (rows) fp32, 0: the likeliest token
    uniforms: Tensor  # (steps, rows) fp32

    def struct(self, ends: Tensor | None = None) -> _Draws:
        """These tensors' places. ends (V) uint8: 1 where no step follows."""
        return _Draws(*(None if t is None else t.data_ptr() for t in (*self, ends)))


class NativeDecode(Decode):
    """On a CPU. It draws as well, where only top-k and a temperature stand between logits and a draw, and so makes
    several steps in one call."""

    def __init__(self, model: GPT, dtype: torch.dtype = torch.float32) -> None:
        loaded = library()
        assert loaded is not None, "see `suits`"
        super().__init__(model, dtype)
        self._library, self._net = loaded, model
        self._weights = sum(params_by_part(model.config).values())
        self._model: tuple[_Model, list[Tensor]] | None = None  # with the cache's memory that it points to
        self._seconds = TOGETHER  # that a step took

    @functools.cached_property
    def _tables(self) -> dict[str, Tensor]:
        return _tables(self._net)

    def take(self, batch: int, capacity: int) -> KVCache:
        self._model = None  # whose weights may have moved
        return super().take(batch, capacity)

    def steps(self) -> int:
        """So many of them take TOGETHER seconds, as the last ones did."""
        return max(1, min(MOST, int(TOGETHER / self._seconds)))

    def write(
        self, tokens: Sequence[int], cache: KVCache, drawing: Drawing, ends: Collection[int], *, logprobs: bool = True
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Tokens and, if asked for, their log-probabilities, of each step and row, that follow `tokens`: as many steps
        as `drawing` has uniforms for, or up to the first token that is one of `ends`."""
        V, shape = self._net.vocab_size, drawing.uniforms.shape
        last = torch.zeros(V, dtype=torch.uint8)
        last[list(ends)] = 1
        ids, told = torch.empty(shape, dtype=torch.long), torch.empty(shape) if logprobs else None
        started = time.perf_counter()
        done = self._call(tokens, cache, len(ids), drawing.struct(last), ids, told, torch.empty(len(tokens), V))
        self._seconds = (time.perf_counter() - started) / done
        for row in range(len(tokens)):
            cache.set_length(row, cache.length(row) + done)
        return ids[:done].tolist(), None if told is None else told[:done].tolist()

    def choose(self, logits: Tensor, drawing: Drawing) -> list[int]:
        """A token for each row of logits (rows, V), as `write` draws it."""
        logits, (rows, V) = logits.contiguous(), logits.shape
        ids = torch.empty(rows, dtype=torch.long)
        places = (t.data_ptr() for t in (ids, logits))
        if self._library.choose(rows, V, min(rows, torch.get_num_threads()), drawing.struct(), *places) < 0:
            raise MemoryError(f"choosing for {rows} rows")
        return ids.tolist()

    def _logits(self, tokens: Sequence[int], cache: KVCache) -> Tensor:
        logits = torch.empty(len(tokens), self._net.vocab_size)
        self._call(tokens, cache, 1, None, None, None, logits)
        return logits

    def _call(
        self, tokens: Sequence[int], cache: KVCache, steps: int, draws: _Draws | None, *results: Tensor | None
    ) -> int:
        """`decode` of native.c; how many steps it made."""
        rows = len(tokens)
        if self._model is None or not cache.is_in(self._model[1]):
            self._model = _model(self._net, cache, self._tables), cache.memory
        model, state = self._model[0], torch.tensor([list(tokens), cache.lengths[:rows]])
        model.threads = max(1, min(torch.get_num_threads(), rows * self._weights // EACH_THREAD))
        places = [None if t is None else t.data_ptr() for t in results]
        done = self._library.decode(model, rows, steps, state[0].data_ptr(), state[1].data_ptr(), draws, *places)
        if done < 0:
            raise MemoryError(f"decoding {rows} rows")
        return int(done)


def _tables(model: GPT) -> dict[str, Tensor]:
    """What depends on a position or a head alone."""
    config, tables = model.config, dict[str, Tensor]()
    places = torch.arange(config.context_length)[None]
    with torch.no_grad():
        if config.position == "sinusoidal":
            tables["positions"] = sinusoids(config, places)
        elif config.position == "rope":
            tables["rope_cos"], tables["rope_sin"] = (t.contiguous() for t in rotary_angles(config, places))
        elif config.position == "alibi":
            tables["alibi_slopes"] = alibi_slopes(config.n_head)
    return tables


def _model(model: GPT, cache: KVCache, tables: dict[str, Tensor]) -> _Model:
    config = model.config
    places = {name: table.data_ptr() for name, table in tables.items()}
    if model.wpe is not None:
        places["positions"] = model.wpe.weight.data_ptr()
    if model.ln_f is not None:
        places |= _places("ln_f", model.ln_f)
    return _Model(
        n_layer=config.n_layer,
        n_head=config.n_head,
        kv_heads=config.kv_heads,
        n_embd=config.n_embd,
        inner=config.inner,
        vocab_size=model.vocab_size,
        slots=cache.k[0].shape[2],
        activation=ACTIVATIONS.index(config.activation),
        post_norm=config.norm_position == "post",
        rmsnorm=config.norm == "rmsnorm",
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        attention_scale=config.head_dim**-0.5 if config.scale_attention else 1.0,
        embedding_scale=config.n_embd**0.5 if config.position == "sinusoidal" else 1.0,
        wte=model.wte.weight.data_ptr(),
        head=_matrix(model.packed_head) if model.packed_head is not None else _Matrix(model.head_weight.data_ptr()),
        blocks=(_Block * config.n_layer)(*(_block(block, layer, config, cache) for layer, block in enumerate(model.h))),
        **places,
    )


def _block(block: nn.Module, layer: int, config: ModelConfig, cache: KVCache) -> _Block:
    names = {"c_attn": "attn.c_attn", "attn_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
    return _Block(
        k=cache.k[layer].data_ptr(),
        v=cache.v[layer].data_ptr(),
        band=config.band_width if config.is_banded(layer) else cache.capacity + 1,
        **_places("ln_1", block.get_submodule("ln_1")),
        **_places("ln_2", block.get_submodule("ln_2")),
        **{field: _matrix(block.get_submodule(name)) for field, name in names.items()},
    )


def _matrix(layer: nn.Module) -> _Matrix:
    if isinstance(layer, Int8Linear):
        bias = None if layer.bias is None else layer.bias.data_ptr()
        return _Matrix(layer.int8.data_ptr(), bias, layer.scale.data_ptr(), layer.sums.data_ptr())
    places = _places("weight", layer)
    return _Matrix(places["weight"], places.get("weight_bias"))


def _places(field: str, layer: nn.Module) -> dict[str, int]:
    """Where its weight and its bias lie."""
    found = {"": layer.get_parameter("weight"), "_bias": layer._parameters.get("bias")}
    return {field + part: tensor.data_ptr() for part, tensor in found.items() if tensor is not None}
