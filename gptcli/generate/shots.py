"""Prompting without training: a template around the user's text, an instruction and solved examples before it, as
GPT-2 and GPT-3 were used zero-, one- and few-shot (Brown et al. 2020, figure 2.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcli.config.keys import key
from gptcli.config.load import build, read_yaml
from gptcli.data.examples import ExampleReader
from gptcli.errors import UserError, nearest
from gptcli.randomness import Permutation, derive

FOLDER = Path(__file__).parent / "templates"
DEFAULT = "arrow"
PAIRS = (("prompt", "response"), ("input", "output"), ("text", "label"), ("question", "answer"))


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How a text becomes a prompt. {input} is the text, {output} an example's answer, other names are variables."""

    about: str = key(..., "what it is for, in a line")
    prompt: str = key(..., "what the model continues")
    response: str = key(" {output}", "how an example's answer follows")
    instruction: str = key("", "comes first, once")
    separator: str = key("\n\n", "after the instruction and after each example")
    stop: list[str] = key([], "ends the answer")
    variables: dict[str, str] = key({}, "names in curly braces and what they stand for where nobody says")


@dataclass(frozen=True)
class Shot:
    """A solved example."""

    input: str
    output: str


def template_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_template(name: str) -> PromptTemplate:
    """A shipped template by its name, or a file of the same kind."""
    path = Path(name)
    if not path.is_file():
        path = FOLDER / f"{name}.yaml"
        if name not in template_names():
            hint = nearest(name, template_names()) or f"; known: {', '.join(template_names())}"
            raise UserError(f"--template {name}: no such template or file{hint}")
    return build(PromptTemplate, read_yaml(path), where=path.name)


def read_shots(path: str) -> list[Shot]:
    """The solved examples of a file. Raises UserError, FILE:LINE: reason, for one that is none."""
    shots = [example.value for example in ExampleReader([path], _parse_shot)]
    if not shots:
        raise UserError(f"{path}: holds no examples")
    return shots


def _parse_shot(row: dict[str, Any]) -> Shot:
    for pair in PAIRS:
        if all(name in row for name in pair):
            texts = [row[name] for name in pair]
            if not all(isinstance(text, (str, int, float)) for text in texts):
                raise UserError(f"{pair[0]}, {pair[1]}: expected text")
            return Shot(*map(str, texts))
    known = " or ".join(f"{a} and {b}" for a, b in PAIRS)
    raise UserError(f"an example has {known}; this has {', '.join(row) or 'nothing'}")


def draw_shots(shots: Sequence[Shot], k: int | None, seed: int, *ids: int) -> list[Shot]:
    """k of the examples in a random order that (seed, ids) decide; None: all, as they stand."""
    if k is None:
        return list(shots)
    if k > len(shots):
        raise UserError(f"--k {k}: there are only {len(shots)} examples")
    order = Permutation(len(shots), derive(seed, "shots", *ids))[np.arange(k)]
    return [shots[int(i)] for i in order]


@dataclass(frozen=True)
class Prompter:
    """Writes prompts: instruction, examples, then the text, each in the template's words."""

    template: PromptTemplate
    shots: Sequence[Shot] = ()
    instruction: str | None = None  # in place of the template's
    variables: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for name in self.variables or {}:
            if name not in self.template.variables:
                known = ", ".join(self.template.variables) or "none"
                raise UserError(f"--var {name}: not a variable of this template; it has {known}")

    def __call__(self, text: str) -> str:
        t = self.template
        instruction = t.instruction if self.instruction is None else self.instruction
        parts = [self._filled(instruction)] if instruction else []
        parts += [self._filled(t.prompt + t.response, input=s.input, output=s.output) for s in self.shots]
        return t.separator.join([*parts, self._filled(t.prompt, input=text)])

    def _filled(self, words: str, **texts: str) -> str:
        """Every {name} replaced at once, so that braces in a text stay what they are."""
        values = {**self.template.variables, **(self.variables or {}), **texts}

        def value(match: re.Match[str]) -> str:
            return values.get(match[1], match[0])

        return re.sub(r"\{(\w+)\}", value, words)
