"""gpt plan"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.config.cluster import Fit
    from gptcli.config.schema import ModelConfig, ParallelSizes, Recipe

CheckpointShape = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-c", metavar="PATH", help="Take the shape from this checkpoint instead."),
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, metavar="N", help="Memory, days and cost on so many.")]
GpuName = Annotated[
    str, typer.Option("--gpu", metavar="NAME", help="h100, h200, a100, a100-40gb, l40s, rtx4090, ..., or cpu.")
]
Parallel = Annotated[
    str | None,
    typer.Option(metavar="LAYOUT", help="none, ddp, fsdp, tp or dp=2,fsdp=4,tp=2; left out: the recipe's."),
]
Mfu = Annotated[float, typer.Option("--mfu", min=0.01, max=1.0, help="Share of the GPU's bf16 peak that is reached.")]
Price = Annotated[float | None, typer.Option(min=0.0, metavar="DOLLARS", help="Of a GPU-hour; left out: a guess.")]


def plan(
    recipe: options.RecipeName = None,
    set_: options.Overrides = None,
    checkpoint: CheckpointShape = None,
    gpus: Gpus = None,
    gpu: GpuName = "h100",
    parallel: Parallel = None,
    mfu: Mfu = 0.4,
    price: Price = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Parameters, arithmetic, memory, days and cost, before anything is paid.

    gpt plan -r gpt3-175b.yaml --gpus 1024 --parallel fsdp
    """
    from gptcli.config.load import load_recipe

    if recipe is None and checkpoint is None:
        raise UserError("gpt plan: needs --recipe NAME|PATH (`gpt recipes` lists them) or --checkpoint PATH")
    loaded = load_recipe(recipe, set_ or []) if recipe is not None else None
    if loaded is None and (gpus is not None or set_):
        raise UserError("gpt plan: --gpus and --set need a --recipe, which says batch, length and optimizer")
    model = read_shape(loaded, checkpoint)
    row = {"recipe": loaded.run.name} if loaded else {"checkpoint": str(checkpoint)}
    row |= count_row(model, loaded)
    if loaded is not None and gpus is not None:
        row |= cluster_row(model, loaded, gpus, gpu, parallel, mfu, price)
    if json:
        print(jsonlib.dumps(row))
    else:
        print("\n".join(_count_table(row) + (_cluster_table(row) if "fits" in row else [])))


def read_shape(recipe: Recipe | None, checkpoint: str | Path | None) -> ModelConfig:
    """The checkpoint's shape, else that of the recipe's model or init_from. Raises UserError where it is left open."""
    import dataclasses

    source = checkpoint or (recipe.init_from if recipe is not None else None)
    if source is not None:
        from gptcli.modeldir import read_config
        from gptcli.train.checkpoint import find_checkpoint

        model = read_config(find_checkpoint(source))
        stretched = recipe.context_length if recipe is not None else None
        return dataclasses.replace(model, context_length=stretched or model.context_length)
    from gptcli.tokenizer.resolve import known_vocab_size

    assert recipe is not None
    assert recipe.model is not None
    if recipe.model.vocab_size is not None:
        return recipe.model
    size = known_vocab_size(recipe.tokenizer)
    if size is None:
        raise UserError(f"model.vocab_size: tokenizer {recipe.tokenizer} does not say it; -s model.vocab_size=N")
    return dataclasses.replace(recipe.model, vocab_size=size)


def count_row(model: ModelConfig, recipe: Recipe | None) -> dict[str, Any]:
    """Parameters and arithmetic, by formula; of the training too where a recipe says how long it is."""
    from gptcli.config import flops
    from gptcli.config.plan import training_tokens

    seq_len = (recipe.train.seq_len if recipe is not None else None) or model.context_length
    per_token = flops.flops_per_token(model)
    row = {
        "params": flops.count_params(model),
        "params_non_embedding": flops.count_non_embedding(model),
        "params_by_part": flops.params_by_part(model),
        "flops_per_token": per_token,
        "flops_per_token_with_attention": flops.flops_per_token_with_attention(model, seq_len),
    }
    if recipe is None:
        return row
    tokens = training_tokens(recipe, seq_len)
    return row | {
        "tokens": tokens,
        "train_flops": per_token * tokens,
        "pf_days": per_token * tokens / flops.PF_DAY,
    }


