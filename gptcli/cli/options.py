"""Options that mean the same in every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

RecipeName = Annotated[
    Optional[str],  # noqa: UP045  typer reads this at run time
    typer.Option("--recipe", "-r", metavar="NAME|PATH", help="A shipped recipe's name (`gpt recipes`) or a file."),
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a recipe key, as in optim.lr=3e-4. Repeatable."),
]
Checkpoint = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--checkpoint",
        "-c",
        envvar="GPT_CHECKPOINT",
        metavar="PATH",
        help="A checkpoint, a run (its latest) or a model directory; left out: the newest under ./runs.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Exactly one JSON object on stdout (streams: one a line).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")]
Seed = Annotated[Optional[int], typer.Option("--seed", min=0, metavar="N", help="Decides everything random.")]  # noqa: UP045
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|mps", help="Where to compute.")]
Precision = Annotated[str, typer.Option("--precision", metavar="auto|fp32|bf16", help="Arithmetic.")]
