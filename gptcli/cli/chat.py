"""gpt chat"""

from __future__ import annotations

import json as jsonlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options, sampling
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.generate.chat import Answer, Chat


def chat(
    context: typer.Context,
    checkpoint: options.Checkpoint = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told before the first turn.")
    ] = None,
    max_new_tokens: sampling.MaxNewTokens = 512,
    min_new_tokens: sampling.MinNewTokens = 0,
    stop: sampling.Stop = None,
    ignore_eos: sampling.IgnoreEos = False,
    on_overflow: Annotated[
        str,
        typer.Option(
            metavar="slide|refuse", help="Past the context: leave the oldest turns out, and say which; or refuse."
        ),
    ] = "slide",
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
    json: options.Json = False,
    quiet: options.Quiet = False,
    seed: options.Seed = None,
    int8: options.Int8 = False,
    compile: options.Compile = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Talk with a model: in a terminal (/help lists the commands), or each line of stdin as a turn.

    gpt chat --system "Be brief." --temperature 0.7

    gpt chat < questions.txt > answers.txt
    """
    params = sampling.params_of(context)
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)

    from gptcli.cli.terminal import Terminal
    from gptcli.generate.chat import Chat

    def note(line: str) -> None:
        if not quiet:
            print(f"gpt: {line}", file=sys.stderr, flush=True)

    talk = Chat(loaded.packed(int8=int8, compile=compile).engine, params, system, note)
    if not talk.has_template:
        note("this model has no chat template, so it continues `User: ... Assistant:` as plain text; gpt sft gives one")
    if sys.stdin is not None and sys.stdin.isatty():
        Terminal(talk, note, json=json).run()
    else:
        _answer_lines(talk, json=json)


def _answer_lines(talk: Chat, *, json: bool) -> None:
    """Each line of stdin is a turn, and each answer a line."""
    for number, line in enumerate(sys.stdin.buffer if sys.stdin is not None else (), start=1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
            if not text.strip():
                continue
            answer = talk.ask(text)
        except UnicodeDecodeError as error:
            raise UserError(f"<stdin>:{number}: not UTF-8") from error
        except UserError as error:
            raise UserError(f"<stdin>:{number}: {error}") from error
        print(as_json(answer) if json else _in_one_line(answer.text), flush=True)


def as_json(answer: Answer) -> str:
    """`left_out` is there only where turns are."""
    row = {
        "role": "assistant",
        "content": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": answer.tokens,
        **({"left_out": answer.left_out} if answer.left_out else {}),
    }
    return jsonlib.dumps(row, ensure_ascii=False)


def _in_one_line(text: str) -> str:
    r"""Line ends as \n and \r, so that no two answers are alike; a backslash is doubled."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
