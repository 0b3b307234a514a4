"""A training job on N GPUs: what each must hold, how long it takes, what it costs, and the layout nearest to the one
asked for that fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from gptcli.config.flops import flops_per_token_with_attention
from gptcli.config.gpus import Gpu
from gptcli.config.memory import USABLE, StepShape, step_memory
from gptcli.config.plan import global_batch_size, pick_micro_batch, replica_rows, texts_per_row, training_tokens
from gptcli.config.schema import BatchRamp, ModelConfig, ParallelSizes, Recipe
from gptcli.errors import UserError

NODE = 8  # GPUs with fast links between them, which tensor parallelism needs
MOST_GPUS = 1 << 17  # where the search for a cluster that is large enough ends


@dataclass(frozen=True)
class Job:
    """What is trained, and on which kind of GPU."""

    model: ModelConfig
    recipe: Recipe
    gpu: Gpu

    @property
    def on_cpu(self) -> bool:
        return self.gpu.flops is None

    @property
    def half(self) -> bool:
        """auto is bf16 on every GPU in the table, fp32 on a CPU."""
        return self.recipe.train.precision == "bf16" or (self.recipe.train.precision == "auto" and not self.on_cpu)

    @property
    def seq_len(self) -> int:
        return self.recipe.train.seq_len or self.model.context_length

    @property
    def rows(self) -> int:
        """Of an optimizer step."""
        return global_batch_size(self.recipe, on_cpu=self.on_cpu)

    @property
    def ramp(self) -> BatchRamp | None:
        train = self.recipe.train
        return train.batch_ramp if self.rows == train.global_batch_size else None

    def days(self, gpus: int, mfu: float) -> float | None:
        """Attention's arithmetic included, as in MFU; unknown for a CPU."""
        if self.gpu.flops is None:
            return None
        flops = flops_per_token_with_attention(self.model, self.seq_len)
        flops *= training_tokens(self.recipe, self.seq_len)
        return flops / (gpus * self.gpu.flops * mfu) / 86400


@dataclass(frozen=True)
class Fit:
    """A job in a layout. `memory` is one GPU's, by part, at `micro_batch_size` rows."""

    layout: ParallelSizes
    micro_batch_size: int
    grad_accum_steps: int
    memory: dict[str, int]
    room: int

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.room


def parse_layout(text: str, gpus: int) -> ParallelSizes:
    """none | ddp | fsdp | tp | dp=2,fsdp=4,tp=2, over `gpus`. Raises UserError for sizes that do not make so many."""
    names: dict[str, dict[str, int]] = {"none": {}, "ddp": {"dp": gpus}, "fsdp": {"fsdp": gpus}, "tp": {"tp": gpus}}
    try:
        layout = ParallelSizes(**(names[text] if text in names else _sizes(text)))
    except (ValueError, TypeError):
        raise UserError(f"--parallel {text}: expected none, ddp, fsdp, tp, or sizes as in dp=2,fsdp=4,tp=2") from None
    if world_size(layout) != gpus:
        raise UserError(f"--parallel {text}: its sizes multiply to {world_size(layout)}, not to --gpus {gpus}")
    return layout


def _sizes(text: str) -> dict[str, int]:
    pairs = (part.partition("=") for part in text.split(","))
    sizes = {name.strip(): int(size) for name, _, size in pairs}
    if min(sizes.values()) < 1:
        raise ValueError(text)
    return sizes


def world_size(layout: ParallelSizes) -> int:
    return layout.dp * layout.fsdp * layout.tp


def replicas(layout: ParallelSizes) -> int:
    """Processes with rows of their own: shards see different data, tensor-parallel ranks the same."""
    return layout.dp * layout.fsdp


