"""The verbs that train: pretrain, and one per further stage."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.launch import end_with_parent, is_worker, launch, processes
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.config.schema import DataBlock, Recipe

FIXED = ("init_from", "model", "tokenizer", "lora", "optim.name", "run.seed")  # of a run that is resumed

Resume = Annotated[
    Path | None,
    typer.Option("--resume", metavar="RUN", help="Go on with this run, exactly where its latest checkpoint stands."),
]
Nproc = Annotated[int, typer.Option("--nproc", min=1, metavar="N", help="Processes on this machine.")]
Precision = Annotated[
    str | None,
    typer.Option("--precision", metavar="auto|fp32|bf16", help="Arithmetic; left out: the recipe's."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check recipe, data and memory, run one step, write nothing.")]


def training_verb(stage: str, help: str) -> Callable[..., None]:
    """The command of a stage: every one takes the same options."""

    def verb(
        recipe: options.RecipeName = None,
        set_: options.Overrides = None,
        resume: Resume = None,
        nproc: Nproc = 1,
        dry_run: DryRun = False,
        json: options.Json = False,
        quiet: options.Quiet = False,
        seed: options.Seed = None,
        device: options.Device = "auto",
        precision: Precision = None,
    ) -> None:
        overrides = list(set_ or [])
        overrides += [f"run.seed={seed}"] if seed is not None else []
        overrides += [f"train.precision={precision}"] if precision is not None else []
        if dry_run:
            overrides += ["train.max_steps=1", "train.max_tokens=null", "train.epochs=null"]
            overrides += ["run.name=dry-run"] if resume is None else []
        loaded = load_stage_recipe(stage, recipe, overrides, resume)
        if processes(nproc) > 1 and reads_stdin(loaded.data):
            raise UserError("data: - (stdin) goes to one process alone; write it to a file for several")
        if nproc > 1 and not is_worker():
            raise typer.Exit(launch(nproc))
        end_with_parent()

        from gptcli.dist.runtime import runtime
        from gptcli.stages.console import RunConsole
        from gptcli.stages.job import run_stage

        with runtime(device) as here:
            console = RunConsole(quiet=quiet, is_main=here.is_main)
            try:
                summary = run_stage(loaded, here, console, resume=resume, dry_run=dry_run)
            except UserError as error:
                if resume is None or ": no such " not in str(error):
                    raise
                raise UserError(f"{error} ({resume}/recipe.yaml names it as seen from where the run began)") from error
            if dry_run:
                summary = {k: v for k, v in summary.items() if k not in ("run_dir", "checkpoint")}
            if here.is_main:
                report(summary, as_json=json, say=console.say)

    verb.__doc__ = help
    return verb


def reads_stdin(data: DataBlock) -> bool:
    parts = [spec for part in data.mixture for spec in part.source]
    return "-" in [*data.source, *data.train, *data.val, *parts]


def load_stage_recipe(stage: str, recipe: str | None, overrides: list[str], resume: Path | None) -> Recipe:
    """The recipe by name or path, or the one that the resumed run keeps."""
    from gptcli.config.load import load_recipe

    if resume is None and recipe is None:
        raise UserError(f"gpt {stage}: needs --recipe NAME|PATH (`gpt recipes` lists them) or --resume RUN")
    if resume is None:
        return load_recipe(str(recipe), overrides, stage=stage)
    run_dir = run_dir_of(resume)
    if moved := next((o for o in overrides if o.startswith(("run.dir=", "run.name="))), None):
        raise UserError(f"--resume {resume}: keeps the run's name and place; leave out -s {moved}")
    place = [f"run.dir={run_dir.parent}", f"run.name={run_dir.name}"]
    kept = str(run_dir / "recipe.yaml")
    resumed = load_recipe(recipe or kept, [*overrides, *place], stage=stage)
    refuse_another_run(resume, load_recipe(kept, place, stage=stage), resumed)
    return resumed


def refuse_another_run(resume: Path, began: Recipe, now: Recipe) -> None:
    """What makes a run this run: going on with another would be neither."""
    for dotted in FIXED:
        before, after = attrgetter(dotted)(began), attrgetter(dotted)(now)
        if before != after:
            is_block = dataclasses.is_dataclass(before) or dataclasses.is_dataclass(after)
            change = "is another" if is_block else f"was {before}, not {after}"
            raise UserError(
                f"--resume {resume}: {dotted}: {change}; a resumed run keeps it. "
                f"Start a new one from its weights: -s init_from={resume}"
            )


def run_dir_of(path: Path) -> Path:
    """The run that a run directory or one of its checkpoints belongs to."""
    if not path.exists():
        raise UserError(f"--resume {path}: no such run")
    run_dir = path.resolve().parent if (path / "config.json").is_file() else path
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"--resume {path}: not a run (no recipe.yaml in {run_dir})")
    return run_dir


def report(summary: dict[str, Any], *, as_json: bool, say: Any) -> None:
    if as_json:
        print(jsonlib.dumps(summary))
        return
    losses = {"train_loss": "training loss {:.4f}", "val_loss": "held out {:.4f}"}
    rewards = {"score": "score {:.3f}", "kl": "KL {:.3f}", "val_score": "held-out score {:.3f}"}
    words = {
        "step": "{:,} steps",
        "tokens": "{:,} tokens",
        **(rewards if "score" in summary else losses),
        "tokens_per_second": "{:,.0f} tok/s",
        "train_seconds": "{:.0f} s",
    }
    parts = [form.format(summary[name]) for name, form in words.items() if summary.get(name) is not None]
    say("done: " + ", ".join(parts))
    if "checkpoint" in summary:
        print(summary["checkpoint"])
