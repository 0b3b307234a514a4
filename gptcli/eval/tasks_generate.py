"""Tasks that are answered in writing, greedily."""

from __future__ import annotations

from gptcli.eval.task import Row, Shape, Task, answer_item
from gptcli.eval.textmetrics import BLEU, EXACT_MATCH, NUMBER, ROUGE


def answers_of(row: Row) -> list[str]:
    """A data set's column of right answers: a list, a text, or TriviaQA's block with its aliases."""
    found = row["answers"] if "answers" in row else row["answer"]
    if isinstance(found, dict):
        found = found["aliases"]
    return [found] if isinstance(found, str) else list(found)


def closed_book(name: str, about: str, data: str, published: str, prompt: str, separator: str, column: str) -> Task:
    def item(row: Row):
        return answer_item(prompt.format(row["question"].rstrip("?")), answers_of(row))

    columns = [("question", column), ("question", "answers" if column == "answer" else "answer")]
    return Task(
        name, about, "generate", tuple(Shape(c, item) for c in columns), data, f"{data.rsplit(':', 1)[0]}:train",
        published=published, separator=separator, until=("\n", ".", ","), metric=EXACT_MATCH, max_new_tokens=32,
    )  # fmt: skip


QA, Q = "Question: {}?\nAnswer:", "Q: {}?\nA:"
TASKS = [
    Task(
        "gsm8k", "grade-school mathematics: the number after ####, or the last one (flexible)", "generate",
        (
            Shape(
                ("question", "answer"),
                lambda row: answer_item(f"Question: {row['question']}\nAnswer:", [row["answer"]]),
            ),
        ),
        "hf:openai/gsm8k:main:test", "hf:openai/gsm8k:main:train", num_fewshot=5, until=("Question:",), metric=NUMBER,
        published="exact_match: GPT-2 about 0; GPT-3 175B fine-tuned about .33 (Cobbe et al. 2021)",
    ),
    closed_book(
        "triviaqa", "closed-book questions", "hf:mandarjoshi/trivia_qa:rc.nocontext:validation",
        "exact_match: GPT-3 175B .643 zero-shot, .712 with 64 examples (paper)", QA, "\n\n", "answer",
    ),
    closed_book(
        "nq_open", "closed-book questions that people asked a search engine",
        "hf:google-research-datasets/nq_open::validation",
        "exact_match: GPT-3 175B .146 zero-shot, .299 with 64 examples (paper)", Q, "\n", "answer",
    ),
    closed_book(
        "webqs", "closed-book questions about facts in Freebase", "hf:stanfordnlp/web_questions::test",
        "exact_match: GPT-3 175B .144 zero-shot, .415 with 64 examples (paper)", QA, "\n\n", "answers",
    ),
    Task(
        "translation", "a JSONL of one's own: sacreBLEU and chrF", "generate",
        (Shape(("source", "target"), lambda row: answer_item(f"{row['source']} =", [row["target"]])),),
        separator="\n", until=("\n",), metric=BLEU,
        published="bleu: GPT-2 1558M 5 English to French, 11.5 back (paper, WMT-14)",
    ),
    Task(
        "summarization", "a JSONL of one's own: ROUGE of what follows TL;DR:", "generate",
        (Shape(("text", "summary"), lambda row: answer_item(f"{row['text']}\nTL;DR:", [row["summary"]])),),
        until=("\n",), max_new_tokens=100, metric=ROUGE,
        published="rouge1/rouge2/rougeL: GPT-2 1558M 29.34/8.27/26.58 (paper, CNN and Daily Mail)",
    ),
]  # fmt: skip
