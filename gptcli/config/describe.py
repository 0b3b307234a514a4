"""The recipe schema for people (lines) and for editors (JSON Schema)."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, Union

from gptcli.config.load import describe, field_types
from gptcli.config.schema import STAGES

BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def key_lines(cls: type, prefix: str = "") -> list[str]:
    """`key: type = default    meaning`, blocks in order."""
    out = []
    for field in dataclasses.fields(cls):
        hint = field_types(cls)[field.name]
        block = _block_of(hint)
        out.append(f"{prefix}{field.name}: {describe(hint)}{_default_words(field, block)}  # {field.metadata['help']}")
        if block is not None:
            out += key_lines(block, f"{prefix}{field.name}.")
    return out


def json_schema(cls: type) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "gptcli recipe",
        **_object(cls),
    }


def _object(cls: type) -> dict[str, Any]:
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        schema = _type(field_types(cls)[field.name])
        schema["description"] = field.metadata["help"]
        schema |= {BOUNDS[k]: v for k, v in field.metadata.items() if k in BOUNDS}
        if isinstance(field.default, (str, int, float, bool)):
            schema["default"] = field.default
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            required.append(field.name)
        properties[field.name] = schema
    if stages := [name for name, stage in STAGES.items() if stage is cls]:
        properties["stage"] = {"enum": stages, "description": properties["stage"]["description"]}
    out: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return out | ({"required": required} if required else {})


def _type(hint: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast(type, hint))
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(arm) for arm in args]}
    if origin is list:  # one item may stand for a list of one
        return {"anyOf": [{"type": "array", "items": _type(args[0])}, _type(args[0])]}
    if origin is tuple:
        return {
            "type": "array",
            "prefixItems": [_type(a) for a in args],
            "minItems": len(args),
            "maxItems": len(args),
        }
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(args[1])}
    if hint is type(None):
        return {"type": "null"}
    # numbers may be written as 300e9, which YAML reads as text
    types_of = {int: ["integer", "string"], float: ["number", "string"], bool: "boolean"}
    return {"type": types_of.get(hint, ["string", "number"])}


def _block_of(hint: Any) -> type | None:
    for arm in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(arm):
            return typing.cast(type, arm)
    return None


def _default_words(field: dataclasses.Field[Any], block: type | None) -> str:
    if block is not None:
        return ""
    if field.default is not dataclasses.MISSING:
        return "" if field.default is None else f" = {field.default}"
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return f" = {value}" if value else ""
    return " (required)"
