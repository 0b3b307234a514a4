"""Bytes that one process needs for a training step, by formula. `gpt plan`, micro_batch_size: auto and the refusal
of what cannot fit all ask here.

Counted is what the tensors of a step hold at its fullest moment, as torch's allocator sees it: not the interpreter,
the CUDA context or what an allocator holds back between tensors, for which USABLE leaves room (glibc's resident size
is a tenth or two larger, and the same once MALLOC_MMAP_THRESHOLD_=131072 makes it give freed tensors back at once).
tests/config/test_memory.py holds the formulas against the allocator's own record of real steps.

The fullest moment is one of three. `backward`: every activation is still there, the head's gradient is being made.
`embedding`: the activations are gone, the gradients complete, the token embedding's comes last. `update`: the
optimizer works. All shrink and grow linearly over the layers, so nothing between them is fuller.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

from gptcli.config.flops import hidden_matrices, params_by_part
from gptcli.config.schema import ModelConfig, ParallelSizes

MUON_BATCH_ELEMENTS = 1 << 24  # of the matrices that Muon orthogonalises at once: 64 MiB and a few copies

CPU_MICRO_TOKENS = 8192  # larger micro-batches are no faster on a CPU
USABLE = 0.85  # share of a device's memory that a step may fill by formula

# MLP-wide tensors that are kept (what the activation's derivative reads, what c_proj's does), and how many more the
# backward pass has at once. ReLU's derivative reads its result; swiglu keeps gate and up, silu(gate), the product.
_MLP_KEPT = {"gelu_tanh": 2, "gelu": 2, "relu": 1, "relu2": 2, "swiglu": 4}
_MLP_WORKING = {"gelu_tanh": 1, "gelu": 1, "relu": 2, "relu2": 3, "swiglu": 2}
_SPLIT_BY_TP = ("token_embedding", "attention", "mlp", "lm_head")
FP32 = 4


class LogitsRoom(NamedTuple):
    """Of chunked log-probabilities (model/logprobs.py): bytes of one chunk in fp32, and up to which all are kept."""

    chunk: int
    keep: int


# glibc takes what is larger than 32 MiB from the kernel each time anew, page by page: 1.6 times the time of the head.
LOGITS_FP32 = LogitsRoom(24 << 20, 256 << 20)
# A GPU's: larger micro-batches, for which the room would be, gain less than the second product costs.
LOGITS_HALF = LogitsRoom(2 << 30, sys.maxsize)


def logits_room(*, half: bool) -> LogitsRoom:
    return LOGITS_HALF if half else LOGITS_FP32


def logits_rows(tokens: int, vocab: int, n_embd: int, room: LogitsRoom) -> int:
    """Tokens of a chunk. Each chunk adds to the gradient of the whole head, so it is no smaller than half of that."""
    return max(1, min(tokens, max(room.chunk // (FP32 * vocab), n_embd // 2)))


@dataclass(frozen=True)
class StepShape:
    """What decides a process's memory beside the model. `half`: bf16 arithmetic on fp32 weights (autocast)."""

    rows: int  # of a micro-batch
    seq_len: int
    half: bool = False
    on_cpu: bool = False
    accumulates: bool = False  # several micro-batches a step, so gradients are there while activations are
    optimizer: str = "adamw"
    layout: ParallelSizes = ParallelSizes()

    @property
    def width(self) -> int:
        """Bytes of a number that matrices multiply."""
        return 2 if self.half else FP32

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


def step_memory(model: ModelConfig, step: StepShape) -> dict[str, int]:
    """Bytes by part at the step's fullest moment; their sum is the peak.

    temporaries: bf16 copies of weights, gathered blocks (fsdp), gradients on their way, the optimizer's work space.
    One process that does not accumulate gets its gradients as activations go: there activations (then logits) count
    only as far as they need more room than the gradients will take.
    """
    weights, optimizer = weight_bytes(model, step.layout), optimizer_bytes(model, step.layout, step.optimizer)
    gradients = weights
    head = FP32 * model.padded_vocab * model.n_embd // step.layout.tp
    logits = logits_bytes(model, step)
    kept = activation_bytes(model, step)
    working = max(0, _block_backward_bytes(model, step) - logits)
    backward = {"activations": kept, "logits": logits, "temporaries": head + weight_copies(model, step) + working}
    if not step.accumulates and step.layout == ParallelSizes():
        room = gradients
        for part in backward:
            taken = min(room, backward[part])
            backward[part] -= taken
            room -= taken
    # A tied embedding's gradient as head waits for its gradient as embedding, and both for the sum over micro-batches.
    waiting = int(model.tie_embeddings) + int(step.accumulates)
    embedding = {"activations": 0, "logits": 0, "temporaries": waiting * head}
    update = {"activations": 0, "logits": 0, "temporaries": _update_bytes(model, step)}
    fullest = max(backward, embedding, update, key=lambda moment: sum(moment.values()))
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, **fullest}


