"""Tasks that are asked of text itself: its last word, or all of it."""

from __future__ import annotations

import re

from gptcli.eval.task import Item, Row, Shape, Task, word_item

# What undoes the Penn Treebank's spacing in WikiText as the harness does it, in this order: plain text and its
# replacement, then the space inside brackets and quotation marks, then plain text again.
MARKS = [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *((f" {m} ", f"{m} ") for m in ":;.!?,")]
LEFTOVERS = [
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "),
    (" 's", "'s"),
]  # fmt: skip


def detokenize(text: str) -> str:
    for old, new in MARKS:
        text = text.replace(old, new)
    for opening, closing in ("()", "[]", "{}", '""', "''"):
        inside = rf"\{opening}\s*([^{re.escape(closing)}]*?)\s*\{closing}"
        text = re.sub(inside, rf"{opening}\1{closing}", text)
    for old, new in LEFTOVERS:
        text = text.replace(old, new)
    return text


def wikitext(page: str) -> Item:
    """The detokenized page; its words and bytes are counted before that."""
    return Item(((detokenize(page), ""),), words=len(re.split(r"\s+", page)), bytes=len(page.encode()))


def lambada(row: Row) -> Item:
    before, word = row["text"].rsplit(" ", 1)
    return word_item(before, word)


LAMBADA = (
    Shape(("text",), lambada),
    Shape(("context", "continuation"), lambda row: word_item(row["context"], row["continuation"])),
)
LAMBADA_DATA = "hf:EleutherAI/lambada_openai:default:test"
LAST_WORD = "the last word of a passage: every token of it, perplexity per word (the harness's lambada_openai)"
PAPERS = "GPT-3 .427 (S) to .762 (175B), zero-shot"

TASKS = [
    *(
        Task(
            name, LAST_WORD, "word", LAMBADA, LAMBADA_DATA,
            published=f"acc/perplexity: GPT-2 124M .3256/40.06, 1558M perplexity 10.63 (harness); {PAPERS}",
        )
        for name in ("lambada", "lambada_openai")
    ),
    Task(
        "lambada_gpt2", "the last token of a passage, as OpenAI seems to have counted for GPT-2", "last_token",
        LAMBADA, LAMBADA_DATA, published="acc/perplexity: GPT-2 124M .4599/35.13, 1558M .6324/8.63 (paper); "
        "124M acc .4667 reproduced",
    ),
    Task(
        "wikitext", "WikiText-2, detokenized, a page at a time: perplexity per word and byte, disjoint windows", "text",
        (
            Shape(("page",), lambda row: wikitext(row["page"])),
            Shape(("text",), lambda row: wikitext(row["text"])),
        ),
        "hf:EleutherAI/wikitext_document_level:wikitext-2-raw-v1:test",
        published="word_perplexity: GPT-2 124M 37.37 (harness)",
    ),
]  # fmt: skip
