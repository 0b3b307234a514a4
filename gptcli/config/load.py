"""YAML -> overrides -> strictly typed dataclasses -> cross-field checks. Every complaint is one line."""

from __future__ import annotations

import dataclasses
import datetime
import types
import typing
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from gptcli.config.schema import STAGES, PretrainRecipe, Recipe
from gptcli.config.shipped import find_recipe
from gptcli.config.validate import validate
from gptcli.errors import UserError, nearest

T = TypeVar("T")
ALTERNATIVES = {"train": ("max_steps", "max_tokens", "epochs"), "reward": ("checkpoint", "function")}  # by block


def load_recipe(name_or_path: str, overrides: typing.Sequence[str] = (), *, stage: str | None = None) -> Recipe:
    """Read a recipe by path or shipped name, apply `key.sub=value` overrides, build and check it.

    Raises UserError (file, key, reason) for anything that does not fit; `stage` is the verb that asks.
    """
    path = find_recipe(name_or_path)
    tree = read_yaml(path)
    apply_overrides(tree, overrides)
    recipe = build_recipe(tree, where=path.name, stage=stage)
    if recipe.run.name is None:
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, name=path.stem))
    return recipe


def build_recipe(tree: dict[str, Any], *, where: str, stage: str | None = None) -> Recipe:
    """A checked recipe from plain data."""
    named = tree.get("stage", stage or "pretrain")
    if not isinstance(named, str) or named not in STAGES:
        raise UserError(f"{where}: stage: {named!r} is no stage{nearest(str(named), list(STAGES))}")
    if stage is not None and named != stage:
        raise UserError(f"{where}: this recipe is for `gpt {named}`, not `gpt {stage}`")
    recipe = build(STAGES.get(named, PretrainRecipe), {**tree, "stage": named}, where=where)
    validate(recipe, where)
    return recipe


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}:{line} not YAML: {reason}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, this is {_kind(tree)}")
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one block, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key_node.value!r} stands here twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Put each key.sub=value into plain data. Of keys that stand for one thing, one that is set takes the place of the
    others: a run's length in another unit, a reward model or a function."""
    overrides, given = list(overrides), dict[str, Any]()
    for override in overrides:
        apply_override(given, override)
    for block, names in ALTERNATIVES.items():
        had, said = tree.get(block), given.get(block)
        if isinstance(had, dict) and isinstance(said, dict) and any(said.get(name) is not None for name in names):
            for name in names:
                had.pop(name, None)
    for override in overrides:
        apply_override(tree, override)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put key.sub=value into plain data."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set {override}: write it as key.sub=value")
    try:
        value = yaml.safe_load(text) if text not in ("", "-") else text  # "-" is stdin, to YAML a list of nothing
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if isinstance(value, datetime.date) or (is_number and str(value) != text):
        value = text  # the field's type decides: 007 and 12:30 may be names
    node = tree
    *parents, last = dotted.split(".")
    for part in parents:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = value
    if dotted == "train.global_batch_size":  # said by hand, it holds on a CPU too
        node.pop("global_batch_size_cpu", None)


# ---- typed building -------------------------------------------------------------------------------------------