def cluster_row(
    model: ModelConfig, recipe: Recipe, gpus: int, gpu: str, parallel: str | None, mfu: float, price: float | None
) -> dict[str, Any]:
    """Memory of one GPU, time and cost on `gpus` of them, and the nearest layout that fits if this one does not."""
    from gptcli.config import cluster
    from gptcli.config.gpus import find_gpu

    job = cluster.Job(model, recipe, find_gpu(gpu))
    layout = cluster.parse_layout(parallel or cluster.as_text(recipe.parallel), gpus)
    this = cluster.fit(job, layout)
    days = job.days(gpus, mfu)
    gpu_days = None if days is None else days * gpus
    dollars = job.gpu.price if price is None else price
    near = None if this.fits else cluster.nearest_fit(job, layout)
    notes = cluster.objections(job, (near or this).layout)
    if not this.fits and near is None:
        notes.append("no layout holds one row: it takes a shorter train.seq_len or a GPU with more memory")
    if recipe.lora is not None:
        notes.append("all weights are taken as trained; with lora, gradients and optimizer state are far smaller")
    if recipe.stage.startswith("rlhf-"):
        notes.append("only the trained model is counted; frozen ones (reference, reward) and rollouts come on top")
    return {
        "gpus": gpus,
        "gpu": gpu,
        "parallel": _sizes(layout),
        "precision": "bf16" if job.half else "fp32",
        "seq_len": job.seq_len,
        "micro_batch_size": this.micro_batch_size,
        "grad_accum_steps": this.grad_accum_steps,
        "memory_per_gpu_bytes": this.memory,
        "memory_per_gpu_total_bytes": this.total,
        "memory_usable_bytes": this.room,
        "fits": this.fits,
        "nearest_layout": near and _near_row(near),
        "mfu": mfu,
        "days": days,
        "gpu_days": gpu_days,
        "price_per_gpu_hour": dollars,
        "price_is_assumed": price is None,
        "cost": None if gpu_days is None else gpu_days * 24 * dollars,
        "notes": notes,
    }


def _near_row(near: Fit) -> dict[str, Any]:
    sizes = _sizes(near.layout)
    return {
        "gpus": sizes["dp"] * sizes["fsdp"] * sizes["tp"],
        **sizes,
        "micro_batch_size": near.micro_batch_size,
        "memory_per_gpu_total_bytes": near.total,
    }


def _sizes(layout: ParallelSizes) -> dict[str, int]:
    return {"dp": layout.dp, "fsdp": layout.fsdp, "tp": layout.tp}


# ---- for people ------------------------------------------------------------------------------------------------


def _line(name: str, value: str, note: str = "") -> str:
    return f"  {name:<22}{value:>20}  {note}".rstrip()


def _count_table(row: dict[str, Any]) -> list[str]:
    lines = [f"{row.get('recipe') or row['checkpoint']}: {row['params']:,} parameters"]
    lines += [_line(name, f"{n:,}", f"{n / row['params']:6.1%}") for name, n in row["params_by_part"].items()]
    lines += [
        _line("not in embeddings", f"{row['params_non_embedding']:,}"),
        "arithmetic",
        _line("FLOPs per token", f"{row['flops_per_token']:,}", "6 N"),
        _line("with attention", f"{row['flops_per_token_with_attention']:,}"),
    ]
    if "tokens" in row:
        lines += [
            _line("training tokens", f"{row['tokens']:,}"),
            _line("training FLOPs", f"{row['train_flops']:.3e}"),
            _line("PF-days", _number(row["pf_days"])),
        ]
    return lines


def _cluster_table(row: dict[str, Any]) -> list[str]:
    total, usable = row["memory_per_gpu_total_bytes"], row["memory_usable_bytes"]
    verdict = "fits" if row["fits"] else "DOES NOT FIT"
    lines = [f"each of {row['gpus']:,} x {row['gpu']}, {_as_words(row['parallel'])}, {row['precision']}"]
    lines += [_line(name, _size(n), f"{n / total:6.1%}") for name, n in row["memory_per_gpu_bytes"].items() if n]
    lines += [
        _line("in all", _size(total), f"of {_size(usable)} usable: {verdict}"),
        _line("micro batch", f"{row['micro_batch_size']:,} x {row['seq_len']:,}", "rows x tokens"),
        _line("a step accumulates", f"{row['grad_accum_steps']:,}", "micro batches"),
    ]
    if near := row["nearest_layout"]:
        size = f"{_size(near['memory_per_gpu_total_bytes'])} each, micro batch {near['micro_batch_size']}"
        lines.append(f"  nearest that fits: {near['gpus']:,} x {row['gpu']}, {_as_words(near)} ({size})")
    if row["days"] is not None:
        whose = ", an assumption: --price says yours" if row["price_is_assumed"] else ""
        lines += [
            f"time and cost, if {row['mfu']:.0%} of the peak is reached (--mfu)",
            _line("days", _number(row["days"])),
            _line("GPU-days", _number(row["gpu_days"])),
            _line("cost", f"${row['cost']:,.0f}", f"${row['price_per_gpu_hour']:.2f} a GPU-hour{whose}"),
        ]
    return lines + [f"note: {note}" for note in row["notes"]]


def _size(n: int) -> str:
    return f"{n / 2**30:,.2f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def _number(x: float) -> str:
    """Four figures, or all before the point."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def _as_words(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}={sizes[name]}" for name in ("dp", "fsdp", "tp") if sizes[name] > 1) or "one process"
