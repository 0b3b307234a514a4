"""What `gpt rlhf-reward` and `gpt rlhf-dpo` share: comparisons read, encoded, and split into train and held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptcli.config.schema import Recipe
from gptcli.data.examples import Example, open_examples, report_skipped
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.rlhf.preferences import Comparison, encode_preference, length_accuracy, parse_preference


@dataclass(frozen=True)
class Preferences:
    train: list[Comparison]
    held_out: list[Comparison]

    @property
    def most(self) -> int:
        """Responses of the comparison that has the most."""
        return max(len(c.responses) for c in self.train + self.held_out)

    @property
    def longer_wins(self) -> bool:
        return length_accuracy(self.train) >= 0.5

    def length_baseline(self) -> dict[str, float]:
        """What a reward must beat on the held-out: length alone, in the direction that train prefers. Of people's
        choices it can be the shorter answer, and a baseline below chance would flatter every reward."""
        longer = length_accuracy(self.held_out)
        return {"val_length_accuracy": longer if self.longer_wins else 1 - longer}


def read_preferences(recipe: Recipe, engine: Engine, say: Callable[[str], None]) -> Preferences:
    """Raises UserError, file and line, for a bad line, unless data.skip_bad leaves it out."""
    tokenizer, limit = engine.require_tokenizer(), recipe.train.seq_len or engine.model.config.context_length

    def parse(row: dict[str, Any]) -> Comparison:
        return encode_preference(parse_preference(row), tokenizer, engine.encode_prompt, limit)

    examples = open_examples(recipe.data, parse)
    report_skipped(examples.skipped, say)
    train, held_out = _with_pairs(examples.train), _with_pairs(examples.val)
    if not train:
        raise UserError("data: nothing to train on: wherever answers are compared, all are tied")
    if tied := len(examples.train) + len(examples.val) - len(train) - len(held_out):
        say(f"{tied:,} comparisons whose answers are all tied are passed over: they prefer nothing")
    found = Preferences(train, held_out)
    if cut := sum(comparison.cut for comparison in train + held_out):
        say(f"{cut:,} prompts have lost their beginning: with an answer they are more than {limit} tokens")
    longer = length_accuracy(found.train)
    say(
        f"{len(found.train):,} comparisons and {len(found.held_out):,} held out; the "
        f"{'longer' if found.longer_wins else 'shorter'} answer is the better one in {max(longer, 1 - longer):.0%}"
    )
    return found


def _with_pairs(examples: list[Example[Comparison]]) -> list[Comparison]:
    return [example.value for example in examples if example.value.pairs]
