"""gpt tokenize"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli import options
from gptcli.errors import UserError


def tokenize(
    source: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders, globs, -, python-stdlib, hf:NAME. None: a filter over stdin's lines."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write token shards here.")] = None,
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", "-t", metavar="SPEC", help="gpt1 | gpt2 | bytes | char | bpe:SIZE | a path."),
    ] = "gpt2",
    decode: Annotated[bool, typer.Option("--decode", help="Filter the other way: ids (NDJSON) to text.")] = False,
    parse_special: Annotated[
        bool,
        typer.Option("--parse-special", help="Let text that spells a special token be one (filter mode)."),
    ] = False,
    val_fraction: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of the documents held out.")] = 0.05,
    split: Annotated[str, typer.Option(metavar="hash|tail", help="How documents are held out.")] = "hash",
    text_key: Annotated[str, typer.Option(help="The text column of JSONL and Parquet.")] = "text",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out bad lines and files, and count them.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn text into token shards, training a BPE first if asked; or filter lines in a pipe.

    gpt tokenize book.txt -o data/book --tokenizer bpe:8192

    gpt tokenize --tokenizer data/book < lines > ids.ndjson
    """
    if split not in ("hash", "tail"):
        raise UserError(f"--split {split}: expected hash or tail")
    if not source:
        if skip_bad:
            raise UserError("--skip-bad: a filter gives a line for each line; it belongs to gpt tokenize SOURCE -o DIR")
        _filter(tokenizer, decode, parse_special, quiet)
        return
    if out is None:
        raise UserError("gpt tokenize SOURCE: needs -o DIR; without a SOURCE it filters stdin's lines")
    from gptcli.data.shards import Corpus, write_tokens

    if out.exists() and not (out / "meta.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists and is not a tokenized directory; choose another -o")
    corpus = Corpus(source=source, val_fraction=val_fraction, split=split, text_key=text_key, skip_bad=skip_bad)
    with _counter(quiet) as advance:
        made = write_tokens(
            corpus.parts,
            out,
            tokenizer,
            origin=corpus.origin(),
            say=lambda s: _say(s, quiet),
            advance=advance,
        )
    row = summary(made.meta, corpus.skipped)
    row["documents"] -= corpus.cut_one
    for reason in corpus.skipped:
        _say(f"skipped {reason}", quiet)
    if json:
        print(jsonlib.dumps(row))
    else:
        _say(
            f"{row['documents']:,} documents, {row['bytes']:,} bytes: {row['tokens']:,} tokens "
            f"({row['train_tokens']:,} to train on, {row['val_tokens']:,} held out), vocabulary {row['vocab_size']:,}",
            quiet,
        )
        print(out)


def summary(meta: dict[str, Any], skipped: list[str]) -> dict[str, Any]:
    parts = meta["splits"]
    total = {
        name: sum(part[name] for part in parts.values()) for name in ("documents", "tokens", "eot_tokens", "bytes")
    }
    return {
        **total,
        "train_tokens": parts["train"]["tokens"],
        "val_tokens": parts["val"]["tokens"],
        "vocab_size": meta["vocab_size"],
        "tokens_per_second": meta["tokens_per_second"],
        "tokenizer": meta["tokenizer_hash"],
        "skipped": len(skipped),
    }


def _filter(spec: str, decode: bool, parse_special: bool, quiet: bool) -> None:
    """Lines in, lines out, one for one."""
    from gptcli.tokenizer.resolve import needs_text, resolve_tokenizer

    if needs_text(spec):
        raise UserError(f"--tokenizer {spec}: is made from a source; as a filter, name one that is made already")

    def no_text() -> Iterator[str]:
        raise UserError(f"--tokenizer {spec}: is not at hand here; name a tokenizer.json or a folder with one")

    chosen = resolve_tokenizer(spec, no_text, say=lambda s: _say(s, quiet))
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError:
            raise UserError(f"<stdin>:{number}: not UTF-8") from None
        if decode:
            print(jsonlib.dumps({"text": chosen.decode(_ids(text, number, chosen.vocab_size))}, ensure_ascii=False))
        else:
            try:
                ids = chosen.encode(text, parse_special=parse_special)
            except UserError as error:
                raise UserError(f"<stdin>:{number}: {error}") from None
            print(jsonlib.dumps(ids))


def _ids(text: str, number: int, vocab_size: int) -> list[int]:
    try:
        ids = jsonlib.loads(text)
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
        raise UserError(f"<stdin>:{number}: expected a list of ids from 0 to {vocab_size - 1}, as in [1, 2, 3]")
    return ids


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(f"gpt: {line}", file=sys.stderr)


def _counter(quiet: bool) -> Any:
    """Megabytes done, on a terminal."""
    import contextlib

    if quiet or not sys.stderr.isatty():
        return contextlib.nullcontext(lambda n: None)

    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    @contextlib.contextmanager
    def bar() -> Any:
        columns = (TextColumn("tokenizing"), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
            task = progress.add_task("", total=None)
            yield lambda n: progress.advance(task, n)

    return bar()
