"""gpt generate"""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options, sampling
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.cli.pipeline import Options, run_pipeline
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.config.schema import SamplingParams
    from gptcli.generate import Engine
    from gptcli.generate.shots import Prompter


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
    regex: sampling.Regex = None,
    choices: sampling.Choices = None,
    json_schema: sampling.JsonSchema = None,
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
    template: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE|list", help="Put the text into these words; `list` shows what there is."),
    ] = None,
    variables: Annotated[
        list[str] | None,
        typer.Option("--var", metavar="NAME=VALUE", help="Of the template; @FILE reads a value. Repeatable."),
    ] = None,
    instruction: Annotated[str | None, typer.Option(metavar="TEXT", help="Say first what to do.")] = None,
    examples: Annotated[
        str | None, typer.Option(metavar="FILE", help="Show solved examples (.jsonl of prompt and response) first.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", min=0, metavar="N", help="So many of them, drawn by --seed; left out: all.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="So many different continuations.")] = 1,
    echo: Annotated[
        bool | None,
        typer.Option("--echo/--no-echo", help="Print the prompt too; left out: on a terminal only."),
    ] = None,
    input_file: Annotated[
        str | None,
        typer.Option(
            "--input", "-i", metavar="FILE|-", help="Continue each line: of JSON (.jsonl[.gz|.zst]) or of plain text."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE|-", help="With -i: rows of JSON; goes on where it was stopped."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With -o: begin anew.")] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="N", help="With -i: so many lines at once.")
    ] = 64,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="With -i: leave bad lines out, and list them.")] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="With --json or -i: each token's log-probability.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    seed: options.Seed = None,
    int8: options.Int8 = False,
    compile: options.Compile = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Continue a prompt, token by token.

    gpt generate "def main" --top-p 0.9

    gpt generate -i prompts.jsonl -o out.jsonl

    gpt generate --template summarize < article.txt
    """
    if template == "list":
        _list_templates()
        return
    params = sampling.params_of(context)
    prompter = _prompter(template, variables, instruction, examples, k, seed or 0)
    if prompter is not None:
        params = replace(params, stop=[*params.stop, *prompter.template.stop])
    if compile and draft is not None:
        raise UserError("--compile: does not go with --draft")
    if input_file is not None:
        if prompt is not None or samples > 1 or echo is not None:
            raise UserError("-i: each line is a prompt and gets one text: without PROMPT, --samples and --echo")
        if draft is not None:
            raise UserError("--draft: speeds up one text; -i continues many together")
        pipeline = Options(
            source=input_file,
            output=output,
            overwrite=overwrite,
            batch_size=batch_size,
            skip_bad=skip_bad,
            logprobs=logprobs,
            json=json,
            quiet=quiet,
            int8=int8,
            prompter=prompter,
            compile=compile,
        )
        loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)
        run_pipeline(loaded.engine, params, pipeline, seed_given=seed is not None)
        return
    if output is not None or overwrite or skip_bad:
        raise UserError("-o, --overwrite and --skip-bad belong to -i FILE; the text of one prompt goes to stdout")
    if logprobs and not json:
        raise UserError("--logprobs: are told in rows: with --json or -i FILE; `gpt score` tells those of a text")
    if params.num_beams > 1 and samples > 1:
        raise UserError("--samples: a search finds the same text each time; --num-return gives several beams")
    prompt = prompt_from_stdin() if prompt is None else prompt
    prompt = prompt if prompter is None else prompter(prompt)
    loaded = open_checkpoint(
        checkpoint, draft=draft, draft_tokens=draft_tokens, device=device, precision=precision, quiet=quiet
    )
    loaded.packed(int8=int8, compile=compile)
    if not quiet:
        _tell_what_is_seen(loaded.engine, prompt)
    if json:
        _print_json(loaded.engine, prompt, params, samples, logprobs)
    else:
        on_terminal = sys.stdout.isatty()
        _print_text(loaded.engine, prompt, params, samples, echo=on_terminal if echo is None else echo)


def _prompter(
    template: str | None,
    variables: list[str] | None,
    instruction: str | None,
    examples: str | None,
    k: int | None,
    seed: int,
) -> Prompter | None:
    """What puts a prompt into words, if any option asks for that."""
    if k is not None and examples is None:
        raise UserError("--k: says how many of --examples FILE to show; name one")
    if template is None and instruction is None and examples is None:
        if variables:
            raise UserError("--var: belongs to --template; name one")
        return None
    from gptcli.generate.shots import DEFAULT, Prompter, draw_shots, load_template, read_shots

    shots = [] if examples is None else draw_shots(read_shots(examples), k, seed)
    return Prompter(load_template(template or DEFAULT), shots, instruction, dict(map(_variable, variables or [])))


def _variable(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not equals:
        raise UserError(f"--var {given}: write it as NAME=VALUE")
    if not value.startswith("@"):
        return name, value
    try:
        return name, Path(value[1:]).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--var {given}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error


def _list_templates() -> None:
    from gptcli.generate.shots import load_template, template_names

    for name in template_names():
        print(f"{name:<16} {load_template(name).about}")


def prompt_from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"<stdin>: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})") from None


def _tell_what_is_seen(engine: Engine, prompt: str) -> None:
    from gptcli.generate.scheduler import window_start

    ids = len(engine.encode_prompt(prompt))
    if unseen := window_start(ids, engine.model.config.context_length):
        print(
            f"gpt: the prompt's {ids:,} tokens are more than the context: its first {unseen:,} are not seen",
            file=sys.stderr,
        )


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
    from gptcli.generate.completions import completion_row

    for number, completion in enumerate(complete(engine, [prompt] * samples, params)):
        print(
            jsonlib.dumps(completion_row(number, completion, params, logprobs), ensure_ascii=False),
            flush=True,
        )
