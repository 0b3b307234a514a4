"""The tour's verifiable reward: does prompt + response parse as Python, and does it do anything?

gpt rlhf-ppo ... -s reward.function=data/tour/reward.py:score
"""

from __future__ import annotations

import ast
import warnings


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for each function that parses and holds a statement that is no comment, string or `pass`, else 0."""
    return [float(does_something(prompt + response)) for prompt, response in zip(prompts, responses, strict=True)]


def does_something(code: str) -> bool:
    """A `def`, an `if` or a `try` is only the place of other statements; a comment is none at all."""
    tree = parse(code)
    return tree is not None and any(
        isinstance(node, ast.stmt) and not hasattr(node, "body") and not is_idle(node) for node in ast.walk(tree)
    )


def parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d" and `x is 1`, which do parse
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null byte; the last two: too deep
        return None


def is_idle(statement: ast.stmt) -> bool:
    """`pass`, and constants that stand alone: strings, numbers, `...`."""
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
