"""How a recipe key is declared."""

from __future__ import annotations

import dataclasses
from typing import Any


def key(default: Any, help: str, **checks: Any) -> Any:
    """A recipe key. `checks` may hold `ge`, `gt`, `le`, `lt`: bounds that loading enforces."""
    metadata = {"help": help, **checks}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
