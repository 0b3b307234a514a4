"""gpt inspect positions | memorization"""

from __future__ import annotations

import json as jsonlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.cli.evaluate import texts_of_run
from gptcli.cli.evaluate_show import progress
from gptcli.cli.inspect import Png, check_out
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.eval.positions import Span

HeldOut = Annotated[
    list[str] | None, typer.Option(help="Text: files, folders, globs, -. Left out: the run's own held-out part.")
]


def positions(
    data: HeldOut = None,
    length: Annotated[
        int | None, typer.Option(min=2, metavar="T", help="Tokens a row, also past the context; left out: the context.")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Stretch positions to --length as further training would begin with.")
    ] = False,
    out: Png = None,
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """The loss at each place of a row: what the context is worth, and what becomes of it past its trained length.

    gpt inspect positions --data book.txt --length 4096 -o positions.png
    """
    check_out(out, ".png")
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)
    texts = _texts(data) if data else texts_of_run(loaded.path)[1]

    from gptcli.eval.perplexity import join_documents
    from gptcli.eval.positions import losses_by_position, model_for, save_picture, spans
    from gptcli.inspect.terminal import bars

    length, trained = length or loaded.config.context_length, loaded.config.context_length
    model, how = model_for(loaded.model, length, extend=extend)
    ids = join_documents(texts, loaded.tokenizer).ids
    with progress("measuring", quiet) as advance:
        losses = losses_by_position(model, ids, length, dtype=loaded.dtype, advance=advance)
    found = spans(losses, trained)
    if out is not None:
        save_picture(losses, trained, out, title=f"{loaded.path}: loss by position ({loaded.config.position})")
    if json:
        row: dict[str, Any] = {
            "loss": losses.mean(0).round(6).tolist(),
            "spans": [vars(span) for span in found],
            "rows": len(losses),
            "length": length,
            "context_length": trained,
            "position": loaded.config.position,
            "how": how,
            "checkpoint": str(loaded.path),
        }
        print(jsonlib.dumps(row if out is None else {**row, "path": str(out)}))
    elif out is not None:
        print(out)
    else:
        cells = [(_places(span, trained), f"{span.loss:6.3f} ± {span.stderr:.3f}", span.loss) for span in found]
        print("\n".join(bars(cells)))
        print(f"loss in nats per token, by tokens seen before; {len(losses):,} rows of {length:,}; {how}")


def _places(span: Span, trained: int) -> str:
    name = f"{span.first}" if span.first == span.last else f"{span.first}-{span.last}"
    return name + (" past the context" if span.first >= trained else "")


def memorization(
    data: Annotated[
        list[str] | None, typer.Option(help="Text that was trained on; left out: the run's own training part.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Text that was not, for the base rate; left out: the run's held-out part.")
    ] = None,
    prefix: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that are given.")] = 50,
    continuation: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that must follow.")] = 50,
    count: Annotated[int, typer.Option("--count", "-n", min=1, metavar="N", help="Passages of either text.")] = 1000,
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    seed: options.Seed = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Does the model recite its training text? The share of passages it continues word for word, and of held-out ones.

    gpt inspect memorization --prefix 50 --continuation 50
    """
    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)
    if prefix + continuation > loaded.config.context_length:
        raise UserError(
            f"--prefix {prefix} --continuation {continuation}: more than the model's context of "
            f"{loaded.config.context_length} tokens; give smaller ones"
        )
    texts = {"training": _texts(data) if data else None, "held_out": _texts(held_out) if held_out else None}
    if not data or (not held_out and (loaded.path.parent / "recipe.yaml").is_file()):
        own = texts_of_run(loaded.path)
        texts = {name: given or mine for (name, given), mine in zip(texts.items(), own, strict=True)}

    from gptcli.eval.memorization import AGGREGATES, draw_passages, recite

    row: dict[str, Any] = {"prefix": prefix, "continuation": continuation, "checkpoint": str(loaded.path)}
    for name, of_part in texts.items():
        if not of_part:
            row[name] = None
            continue
        passages = draw_passages(
            loaded.tokenizer, of_part, prefix=prefix, continuation=continuation, count=count, seed=seed or 0
        )
        with progress(name.replace("_", " "), quiet) as advance:
            items = recite(loaded.engine, passages, advance)
        figures = {metric: how(items) for metric, how in AGGREGATES.items()}
        row[name] = {"n": len(items), **{m: f.value for m, f in figures.items()}}
        row[name] |= {f"{m}_stderr": f.stderr for m, f in figures.items()} | {"items": items}
    print(jsonlib.dumps(row) if json else "\n".join(_memorization_lines(row)))


def _memorization_lines(row: dict[str, Any]) -> list[str]:
    lines = [f"{row['continuation']} tokens after {row['prefix']} given ones, greedily"]
    for name in ("training", "held_out"):
        part = row[name]
        if part is None:
            lines.append(f"{name.replace('_', ' '):<9} no text given, so no base rate (--held-out)")
            continue
        error = "" if part["exact_stderr"] is None else f" ± {part['exact_stderr']:.2%}"
        exact, matched = f"{part['exact']:7.2%}{error} word for word", f"{part['matched']:.1%} of the tokens match"
        lines.append(f"{name.replace('_', ' '):<9} {exact}; {matched} before one differs ({part['n']:,} passages)")
    return lines


def _texts(specs: list[str]) -> list[str]:
    from gptcli.data.sources import SourceReader

    texts = list(SourceReader(specs).documents())
    if not texts:
        raise UserError(f"{', '.join(specs)}: no text to measure on")
    return texts
