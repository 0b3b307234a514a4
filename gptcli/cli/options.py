"""Options that mean the same in every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", "-r", metavar="NAME|PATH", help="A shipped recipe's name (`gpt recipes`) or a file."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a recipe key, as in optim.lr=3e-4. Repeatable."),
]
Checkpoint = Annotated[
    Path | None,
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
Seed = Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Decides everything random.")]
Int8 = Annotated[
    bool, typer.Option("--int8", help="int8 weights: smaller, and faster where the model is large; not quite the same.")
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="On a GPU: compile the decoding step, which takes seconds at first."),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|mps", help="Where to compute.")]
Precision = Annotated[str, typer.Option("--precision", metavar="auto|fp32|bf16", help="Arithmetic.")]
