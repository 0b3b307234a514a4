"""What the tour trains on, out of the standard library: functions, and the same with one token damaged.

    python functions.py ../quickstart

writes these files, and each again as NAME-val.jsonl with what comes from the files that the run held out, which no
model of the tour has ever seen:

    functions.jsonl   {"prompt", "response"}             a head with the first line of its docstring; its body
    prompts.jsonl     {"id", "prompt"}                   the same heads, to write bodies for
    damaged.jsonl     {"prompt", "chosen", "rejected"}   the real body; the same with one random token edited

A token is one of the run's own BPE. To damage, functions without a docstring do as well: there are more of them.
"""

from __future__ import annotations

import argparse
import ast
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward import does_something, parse

import gptcli
from gptcli.config.load import load_recipe
from gptcli.data.prepare import corpus_of
from gptcli.randomness import derive
from gptcli.tokenizer import Tokenizer

Row = dict[str, Any]
ATTEMPTS = 50  # random edits that are tried before a body is given up
HELD_OUT_TIMES = 4


@dataclass(frozen=True)
class Function:
    prompt: str
    response: str
    is_documented: bool


# ---- functions ------------------------------------------------------------------------------------------------


def functions_of(source: str) -> Iterator[Function]:
    """The functions and methods of a file that do anything, without decorators, moved to the left margin."""
    tree, lines = parse(source), lines_of(source)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = cut(textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])))
            if function is not None:
                yield function


def cut(code: str) -> Function | None:
    """A function's code in two, of its docstring only the first line; None where no line's end parts head and body."""
    tree = parse(code)
    if tree is None or not isinstance(node := tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    lines, documentation = lines_of(code), ast.get_docstring(node)
    if documentation is None:
        head_end = body_start = min(first_lines(node.body[0])) - 1
        prompt = "".join(lines[:head_end])
    else:
        head_end, body_start = node.body[0].lineno - 1, node.body[0].end_lineno
        indent = " " * node.body[0].col_offset
        prompt = "".join(lines[:head_end]) + f'{indent}"""{documentation.partition(chr(10))[0]}"""\n'
    response = "".join(lines[body_start:]).rstrip()
    is_whole = parse(f"{prompt}{' ' * node.body[0].col_offset}pass") is not None
    if not is_whole or not does_something(prompt + response):
        return None
    return Function(prompt, response, documentation is not None)


def lines_of(code: str) -> list[str]:
    """As Python counts them: str.splitlines would end one at a form feed too."""
    return [f"{line}\n" for line in code.split("\n")]


def first_lines(statement: ast.stmt) -> list[int]:
    return [statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", []))]


def all_functions(run: Path) -> dict[str, list[Function]]:
    """Each function once, of the files that a run was trained on and of those that it held out; of the latter none that
    the former have too, and none with a head that they have."""
    found: dict[str, dict[Function, None]] = {"train": {}, "val": {}}
    for split, source in corpus_of(load_recipe(str(run / "recipe.yaml")).data).parts():
        found[split].update(dict.fromkeys(functions_of(source)))
    heads = {f.prompt for f in found["train"] if f.is_documented}
    return {
        "train": list(found["train"]),
        "val": [f for f in found["val"] if f not in found["train"] and f.prompt not in heads],
    }


# ---- damage ---------------------------------------------------------------------------------------------------


def damage(text: str, tokenizer: Tokenizer, seed: int, *ids: int) -> str | None:
    """The text with one random token in the place of another. Where the new text would be read as other tokens than
    these, and so differ in more than one, another edit is drawn."""
    tokens = tokenizer.encode(text)
    for attempt in range(ATTEMPTS):
        place = derive(seed, "damaged place", *ids, attempt) % len(tokens)
        token = derive(seed, "damage", *ids, attempt) % tokenizer.vocab_size
        edited = [*tokens[:place], token, *tokens[place + 1 :]]
        if edited != tokens and tokenizer.encode(damaged := tokenizer.decode(edited)) == edited:
            return damaged
    return None


def damaged_rows(functions: Sequence[Function], tokenizer: Tokenizer, seed: int, count: int) -> Iterator[Row]:
    """`count` pairs of each function; "right" is the place of the real body, for `gpt eval`."""
    for number, function in enumerate(functions):
        draws = (damage(function.response, tokenizer, seed, number, i) for i in range(count))
        for rejected in dict.fromkeys(text for text in draws if text is not None and text.strip()):
            yield {"prompt": function.prompt, "chosen": function.response, "rejected": rejected, "right": 0}


# ---- files ----------------------------------------------------------------------------------------------------


def write(run: Path, seed: int, longest: int) -> None:
    """Into the current folder. Held-out functions are few, so each serves several times."""
    tokenizer = gptcli.load(run).tokenizer
    for split, everything in all_functions(run).items():
        suffix, times = ("", 1) if split == "train" else ("-val", HELD_OUT_TIMES)
        functions = [f for f in everything if len(tokenizer.encode(f.prompt + f.response)) <= longest]
        documented = [f for f in functions if f.is_documented]
        prompts = [{"id": f"{i}.{k}", "prompt": f.prompt} for i, f in enumerate(documented) for k in range(times)]
        save(f"functions{suffix}.jsonl", [{"prompt": f.prompt, "response": f.response} for f in documented])
        save(f"prompts{suffix}.jsonl", prompts)
        save(f"damaged{suffix}.jsonl", list(damaged_rows(functions, tokenizer, seed, times)))


def save(name: str, rows: Sequence[Row]) -> None:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    print(f"{name}: {len(rows):,} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("run", type=Path, help="whose files are read, and whose tokens are counted and edited")
    parser.add_argument("--seed", type=int, default=1, help="of the damage")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest function that is taken")
    options = parser.parse_args()
    write(options.run, options.seed, options.longest)


if __name__ == "__main__":
    main()
