"""Words found in a text."""

from __future__ import annotations

import pytest

from gptcli.errors import UserError
from gptcli.inspect.tokens import find_word
from gptcli.tokenizer.build import byte_tokenizer


@pytest.mark.parametrize(
    ("text", "word", "end"),
    [
        ("the cat, the cats", "cat", "the cat"),  # a whole word before a part of one
        ("the cat, the cat", "cat", "the cat, the cat"),  # the last of several
        ("concatenate", "cat", "concat"),
        ("你好吗", "好", "你好"),
        ("a.b a.b", "a.b", "a.b a.b"),
    ],
)
def test_find_word_gives_the_token_that_completes_it(text: str, word: str, end: str) -> None:
    tokenizer = byte_tokenizer()
    assert find_word(tokenizer, tokenizer.encode(text), word) == len(tokenizer.encode(end)) - 1


def test_a_word_that_is_not_there() -> None:
    tokenizer = byte_tokenizer()
    for word in ("dog", ""):
        with pytest.raises(UserError, match="is not in the text 'the cat'"):
            find_word(tokenizer, tokenizer.encode("the cat"), word)