def fit(job: Job, layout: ParallelSizes) -> Fit:
    """The recipe's micro batch, or the largest that fits (one row where none does)."""
    if any(size % layout.tp for size in (job.model.n_head, job.model.kv_heads, job.model.inner)):
        raise UserError(f"tp={layout.tp}: does not divide {job.model.n_head} heads ({job.model.kv_heads} of keys)")
    per_replica, _ = replica_rows(job.recipe, replicas=replicas(layout), on_cpu=job.on_cpu)
    # processes on a CPU share the machine
    room = int(USABLE * job.gpu.memory) // (world_size(layout) if job.on_cpu else 1)
    step = StepShape(
        rows=1,
        seq_len=texts_per_row(job.recipe) * job.seq_len,
        half=job.half,
        on_cpu=job.on_cpu,
        optimizer=job.recipe.optim.name,
        layout=layout,
    )
    rows = pick_micro_batch(job.recipe, job.model, step, replicas=replicas(layout), room=room)
    step = dataclasses.replace(step, rows=rows, accumulates=rows < per_replica)
    return Fit(layout, rows, -(-per_replica // rows), step_memory(job.model, step), room)


def nearest_fit(job: Job, asked: ParallelSizes) -> Fit | None:
    """Of as many GPUs the layout nearest to `asked` that fits, one that can share the batch first; else the fewest
    GPUs that hold the job. None: one row alone is too much, however it is laid out."""
    gpus = world_size(asked)
    found = [f for f in (fit(job, layout) for layout in layouts(job.model, gpus)) if f.fits]
    if found:
        return min(found, key=lambda f: (not shares_batch(job, f.layout), _distance(f.layout, asked), f.layout.tp))
    return smallest_cluster(job, more_than=gpus)


def layouts(model: ModelConfig, gpus: int) -> Iterator[ParallelSizes]:
    """Every dp x fsdp x tp = gpus with tp inside a node and dividing the heads."""
    for tp in _tp_sizes(model):
        if gpus % tp:
            continue
        for fsdp in range(1, gpus // tp + 1):
            if (gpus // tp) % fsdp == 0:
                yield ParallelSizes(dp=gpus // tp // fsdp, fsdp=fsdp, tp=tp)


def smallest_cluster(job: Job, *, more_than: int) -> Fit | None:
    """The fewest GPUs, whole nodes where one is not enough, and a few more where those can share the batch.
    More shards never need more memory, so their number is bisected."""
    found = []
    for tp in (size for size in _tp_sizes(job.model) if NODE % size == 0):
        low, high = more_than // tp + 1, MOST_GPUS // tp
        if not _sharded(job, high, tp).fits:
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if _sharded(job, middle, tp).fits else (middle + 1, high)
        node = NODE // tp  # shards
        first = low if low <= node else -(-low // node) * node
        larger = (_sharded(job, fsdp, tp) for fsdp in range(first, 2 * first, max(1, min(node, first))))
        found.append(next((f for f in larger if shares_batch(job, f.layout)), _sharded(job, first, tp)))
    return min(found, key=lambda f: world_size(f.layout), default=None)


def _sharded(job: Job, fsdp: int, tp: int) -> Fit:
    return fit(job, ParallelSizes(fsdp=fsdp, tp=tp))


def _tp_sizes(model: ModelConfig) -> list[int]:
    common = math.gcd(model.n_head, model.kv_heads, model.inner)
    return [tp for tp in range(1, NODE + 1) if common % tp == 0]


def shares_batch(job: Job, layout: ParallelSizes) -> bool:
    return job.rows % replicas(layout) == 0


def _distance(a: ParallelSizes, b: ParallelSizes) -> float:
    """How often sizes must double or halve to make one layout the other."""
    pairs = ((a.dp, b.dp), (a.fsdp, b.fsdp), (a.tp, b.tp))
    return sum(abs(math.log2(x / y)) for x, y in pairs)


def objections(job: Job, layout: ParallelSizes) -> list[str]:
    """What `gpt pretrain` would refuse in this layout, each with the key that helps."""
    n, found = replicas(layout), []
    shared = {"global_batch_size": job.rows} | ({"batch_ramp.start": job.ramp.start} if job.ramp else {})
    for key, rows in shared.items():
        if rows % n:
            more = -(-rows // n) * n
            found.append(f"{as_text(layout)}: {n} replicas cannot share {rows} rows; -s train.{key}={more}")
    return found


def as_text(layout: str | ParallelSizes) -> str:
    """As `--parallel` takes it."""
    return layout if isinstance(layout, str) else f"dp={layout.dp},fsdp={layout.fsdp},tp={layout.tp}"
