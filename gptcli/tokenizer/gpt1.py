"""What GPT-1 does to text before its BPE: mend it, set punctuation apart, split it into words, lower their case.

ftfy mends and spaCy splits; both are optional (`pip install 'gptcli[gpt1]'`) and imported at the first text.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable

from gptcli.errors import UserError

WITH_SPACY, WITHOUT_SPACY = "gpt1", "gpt1-basic"

# Dashes, the ellipsis and the acute accent (an apostrophe, in books) become what a keyboard has.
PLAIN = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
# A run of one of these marks is a word of its own. Full stops, colons and apostrophes are left to spaCy.
RUN_OF_A_MARK = re.compile(r"""([-~!?;,"+*/\\|_(){}\[\]])\1*""")
WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


def at_hand() -> str:
    """The normalizer that this machine can follow: the original's where spaCy is installed."""
    return WITH_SPACY if importlib.util.find_spec("spacy") else WITHOUT_SPACY


def normalize(text: str) -> str:
    """The words that GPT-1's BPE gets, between single spaces; lines stay apart, by a word that is a newline."""
    return _normalize(text, _spacy_words())


def normalize_without_spacy(text: str) -> str:
    """The same with words split at anything that is no letter or digit, where spaCy knows "don't" and "U.S."."""
    return _normalize(text, WORD_OR_MARK.findall)


# Which of the two made a vocabulary's tokens belongs to the tokenizer: ids must not hang on what is installed.
NORMALIZERS: dict[str, Callable[[str], str]] = {WITH_SPACY: normalize, WITHOUT_SPACY: normalize_without_spacy}


def _normalize(text: str, words: Callable[[str], Iterable[str]]) -> str:
    text = RUN_OF_A_MARK.sub(r" \g<0> ", _fix_text()(text).translate(PLAIN))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return " \n ".join(" ".join(word.lower() for word in words(line)) for line in lines if line)


@functools.cache
def _fix_text() -> Callable[[str], str]:
    try:
        import ftfy
    except ImportError:
        raise _missing("ftfy") from None
    return ftfy.fix_text


@functools.cache
def _spacy_words() -> Callable[[str], list[str]]:
    try:
        from spacy.lang.en import English
    except ImportError:
        raise _missing("spaCy") from None
    tokenizer = English().tokenizer
    return lambda line: [token.text for token in tokenizer(line)]


def _missing(what: str) -> UserError:
    return UserError(f"GPT-1's tokenizer reads text through {what}, which is not installed: pip install 'gptcli[gpt1]'")
