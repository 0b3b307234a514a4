"""gpt inspect next | attention | embedding | layers"""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options, sampling
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.cli.generate import prompt_from_stdin
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.api import LoadedModel
    from gptcli.inspect.views import View

inspect = typer.Typer(
    help="Look into a model: next, attention, embedding, layers.", no_args_is_help=True, rich_markup_mode=None
)

Text = Annotated[str | None, typer.Argument(metavar="TEXT", help="Left out: stdin (without its last newline).")]
Png = Annotated[Path | None, typer.Option("--out", "-o", metavar="PNG", help="Draw a picture instead.")]


@inspect.command("next")
def next_(
    text: Text = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="So many tokens.")] = 10,
    temperature: sampling.Temperature = 1.0,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    min_p: sampling.MinP = None,
    typical_p: sampling.TypicalP = None,
    out: Png = None,
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """The distribution over the next token, and what sampling options make of it.

    gpt inspect next "The professor" --top-p 0.9
    """
    from gptcli.config.load import build
    from gptcli.config.schema import SamplingParams

    warps = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    params = build(SamplingParams, warps, where="gpt inspect next")
    check_out(out, ".png")
    text = prompt_from_stdin() if text is None else text
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)

    from gptcli.generate.scheduler import window_start
    from gptcli.inspect.views import view_next

    ids = loaded.engine.encode_prompt(text)
    if (unseen := window_start(len(ids), loaded.config.context_length)) and not quiet:
        print(f"gpt: of the text's {len(ids):,} tokens the model sees the last {len(ids) - unseen:,}", file=sys.stderr)
    _show(loaded, view_next(loaded.model, loaded.tokenizer, ids, params, top=top, out=out), json, out)


@inspect.command()
def attention(
    text: Text = None,
    layer: Annotated[int | None, typer.Option(min=0, metavar="N", help="One layer, from 0.")] = None,
    head: Annotated[int | None, typer.Option(min=0, metavar="N", help="One head, from 0.")] = None,
    word: Annotated[str | None, typer.Option(metavar="W", help="Who looks; left out: the last token.")] = None,
    token: Annotated[int | None, typer.Option(min=0, metavar="I", help="The same as a token's number, from 0.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="HTML|PNG", help="Draw a page or a picture instead.")
    ] = None,
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Which tokens a token looks at, per layer and head.

    gpt inspect attention "The cat sat on the mat" --word sat

    gpt inspect attention "The cat sat on the mat" -o attention.html
    """
    if word is not None and token is not None:
        raise UserError("--word and --token both say who looks; give one")
    check_out(out, ".html", ".png")
    text = prompt_from_stdin() if text is None else text
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)

    from gptcli.inspect.views import view_attention

    ids = _within_context(loaded, text)
    if token is not None:
        _check_number("--token", token, len(ids), "the text")
    view = view_attention(
        loaded.model,
        loaded.tokenizer,
        ids,
        layers=_one_or_all("--layer", layer, loaded.config.n_layer),
        heads=_one_or_all("--head", head, loaded.config.n_head),
        token=token,
        word=word,
        out=out,
    )
    _show(loaded, view, json, out)


@inspect.command()
def embedding(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="WORD...", help='Words, or sums of words: "king - man + woman".')
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="So many neighbours.")] = 10,
    direction: Annotated[
        str | None, typer.Option(metavar="SUM", help='Project the words on it, as on "woman - man".')
    ] = None,
    sentence: Annotated[
        str | None, typer.Option("--in", metavar="TEXT", help="The word's neighbours in this text, layer by layer.")
    ] = None,
    analogies: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Accuracy on lines `a b c d` under lines `: section`.")
    ] = None,
    out: Png = None,
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Words as vectors: neighbours, sums, directions, what a context makes of a word, analogies.

    gpt inspect embedding "king - man + woman"

    gpt inspect embedding --direction "woman - man" nurse engineer

    gpt inspect embedding --in "on the bank of the river" bank

    gpt inspect embedding --analogies questions-words.txt
    """
    words = words or []
    _check_modes(words, direction, sentence, analogies, out)
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)

    from gptcli.inspect import views
    from gptcli.inspect.words import WordSpace

    space = WordSpace(loaded.model.wte.weight.detach(), loaded.tokenizer)
    if analogies is not None:
        view = views.view_analogies(space, analogies)
    elif sentence is not None:
        view = views.view_in_context(loaded.model, space, _within_context(loaded, sentence), words[0], top=top)
    elif direction is not None:
        view = views.view_projection(space, words, direction, out=out)
    else:
        view = views.view_neighbours(space, words, top=top, out=out)
    _show(loaded, view, json, out)


@inspect.command()
def layers(
    text: Text = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="So many tokens a layer.")] = 3,
    out: Png = None,
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """What each layer would have predicted, had the model ended there (the logit lens).

    gpt inspect layers "The capital of France is"
    """
    check_out(out, ".png")
    text = prompt_from_stdin() if text is None else text
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)

    from gptcli.inspect.views import view_layers

    ids = _within_context(loaded, text)
    _show(loaded, view_layers(loaded.model, loaded.tokenizer, ids, top=top, out=out), json, out)


def _show(loaded: LoadedModel, view: View, json: bool, out: Path | None) -> None:
    """One object, or the picture's path, or the lines."""
    if json:
        drawn = {} if out is None else {"path": str(out)}
        print(jsonlib.dumps({**view.row, **drawn, "checkpoint": str(loaded.path)}, ensure_ascii=False))
    else:
        print("\n".join(view.lines) if out is None else out)


def check_out(out: Path | None, *suffixes: str) -> None:
    """Before a large model is loaded for nothing."""
    if out is None:
        return
    if out.suffix not in suffixes:
        raise UserError(f"-o {out}: expected a name that ends in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise UserError(f"-o {out}: no such folder: {out.parent}")


def _check_modes(
    words: list[str], direction: str | None, sentence: str | None, analogies: Path | None, out: Path | None
) -> None:
    check_out(out, ".png")
    modes = {"--direction": direction, "--in": sentence, "--analogies": analogies}
    chosen = [name for name, value in modes.items() if value is not None]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: give one of them")
    if analogies is not None and words:
        raise UserError("--analogies: the words are those of the file; give no others")
    if analogies is None and not words:
        raise UserError('no word given; as in: gpt inspect embedding king, or "king - man + woman"')
    if sentence is not None and len(words) > 1:
        raise UserError(f"--in: looks at one word of the text, not {len(words)}")
    if out is not None and (sentence is not None or analogies is not None):
        raise UserError(f"{chosen[0]}: has no picture; leave out -o")


def _within_context(loaded: LoadedModel, text: str) -> list[int]:
    ids, limit = loaded.engine.encode_prompt(text), loaded.config.context_length
    if len(ids) > limit:
        raise UserError(f"the text has {len(ids)} tokens, this model looks at {limit}; shorten it")
    return ids


def _one_or_all(option: str, number: int | None, count: int) -> list[int]:
    if number is None:
        return list(range(count))
    _check_number(option, number, count, "the model")
    return [number]


def _check_number(option: str, number: int, count: int, owner: str) -> None:
    if number >= count:
        raise UserError(f"{option} {number}: {owner} has {count}, numbered 0 to {count - 1}")
