"""gpt data contamination"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.evaluate_show import progress
from gptcli.errors import UserError

SHOWN = 10  # flagged items, in the terminal

Corpus = Annotated[list[str], typer.Argument(metavar="CORPUS...", help="Text: files, folders, globs, hf:NAME, -.")]
Items = Annotated[
    list[Path], typer.Option(help="The evaluation's items, JSONL, as `gpt eval --data` takes them. Repeatable.")
]
Results = Annotated[
    list[Path] | None,
    typer.Option(help="A file of `gpt eval -o`, whose scores to give with and without flagged items. Repeatable."),
]
Ngram = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Words in a row; left out: GPT-3's rule, 8 to 13 by the items' lengths."),
]


def contamination(
    corpus: Corpus,
    items: Items,
    results: Results = None,
    ngram: Ngram = None,
    text_key: Annotated[str, typer.Option(help="The column that holds the text in JSONL and Parquet.")] = "text",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Which evaluation items has a corpus seen? Those that share an n-gram of words with it.

    gpt data contamination corpus/ --items lambada.jsonl --results lambada.json
    """
    from gptcli.data.sources import SourceReader, list_files
    from gptcli.eval.contamination import Overlap, check_same_items, read_items, scores_apart
    from gptcli.eval.results import read_results

    known = read_items(items)
    measured = [(file, result) for file in results or [] for result in read_results(file)]
    for file, result in measured:
        check_same_items(result, known, file)
    overlap = Overlap(known, ngram)
    reader = SourceReader(corpus, text_key=text_key)
    size = sum(path.stat().st_size for spec in corpus if _is_local(spec) for path in list_files(spec))
    characters = 0
    with progress("reading", quiet) as advance:
        for length in overlap.scan(reader.pieces()):
            characters += length
            advance(min(1.0, characters / max(size, 1)))
    if not characters:
        raise UserError(f"{', '.join(corpus)}: no text to look through")
    flagged = {item.id: overlap.matches[item.id] for item in known if item.id in overlap.matches}
    row: dict[str, Any] = {
        "n": len(known),
        "n_flagged": len(flagged),
        "n_too_short": len(overlap.too_short),
        "ngram": overlap.n,
        "characters": characters,
        "flagged": [
            {"id": id, "where": match.where, "ngram": match.ngram, "ngrams_found": len(match.found)}
            for id, match in flagged.items()
        ],
        "too_short": overlap.too_short,
        "scores": [score for _, result in measured for score in scores_apart(result, set(flagged))],
    }
    print(jsonlib.dumps(row, ensure_ascii=False) if json else "\n".join(_lines(row)))


def _is_local(spec: str) -> bool:
    return spec != "-" and not spec.startswith("hf:")


def _lines(row: dict[str, Any]) -> Iterator[str]:
    share, what = row["n_flagged"] / row["n"], f"{row['ngram']} words in a row"
    yield f"{row['n_flagged']:,} of {row['n']:,} items ({share:.1%}) share {what} with the corpus"
    if row["n_too_short"]:
        yield f"{row['n_too_short']:,} items have fewer words than that and are not judged"
    for match in row["flagged"][:SHOWN]:
        yield f"  {match['id']:<8}  {match['where']}: {match['ngram']}"
    if row["n_flagged"] > SHOWN:
        yield f"  ... and {row['n_flagged'] - SHOWN:,} more (--json lists them)"
    if row["scores"]:
        from gptcli.inspect.terminal import columns

        table = [["task", "metric", "all", "", "clean", "", "flagged", "", "checkpoint"]]
        for score in row["scores"]:
            cells = [cell for part in ("all", "clean", "flagged") for cell in _cells(score, part)]
            table.append([score["task"], score["metric"], *cells, score["checkpoint"]])
        yield from columns(table)


def _cells(score: dict[str, Any], part: str) -> tuple[str, str]:
    value, stderr = score[part], score[f"{part}_stderr"]
    if value is None:
        return "-", ""
    return f"{value:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}"), f"n={score[f'n_{part}']}"
