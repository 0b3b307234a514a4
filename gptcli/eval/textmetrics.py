"""How good a written answer is."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from gptcli.errors import UserError
from gptcli.eval.task import TextMetric

PUNCTUATION = str.maketrans("", "", string.punctuation)
STATED = re.compile(r"#### (-?[0-9.,]+)")
NUMBERS = re.compile(r"-?\$?[0-9][0-9.,]*")


def normal_answer(text: str) -> str:
    """Case, punctuation and white space make no difference."""
    return " ".join(text.lower().translate(PUNCTUATION).split())


def exact_match(text: str, references: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(normal_answer(text) in map(normal_answer, references))}


def number_match(text: str, references: Sequence[str]) -> dict[str, float]:
    """exact_match: the number stated after ####; flexible: the last number of the text."""
    right = {plain_number(found) for reference in references for found in STATED.findall(reference) or [reference]}
    stated, numbers = STATED.search(text), NUMBERS.findall(text)
    return {
        "exact_match": float(stated is not None and plain_number(stated[1]) in right),
        "flexible": float(bool(numbers) and plain_number(numbers[-1]) in right),
    }


def plain_number(text: str) -> str:
    return re.sub(r"[,$\s]", "", text).removesuffix(".")


def sentence_bleu(text: str, references: Sequence[str]) -> dict[str, float]:
    return {"sentence_bleu": _sacrebleu().sentence_bleu(text.strip(), list(references)).score}


def corpus_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """sacreBLEU and chrF with their default settings; items may have different numbers of references."""
    most = max(map(len, references))
    columns = [[(list(r) + [None] * most)[i] for r in references] for i in range(most)]
    stripped, sacrebleu = [text.strip() for text in texts], _sacrebleu()
    return {
        "bleu": sacrebleu.corpus_bleu(stripped, columns).score,
        "chrf": sacrebleu.corpus_chrf(stripped, columns).score,
    }


def rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """F1, in percent, against the reference that it is best of."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("rouge-score") from None
    kinds = ["rouge1", "rouge2", "rougeL"]
    scored = [RougeScorer(kinds, use_stemmer=True).score(reference, text) for reference in references]
    return {kind: 100 * max(score[kind].fmeasure for score in scored) for kind in kinds}


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise _missing("sacrebleu") from None
    return sacrebleu


def _missing(package: str) -> UserError:
    return UserError(f"this task needs {package}: pip install 'gptcli[eval]'")


EXACT_MATCH = TextMetric(exact_match)
NUMBER = TextMetric(number_match)
BLEU = TextMetric(sentence_bleu, corpus_bleu)
ROUGE = TextMetric(rouge)
BY_NAME = {"exact_match": EXACT_MATCH, "number": NUMBER, "bleu": BLEU, "rouge": ROUGE}
