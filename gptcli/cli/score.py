"""gpt score"""

from __future__ import annotations

import json as jsonlib
import math
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.api import TokenScore

# Background colours of a terminal's 256, from expected to surprising; each holds for up to so many nats.
SHADES = ((0.7, None), (2.0, 22), (4.0, 58), (7.0, 94), (math.inf, 88))


def score(
    text: Annotated[str | None, typer.Argument(help="The text; left out: stdin.")] = None,
    checkpoint: options.Checkpoint = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens a window moves on; left out: half the context, as in `gpt eval`.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """How likely is each token of a text, given those before it?

    On a terminal the text, darker green to red where the model is surprised; in a pipe, JSON. The sum is what
    `gpt eval --task perplexity` says of the same text.
    """
    if text is None:
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"<stdin>: not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise UserError("the text is empty; there is nothing to score")
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)
    tokens = loaded.score(text, stride=stride)
    nll, size = -math.fsum(token.logprob for token in tokens), len(text.encode())
    if not tokens:
        raise UserError("the text is a single token that nothing precedes; there is nothing to score")
    row = {
        "tokens": [vars(token) for token in tokens],
        "nll": nll,
        "bits_per_byte": nll / math.log(2) / size,
        "perplexity": math.exp(min(nll / len(tokens), 700.0)),
        "checkpoint": str(loaded.path),
        "tokenizer": loaded.tokenizer.hash,
    }
    if json or not sys.stdout.isatty():
        print(jsonlib.dumps(row, ensure_ascii=False))
    else:
        print(shaded(tokens))
        print(f"{nll:.2f} nats, {row['bits_per_byte']:.3f} bits per byte, perplexity {row['perplexity']:.2f}")


def shaded(tokens: list[TokenScore]) -> str:
    """The text, each token on a colour that says how surprising it was; plain under NO_COLOR."""
    if "NO_COLOR" in os.environ:
        return "".join(token.text for token in tokens)
    out = []
    for token in tokens:
        shade = next(shade for limit, shade in SHADES if -token.logprob <= limit)
        body = token.text if shade is None else f"\x1b[48;5;{shade}m{token.text}\x1b[0m"
        # a colour that runs over a line's end would fill the rest of the line
        out.append(body.replace("\n", f"\x1b[0m\n\x1b[48;5;{shade}m") if shade is not None else body)
    return "".join(out)
