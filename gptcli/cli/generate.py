"""gpt generate"""

from __future__ import annotations

import json as jsonlib
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.config.schema import SamplingParams
    from gptcli.generate import Completion, Engine


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to continue; left out: stdin (without its last newline), else nothing."),
    ] = None,
    checkpoint: options.Checkpoint = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Stop after this many.")] = 200,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0: greedy.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens below this share of the likeliest one's probability."),
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="CTRL's penalty on tokens seen; 1: none.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="So many different continuations.")] = 1,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-text.")] = False,
    echo: Annotated[
        bool | None,
        typer.Option("--echo/--no-echo", help="Print the prompt too; left out: on a terminal only."),
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="With --json: each token's log-probability.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    seed: options.Seed = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Continue a prompt, token by token.

    gpt generate "def main" --top-p 0.9
    """
    from gptcli.config.load import build
    from gptcli.config.schema import SamplingParams

    params = build(
        SamplingParams,
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop": stop or [],
            "seed": fresh_seed() if seed is None else seed,
            "ignore_eos": ignore_eos,
        },
        where="gpt generate",
    )
    prompt = _prompt_from_stdin() if prompt is None else prompt
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)
    if json:
        _print_json(loaded.engine, prompt, params, samples, logprobs)
    else:
        on_terminal = sys.stdout.isatty()
        _print_text(loaded.engine, prompt, params, samples, echo=on_terminal if echo is None else echo)


def fresh_seed() -> int:
    """A new seed for each call: without --seed, text differs from run to run."""
    import secrets

    return secrets.randbits(31)


def _prompt_from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"<stdin>: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})") from None


def _print_text(engine: Engine, prompt: str, params: SamplingParams, samples: int, *, echo: bool) -> None:
    """Samples one after the other, so that each can be read as it comes."""
    for number in range(samples):
        if number:
            _write("\n---\n")
        if echo:
            _write(f"\x1b[2m{prompt}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else prompt)
        for _, chunk, _ in engine.stream([prompt], params, streams=[number]):
            _write(chunk)
    _write("\n")


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _print_json(engine: Engine, prompt: str, params: SamplingParams, samples: int, logprobs: bool) -> None:
    for number, completion in enumerate(engine.generate([prompt] * samples, params)):
        print(
            jsonlib.dumps(completion_row(number, completion, params, logprobs), ensure_ascii=False),
            flush=True,
        )


def completion_row(number: int, completion: Completion, params: SamplingParams, logprobs: bool) -> dict[str, Any]:
    row = {
        "id": number,
        "prompt": completion.prompt,
        "text": completion.text,
        "tokens": len(completion.ids),
        "finish_reason": completion.finish_reason,
        "seed": params.seed,
    }
    return row | ({"logprobs": completion.logprobs} if logprobs else {})