def state_bytes(model: ModelConfig, optimizer: str, layout: ParallelSizes = ParallelSizes()) -> int:
    """Weights, gradients and optimizer state: what no smaller batch makes smaller."""
    return 2 * weight_bytes(model, layout) + optimizer_bytes(model, layout, optimizer)


def weight_bytes(model: ModelConfig, layout: ParallelSizes) -> int:
    """fp32 weights, vocabulary padding included. tp splits matrices and vocabulary (Shoeybi et al. 2019, section 3),
    fsdp splits everything (Rajbhandari et al. 2020, ZeRO's third stage), dp nothing."""
    parts = params_by_part(dataclasses.replace(model, vocab_size=model.padded_vocab))
    mine = sum(n // layout.tp if name in _SPLIT_BY_TP else n for name, n in parts.items())
    return FP32 * -(-mine // layout.fsdp)


def optimizer_bytes(model: ModelConfig, layout: ParallelSizes, optimizer: str) -> int:
    """AdamW: two fp32 moments for each weight. Muon: one for each hidden matrix's, AdamW's two for all others."""
    adamw = 2 * weight_bytes(model, layout)
    if optimizer != "muon":
        return adamw
    return adamw - FP32 * sum(hidden_matrices(model)) // (layout.tp * layout.fsdp)


def weight_copies(model: ModelConfig, step: StepShape) -> int:
    """Copies that matrices are multiplied from: in bf16 of every matrix, which autocast keeps for the backward pass.

    Under fsdp instead, of the parts that are gathered: embeddings and head all the while, a block in use, the
    next on its way and the gradient of the last (PyTorch FSDP, Zhao et al. 2023, section 3).
    """
    tp = step.layout.tp
    embedding = model.padded_vocab * model.n_embd // tp
    if step.layout.fsdp == 1:
        return (sum(hidden_matrices(model)) // tp + embedding) * 2 if step.half else 0
    block = sum(hidden_matrices(model)) // model.n_layer // tp
    heads = 1 if model.tie_embeddings else 2
    return step.width * (heads * embedding + 3 * block)


def activation_bytes(model: ModelConfig, step: StepShape) -> int:
    """What the forward pass keeps for the backward: each tensor that some operation's derivative reads.

    The residual stream and what norms read stays fp32 under autocast. tp splits what lies between a block's matrices
    and leaves the residual stream whole (Korthikanti et al. 2022, section 4.1).
    """
    C, per_layer = model.n_embd, _attention_bytes_per_token(model, step) + _mlp_bytes_per_token(model, step)
    around = C * FP32 + (C * step.width if model.norm_position == "pre" else 0)  # embedded tokens; final norm
    around += _rms_bytes(model, step) if model.norm_position == "pre" else 0
    around += _dropout_bytes(model, step)
    return step.tokens * (model.n_layer * per_layer + around) + _mask_bytes(model, step)


def _attention_bytes_per_token(m: ModelConfig, step: StepShape) -> int:
    """Norm, queries, keys, values, attention and the residual sum; the T x T matrix only where no kernel avoids it."""
    C, kv, w = m.n_embd, m.kv_heads * m.head_dim, step.width
    if m.dropout and step.on_cpu:
        # No fused kernel with dropout there: scaled and expanded queries, keys, values, and in fp32 the softmax,
        # the dropout's mask and their product.
        inside = 3 * C * FP32 + C * w + 3 * m.n_head * step.seq_len * FP32
        inside += (C + kv) * FP32 if m.qk_norm else 0
    else:
        inside = (2 * C + 2 * kv) * w + m.n_head * FP32  # c_attn's output, attention's output, its log-sum-exp
        if m.qk_norm or m.position == "rope":
            inside += (C + kv) * w + C * w  # new queries and keys, whose layout costs a copy of the output
        if m.qk_norm and step.half:
            inside += (C + kv) * FP32
    whole = C * FP32 + C * w + _rms_bytes(m, step) + _dropout_bytes(m, step)
    return whole + inside // step.layout.tp


def _mlp_bytes_per_token(m: ModelConfig, step: StepShape) -> int:
    C, w = m.n_embd, step.width
    whole = C * FP32 + C * w + _rms_bytes(m, step) + _dropout_bytes(m, step)
    return whole + _MLP_KEPT[m.activation] * m.inner * w // step.layout.tp


def _rms_bytes(m: ModelConfig, step: StepShape) -> int:
    """RMS norm is one kernel on a GPU; on a CPU it keeps what it normalised, before the gain."""
    return m.n_embd * FP32 if m.norm == "rmsnorm" and step.on_cpu else 0


def _dropout_bytes(m: ModelConfig, step: StepShape) -> int:
    """A mask: a byte a number on a GPU, a number on a CPU."""
    return m.n_embd * (step.width if step.on_cpu else 1) if m.dropout else 0


def _mask_bytes(m: ModelConfig, step: StepShape) -> int:
    """Attention masks as numbers, for all rows: of each banded layer its own, of ALiBi one a head."""
    square = step.seq_len**2
    banded = sum(m.is_banded(layer) for layer in range(m.n_layer))
    fused = not (m.dropout and step.on_cpu)
    if m.position != "alibi":
        return banded * square * step.width if fused else 0
    shared = (2 if banded else 1) * square * m.n_head * FP32
    cast = m.n_layer * square * m.n_head * step.width if step.half and fused else 0
    return (shared + cast) // step.layout.tp


def logits_bytes(model: ModelConfig, step: StepShape) -> int:
    """Log-probabilities and their gradient, a chunk at a time (model/logprobs.py): small ones are all kept, large
    ones made again chunk by chunk; and the product that each chunk adds to the head's gradient."""
    padded, room = model.padded_vocab // step.layout.tp, logits_room(half=step.half)
    rows = logits_rows(step.tokens, padded, model.n_embd, room)
    chunk, logits = FP32 * rows * padded, step.width * rows * padded  # a softmax; what it is made of, and a gradient
    everything = step.width * step.tokens * padded
    before = min(logits, everything - logits)  # the gradient of the chunk before, where there is one
    product = step.width * padded * model.n_embd
    hidden = step.width * step.tokens * model.n_embd  # gradient of the final hidden state
    if step.half:
        forward = everything + 2 * chunk + (chunk if before else 0)  # in fp32: a copy, its softmax, the softmax before
        backward = everything + logits + chunk + max(chunk, product) + hidden
    elif everything > room.keep:
        forward = 3 * chunk
        backward = 2 * chunk + max(before, product) + hidden
    else:
        forward = everything + chunk
        backward = everything + chunk + max(before, product) + hidden
    return max(forward - FP32 * padded * model.n_embd, backward)  # the head's gradient comes with the backward pass


def _block_backward_bytes(m: ModelConfig, step: StepShape) -> int:
    """Gradients inside the last block, while almost everything is still kept: in its MLP, or, where the T x T matrix
    exists, in its attention, when the MLP's tensors are gone."""
    mlp = _MLP_WORKING[m.activation] * m.inner * step.width // step.layout.tp
    scores = m.n_head * step.seq_len * FP32 if m.dropout and step.on_cpu else 0
    return step.tokens * max(mlp, scores - _mlp_bytes_per_token(m, step))


def _update_bytes(m: ModelConfig, step: StepShape) -> int:
    """AdamW is fused. Muon holds every matrix's update, and seven copies of the batch that it orthogonalises, which
    on a GPU are bf16."""
    if step.optimizer != "muon":
        return 0
    attention, mlp = hidden_matrices(m)
    batch = min(max(attention, mlp // 2), max(MUON_BATCH_ELEMENTS, m.n_embd * m.inner))
    return FP32 * (attention + mlp) // (step.layout.tp * step.layout.fsdp) + 7 * (FP32 if step.on_cpu else 2) * batch


def largest_micro_batch(
    model: ModelConfig, step: StepShape, *, per_process: int, smallest: int, room: float
) -> int | None:
    """The most rows that fit `room` bytes and divide a process's rows, both of a step and of the `smallest` step that
    the batch's ramp begins with. None: not even one row fits."""
    common = math.gcd(per_process, smallest)
    for rows in range(common, 0, -1):
        slow = step.on_cpu and rows > 1 and rows * step.seq_len > CPU_MICRO_TOKENS
        if common % rows or slow:
            continue
        shape = dataclasses.replace(step, rows=rows, accumulates=rows < per_process)
        if sum(step_memory(model, shape).values()) <= room:
            return rows
    return None
