"""gpt import, gpt export"""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.exchange.transfer import Transfer

NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not compare logits at the end (halves the memory).")]


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A Hugging Face directory or hub id, ckpt.pt (nanoGPT), .bin (llama2.c)."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to; left out: runs/NAME of the source.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="PATH|none", help="Instead of the one beside the weights.")
    ] = None,
    no_check: NoCheck = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Bring a checkpoint in: openai-gpt, gpt2, gpt_neo, llama; nanoGPT; llama2.c. Ends by comparing logits.

    gpt import ~/models/gpt2 -o runs/gpt2

    gpt import openai-community/gpt2
    """
    from gptcli.exchange.transfer import import_model

    target = out or Path("runs") / (Path(source.rstrip("/")).stem if Path(source).is_file() else Path(source).name)
    _report(import_model(source, target, tokenizer=tokenizer, check_logits=not no_check), json, quiet)


def export(
    checkpoint_: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="As -c: a checkpoint, a run or a model directory.")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", metavar="hf|gguf", help="For transformers, or for llama.cpp.")
    ] = "hf",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PATH", help="A directory (hf) or file (gguf).")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="fp32|fp16|bf16", help="Left out: as stored.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Work a LoRA adapter into its base.")] = False,
    no_check: NoCheck = False,
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Take a checkpoint out, for transformers (and all that reads its directories) or as GGUF.

    gpt export runs/quickstart --format hf -o out/
    """
    from gptcli.cli.checkpoint import pick_checkpoint
    from gptcli.exchange.transfer import DTYPES, EXPORTS, refuse_unmerged

    if checkpoint_ is not None and checkpoint is not None:
        raise UserError(f"-c {checkpoint}: and {checkpoint_} is named too; name one checkpoint")
    if format not in EXPORTS:
        raise UserError(f"--format {format}: expected {' or '.join(EXPORTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    if out is None:
        raise UserError("gpt export: needs -o, a directory (hf) or a file (gguf)")
    chosen = pick_checkpoint(checkpoint_ or checkpoint, quiet=quiet)
    refuse_unmerged(chosen, merge=merge)
    _report(EXPORTS[format](chosen, out, dtype=dtype, check_logits=not no_check), json, quiet)


def _report(done: Transfer, json: bool, quiet: bool) -> None:
    if not quiet:
        for note in done.notes:
            print(f"gpt: {note}", file=sys.stderr)
    if json:
        print(jsonlib.dumps(done.row()))
        return
    print(f"{done.path}: {done.format}, {done.params:,} parameters")
    if (proof := done.proof) is not None:
        print(
            f"largest difference of logits: {proof.largest_difference:.3g} over {proof.tokens} tokens, "
            f"against {proof.against} (allowed: {proof.limit:.3g})"
        )
