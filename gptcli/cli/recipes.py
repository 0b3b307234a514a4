"""gpt recipes list | show | copy | schema"""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli import options
from gptcli.errors import UserError

recipes = typer.Typer(help="The shipped recipes: list, show, copy, schema.", rich_markup_mode=None)


@recipes.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_()


@recipes.command("list")
def list_(json: options.Json = False) -> None:
    """List the shipped recipes."""
    from gptcli.config.shipped import shipped_recipes

    rows = [(path.stem, _title(path)) for path in shipped_recipes()]
    if json:
        print(jsonlib.dumps({"recipes": [{"name": name, "title": title} for name, title in rows]}))
        return
    width = max(len(name) for name, _ in rows)
    for name, title in rows:
        print(f"{name:<{width}}  {title}")


@recipes.command()
def show(name: Annotated[str, typer.Argument(help="A recipe's name or path.")]) -> None:
    """Print a recipe."""
    from gptcli.config.shipped import find_recipe

    sys.stdout.write(find_recipe(name).read_text("utf-8"))


@recipes.command()
def copy(
    name: Annotated[str, typer.Argument(help="A recipe's name or path.")],
    to: Annotated[Path | None, typer.Argument(help="Where to; left out: here, under its own name.")] = None,
) -> None:
    """Copy a recipe to a file of your own."""
    from gptcli.config.shipped import find_recipe

    source = find_recipe(name)
    target = to or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise UserError(f"{target}: exists; name another file")
    try:
        target.write_text(source.read_text("utf-8"), "utf-8")
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from error
    print(target)


@recipes.command()
def schema(
    json: options.Json = False,
    stage: Annotated[str, typer.Option("--stage", help="Whose keys.")] = "pretrain",
) -> None:
    """Print every key with its type, default and meaning; --json: as JSON Schema for editors."""
    from gptcli.config.describe import json_schema, key_lines
    from gptcli.config.schema import STAGES
    from gptcli.errors import nearest

    if stage not in STAGES:
        raise UserError(f"--stage {stage}: no such stage{nearest(stage, list(STAGES))}; known: {', '.join(STAGES)}")
    if json:
        print(jsonlib.dumps(json_schema(STAGES[stage])))
    else:
        print("\n".join(key_lines(STAGES[stage])))


def _title(path: Path) -> str:
    """The first comment line of a recipe says what it is."""
    first = path.read_text("utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
