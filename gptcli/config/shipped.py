"""The recipes that ship with the package, and where a recipe name leads."""

from __future__ import annotations

from pathlib import Path

from gptcli.errors import UserError, nearest


def recipes_dir() -> Path:
    """Inside the wheel `gptcli/recipes`; in a checkout the top-level folder."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[Path]:
    return sorted(recipes_dir().glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """A file if there is one, else the shipped recipe of that name (with or without .yaml)."""
    path = Path(name_or_path)
    if path.exists() and not path.is_dir():  # a pipe, too
        return path
    shipped = {p.stem: p for p in shipped_recipes()}
    name = path.name.removesuffix(".yaml")
    if name in shipped and path.parent == Path():
        return shipped[name]
    if path.is_dir():
        raise UserError(f"--recipe {name_or_path}: is a directory; a recipe is a YAML file")
    hint = nearest(name, sorted(shipped))
    raise UserError(f"--recipe {name_or_path}: no such file or shipped recipe{hint or '; `gpt recipes` lists them'}")
