"""gpt report"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli import options
from gptcli.errors import UserError


def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN|RESULT.json...", help="A run, or files of `gpt eval -o`, or both.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="HTML", help="Write a page that needs nothing else.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """A run as a page: curves, samples, figures, lineage, recipe. Or many results as one table.

    gpt report runs/mine -o mine.html

    gpt report base.json longer.json
    """
    if out is not None and (out.suffix != ".html" or not out.absolute().parent.is_dir()):
        raise UserError(f"-o {out}: expected a name that ends in .html, in a folder that is there")

    from gptcli.inspect.terminal import columns
    from gptcli.report.page import Section, page, table
    from gptcli.report.results import read_all, results_table
    from gptcli.report.run import overview, read_run, run_page, run_row, warnings

    files, runs = [path for path in paths if path.is_file()], [path for path in paths if not path.is_file()]
    if len(runs) > 1:
        raise UserError(f"{runs[1]}: one run a report; of several, compare the results (`gpt eval -o`)")
    results = read_all(files)
    if runs:
        run = read_run(runs[0], results)
        for warning in [] if quiet else warnings(run):
            typer.echo(warning, err=True)
        html, row, results = run_page(run), run_row(run), run.results
        facts = [*overview(run), *(fact for link in run.lineage[:1] for fact in link.facts)]
        lines = columns(facts, whole=True) if facts else [f"{runs[0]}: no step is recorded and no checkpoint saved"]
    else:
        whole = results_table(results, main_only=False)
        html = page("Results", [Section("Evaluation", table(whole, heading=True))])
        row, lines = {"results": [result.to_json(items=False) for result in results]}, []
    if out is not None:
        out.write_text(html, "utf-8")
    if json:
        print(jsonlib.dumps(row if out is None else {**row, "path": str(out)}, ensure_ascii=False))
    elif out is not None:
        print(out)
    else:
        print("\n".join([*lines, *(columns(results_table(results)) if results else [])]))