def build(cls: type[T], tree: Any, *, where: str, prefix: str = "") -> T:
    """An instance of the dataclass `cls` from plain data; unknown keys and wrong types raise UserError."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the recipe'}: expected a block of keys, not {_kind(tree)}")
    hints, fields = field_types(cls), {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in tree:
        if name not in fields:
            raise UserError(f"{where}: {prefix}{name}: unknown key{_suggest(str(name), cls, prefix)}")
    values = {}
    for name, field in fields.items():
        dotted = prefix + name
        if name in tree:
            values[name] = _convert(hints[name], tree[name], where=where, dotted=dotted)
            _check_bounds(values[name], field.metadata, f"{where}: {dotted}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {dotted}: missing; it means: {field.metadata['help']}")
    return cls(**values)


@cache
def field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _suggest(name: str, cls: type, prefix: str) -> str:
    """A key of exactly that name in another block of any stage, else the nearest of this block."""
    of_stage = {verb: dotted_keys(stage) for verb, stage in STAGES.items()}
    known = {dotted for keys in of_stage.values() for dotted in keys}
    if owners := [verb for verb, keys in of_stage.items() if prefix + name in keys]:
        return f"; it belongs to `gpt {owners[0]}`"
    for dotted in sorted(known):
        if dotted.endswith("." + name):
            return f"; did you mean {dotted!r}?"
    if hint := nearest(name, list(field_types(cls))):
        return hint
    return nearest(prefix + name, sorted(known)) or f"; known here: {', '.join(field_types(cls))}"


def dotted_keys(cls: type, prefix: str = "") -> list[str]:
    out = []
    for name, hint in field_types(cls).items():
        out.append(prefix + name)
        for arm in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(arm):
                out += dotted_keys(typing.cast(type, arm), f"{prefix}{name}.")
    return out


def _convert(hint: Any, value: Any, *, where: str, dotted: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    complaint = UserError(f"{where}: {dotted}: expected {describe(hint)}, not {_kind(value)}")
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where=where, prefix=dotted + ".")
    if origin is Literal:
        if value is None and "none" in args:
            return "none"
        if value not in args:
            raise UserError(f"{where}: {dotted}: {value!r} is none of {', '.join(map(str, args))}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, complaint, where=where, dotted=dotted)
    if origin is list:
        items = value if isinstance(value, list) else [] if value is None else [value]  # null: none, as elsewhere
        return [_convert(args[0], v, where=where, dotted=f"{dotted}[{i}]") for i, v in enumerate(items)]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise complaint
        pairs = enumerate(zip(args, value, strict=True))
        return tuple(_convert(a, v, where=where, dotted=f"{dotted}[{i}]") for i, (a, v) in pairs)
    if origin is dict:
        if not isinstance(value, dict):
            raise complaint
        return {str(k): _convert(args[1], v, where=where, dotted=f"{dotted}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, complaint)


def _convert_union(args: tuple[Any, ...], value: Any, complaint: UserError, *, where: str, dotted: str) -> Any:
    if value is None:
        if type(None) in args:
            return None
        if not any(typing.get_origin(arm) is Literal and "none" in typing.get_args(arm) for arm in args):
            raise complaint
    for arm in args:
        if arm is type(None):
            continue
        if dataclasses.is_dataclass(arm) and isinstance(value, dict):
            return build(typing.cast(type, arm), value, where=where, prefix=dotted + ".")
        try:
            return _convert(arm, value, where=where, dotted=dotted)
        except UserError as error:
            if len([a for a in args if a is not type(None)]) == 1:
                raise error
    raise complaint


def _convert_scalar(kind: type, value: Any, complaint: UserError) -> Any:
    """YAML reads 6e-4 as a string and 300e9 too: the field's type decides."""
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value) if not isinstance(value, int) else value
        except ValueError:
            raise complaint from None
        if number != number or abs(number) == float("inf"):
            raise complaint
        if kind is float:
            return float(number)
        if number == int(number):
            return int(number)
    raise complaint


def _check_bounds(value: Any, checks: typing.Mapping[str, Any], place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    tests = {"ge": value.__ge__, "gt": value.__gt__, "le": value.__le__, "lt": value.__lt__}
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for name, test in tests.items():
        if name in checks and not test(checks[name]):
            raise UserError(f"{place}: must be {words[name]} {checks[name]}, not {value}")


def describe(hint: Any) -> str:
    """A type in a user's words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args if a is not type(None))
    if origin is list:
        return f"a list of {describe(args[0])}"
    if origin is tuple:
        return f"[{', '.join(describe(a) for a in args)}]"
    if origin is dict:
        return f"a mapping to {describe(args[1])}"
    if dataclasses.is_dataclass(hint):
        return "a block of keys"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else repr(value)


def to_tree(value: Any) -> Any:
    """Plain data that YAML and JSON can hold; the inverse of `build`. What is empty by default and still is, is left
    out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: to_tree(v) for f, v in pairs if v not in (None, {}, []) or v != _default(f)}
    if isinstance(value, (list, tuple)):
        return [to_tree(v) for v in value]
    if isinstance(value, dict):
        return {k: to_tree(v) for k, v in value.items()}
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


class _Dumper(yaml.SafeDumper):
    """Quotes the line breaks that YAML would fold away."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_recipe(recipe: Recipe) -> str:
    return yaml.dump(to_tree(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
