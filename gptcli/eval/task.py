"""What a task is: rows become items, items become requests, and answers become figures by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptcli.eval.results import Aggregate

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question.

    pairs: (context, continuation) of each choice, of which `gold` is right; the only one where a word is asked for; the
    context alone where text is. choices: as they count for a normalisation by length. solved: the item as an example
    of itself, answer and all. references: texts that are right. words, bytes: what a text's likelihood is spread over.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    choices: tuple[str, ...] = ()
    solved: str = ""
    references: tuple[str, ...] = ()
    words: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Shape:
    """Rows with these columns, and how one becomes an item. `make` may raise what reading a row raises."""

    columns: tuple[str, ...]
    make: Callable[[Row], Item]


@dataclass(frozen=True)
class TextMetric:
    """Of a generated text. each: its figures by name, given the references. corpus: figures of all texts together,
    which are no means. extra: what must be installed for it."""

    each: Callable[[str, Sequence[str]], dict[str, float]]
    corpus: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]] | None = None


Kind = Literal["choice", "word", "last_token", "text", "generate"]

METRICS: dict[Kind, dict[str, Aggregate]] = {
    "choice": {"acc": Aggregate("acc"), "acc_norm": Aggregate("acc_norm")},
    "word": {"acc": Aggregate("acc"), "perplexity": Aggregate("nll", then="exp")},
    "last_token": {"acc": Aggregate("acc"), "perplexity": Aggregate("nll", then="exp")},
    "text": {
        "word_perplexity": Aggregate("nll", over="words", then="exp"),
        "byte_perplexity": Aggregate("nll", over="bytes", then="exp"),
        "bits_per_byte": Aggregate("nll", over="bytes", then="bits"),
    },
}


@dataclass(frozen=True)
class Task:
    """A task by name.

    kind: choice (the likeliest continuation), word (is the continuation what the model would say?), last_token (the
    same of its last token alone), text (how likely is the whole), generate. shapes: what rows may look like. data:
    where they are, as hf:NAME[:CONFIG][:SPLIT] or a file; groups: its configs or files, each a part of the task.
    examples: the same for k-shot. published: figures to reproduce, and whose.
    """

    name: str
    about: str
    kind: Kind
    shapes: tuple[Shape, ...]
    data: str | None = None
    examples: str | None = None
    groups: tuple[str, ...] = ()
    published: str = ""
    num_fewshot: int = 0
    separator: str = "\n\n"
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    metric: TextMetric | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Where the rows of each group are; one group without a name where there is but one."""
        if self.data is None:
            return {}
        return {g: self.data.format(group=g) for g in self.groups} if self.groups else {"": self.data}


def choice_item(context: str, choices: Sequence[str], gold: int, delimiter: str = " ") -> Item:
    """The choices follow one context."""
    if not 0 <= gold < len(choices):
        raise ValueError(f"the right choice is number {gold} of {len(choices)}")
    pairs = tuple((context, delimiter + choice) for choice in choices)
    return Item(pairs, gold, tuple(choices), solved="".join(pairs[gold]))


def word_item(context: str, word: str) -> Item:
    return Item(((context, " " + word),), solved=f"{context} {word}")


def answer_item(context: str, answers: Sequence[str]) -> Item:
    """A text is to be written; `answers` are right, the first serves as example."""
    if not answers:
        raise ValueError("there is no right answer")
    return Item(((context, ""),), references=tuple(answers), solved=f"{context} {answers[0]}")
