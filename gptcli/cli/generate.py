"""gpt generate"""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options, sampling
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.config.schema import SamplingParams
    from gptcli.generate import Completion, Engine


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to continue; left out: stdin (without its last newline), else nothing."),
    ] = None,
    checkpoint: options.Checkpoint = None,
    max_new_tokens: sampling.MaxNewTokens = 200,
    min_new_tokens: sampling.MinNewTokens = 0,
    stop: sampling.Stop = None,
    ignore_eos: sampling.IgnoreEos = False,
    on_overflow: sampling.OnOverflow = "slide",
    temperature: sampling.Temperature = 1.0,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    top_p_mode: sampling.TopPMode = "hf",
    min_p: sampling.MinP = None,
    typical_p: sampling.TypicalP = None,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    presence_penalty: sampling.PresencePenalty = 0.0,
    frequency_penalty: sampling.FrequencyPenalty = 0.0,
    no_repeat_ngram: sampling.NoRepeatNgram = 0,
    bad_words: sampling.BadWords = None,
    logit_bias: sampling.LogitBias = None,
    num_beams: sampling.NumBeams = 1,
    length_penalty: sampling.LengthPenalty = 1.0,
    early_stopping: sampling.EarlyStopping = "false",
    best_of: sampling.BestOf = None,
    best_of_score: sampling.BestOfScore = "mean",
    num_return: sampling.NumReturn = 1,
    draft: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A smaller checkpoint of the same tokenizer, to guess ahead (speculative decoding): a text as likely "
            "as without, but another one for the same --seed; the same with temperature 0.",
        ),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Guess N ahead; the text is the same.")] = 4,
    samples: Annotated[int, typer.Option("--samples", min=1, help="So many different continuations.")] = 1,
    echo: Annotated[
        bool | None,
        typer.Option("--echo/--no-echo", help="Print the prompt too; left out: on a terminal only."),
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="With --json: each token's log-probability.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    seed: options.Seed = None,
    int8: options.Int8 = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Continue a prompt, token by token.

    gpt generate "def main" --top-p 0.9
    """
    params = sampling.params_of(context)
    if params.num_beams > 1 and samples > 1:
        raise UserError("--samples: a search finds the same text each time; --num-return gives several beams")
    prompt = prompt_from_stdin() if prompt is None else prompt
    loaded = open_checkpoint(
        checkpoint, draft=draft, draft_tokens=draft_tokens, device=device, precision=precision, quiet=quiet
    )
    loaded.packed(int8=int8)
    if json:
        _print_json(loaded.engine, prompt, params, samples, logprobs)
    else:
        on_terminal = sys.stdout.isatty()
        _print_text(loaded.engine, prompt, params, samples, echo=on_terminal if echo is None else echo)


def prompt_from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"<stdin>: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})") from None


def _print_text(engine: Engine, prompt: str, params: SamplingParams, samples: int, *, echo: bool) -> None:
    """Texts one after the other; drawn ones as their tokens come."""
    start = ""
    if echo:
        start = f"\x1b[2m{prompt}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else prompt
    for number, chunks in enumerate(_texts(engine, prompt, params, samples)):
        _write(("\n---\n" if number else "") + start)
        for chunk in chunks:
            _write(chunk)
    _write("\n")


def _texts(engine: Engine, prompt: str, params: SamplingParams, samples: int) -> Iterator[Iterable[str]]:
    """Each text in pieces, as soon as they are certain."""
    from gptcli.generate import complete

    for number in range(samples):
        if params.num_beams > 1 or params.best_of is not None:
            yield from ([c.text] for c in complete(engine, [prompt], params, streams=[number]))
        else:
            yield (chunk for _, chunk, _ in engine.stream([prompt], params, streams=[number]))


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _print_json(engine: Engine, prompt: str, params: SamplingParams, samples: int, logprobs: bool) -> None:
    from gptcli.generate import complete

    for number, completion in enumerate(complete(engine, [prompt] * samples, params)):
        print(
            jsonlib.dumps(completion_row(number, completion, params, logprobs), ensure_ascii=False),
            flush=True,
        )


def completion_row(number: int, completion: Completion, params: SamplingParams, logprobs: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": number,
        "prompt": completion.prompt,
        "text": completion.text,
        "tokens": len(completion.ids),
        "finish_reason": completion.finish_reason,
        "seed": params.seed,
    }
    if completion.score is not None:
        row["score"] = completion.score
    if completion.draft is not None:
        row |= {f"draft_{name}": count for name, count in completion.draft._asdict().items()}
    return row | ({"logprobs": completion.logprobs} if logprobs else {})
