"""GPT-1's transforms: rows, labels, cuts, and what is said of examples that do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.schema import FinetuneBlock
from gptcli.contracts import IGNORE_INDEX
from gptcli.data.taskrows import TaskEncoder, TaskRows
from gptcli.data.tasks import SPECIAL_TOKENS, Task, check_label, label_text, make_task, parse_example, part_budget
from gptcli.errors import UserError
from gptcli.tokenizer.build import byte_tokenizer

TOKENIZER = byte_tokenizer().with_tokens(SPECIAL_TOKENS)
S, D, E = (TOKENIZER.backend.token_to_id(token) for token in SPECIAL_TOKENS)
ROWS = {
    "classification": {"text": "ab", "label": "x"},
    "entailment": {"premise": "ab", "hypothesis": "c", "label": "x"},
    "similarity": {"text_a": "ab", "text_b": "c", "label": 1},
    "multiple_choice": {"context": "ab", "question": "q", "choices": ["c", "de"], "label": 1},
}


def encode(task: Task, row: dict, context: int = 32) -> TaskRows | UserError:
    return TaskEncoder(task, TOKENIZER, context).encode([task.parse(row)])[0]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("classification", [[S, *b"ab", E]]),
        ("entailment", [[S, *b"ab", D, *b"c", E]]),
        ("similarity", [[S, *b"ab", D, *b"c", E], [S, *b"c", D, *b"ab", E]]),
        ("multiple_choice", [[S, *b"ab q", D, *b"c", E], [S, *b"ab q", D, *b"de", E]]),
    ],
)
def test_transforms_are_gpt1s(task: str, expected: list[list[int]]) -> None:
    assert encode(Task(task), ROWS[task]).rows == expected


def test_text_that_spells_a_special_token_is_text() -> None:
    rows = encode(Task("classification"), {"text": "<|extract|>"}, context=64).rows
    assert rows[0] == [S, *b"<|extract|>", E]


def test_the_new_tokens_come_after_the_old_ones_and_are_added_once() -> None:
    assert [S, D, E] == [257, 258, 259]
    assert TOKENIZER.with_tokens(SPECIAL_TOKENS).hash == TOKENIZER.hash


def test_parts_are_cut_to_the_papers_share() -> None:
    assert part_budget(512, 2) == 512 // 2 - 2
    assert part_budget(512, 1) == 510
    row = {"premise": "a" * 50, "hypothesis": "b" * 50}
    cut = encode(Task("entailment"), row, context=23)
    assert cut.rows == [[S, *b"a" * 10, D, *b"b" * 10, E]]
    assert cut.cut
    assert len(cut.rows[0]) == 23


def test_a_long_row_is_refused_where_it_may_not_be_cut() -> None:
    found = encode(Task("classification", truncate=False), {"text": "a" * 31})
    assert isinstance(found, UserError)
    assert "33 tokens is longer than the context of 32" in str(found)


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60), st.integers(8, 64))
def test_rows_always_fit(a: str, b: str, context: int) -> None:
    encoder = TaskEncoder(Task("similarity"), TOKENIZER, context)
    if not a.strip() or not b.strip():
        return
    encoded = encoder.encode([Task("similarity").parse({"text_a": a, "text_b": b})])[0]
    for row in encoded.rows:
        assert len(row) <= context
        assert (row[0], row[-1], row.count(D), row.count(E)) == (S, E, 1, 1)


def test_a_batch_has_segments_by_the_side_of_the_delimiter() -> None:
    task = Task("entailment", labels=("x", "y"))
    encoder = TaskEncoder(task, TOKENIZER, 32)
    items = encoder.encode([task.parse(ROWS["entailment"]), task.parse({"premise": "a", "hypothesis": "b"})])
    batch = encoder.batch(items, [[1.0, 0.0], [0.0, 1.0]], segments=True, lm=True)
    assert batch["segment_ids"][0].tolist() == [0, 0, 0, 0, 1, 1]  # S a b D | c E
    assert batch["segment_ids"][1, :5].tolist() == [0, 0, 0, 1, 1]
    assert batch["extract"].tolist() == [5, 4]
    assert batch["targets"][0].tolist() == [*b"ab", D, *b"c", E, IGNORE_INDEX]
    assert batch["targets"][1].tolist() == [*b"a", D, *b"b", E, IGNORE_INDEX, IGNORE_INDEX]
    assert (batch.weight, batch.tokens) == (2, 11)


def test_choices_may_be_different_in_number() -> None:
    task = Task("multiple_choice")
    encoder = TaskEncoder(task, TOKENIZER, 32)
    examples = [task.parse({**ROWS["multiple_choice"], "choices": list("abc")[:n]}) for n in (2, 3)]
    batch = encoder.batch(encoder.encode(examples), [[0, 1], [1, 0, 0]], segments=False, lm=True)
    assert batch["rows_of"].tolist() == [[0, 1, -1], [2, 3, 4]]
    assert torch.allclose(batch["row_weight"], torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]))


def test_scores_are_soft_labels_over_levels() -> None:
    block = FinetuneBlock(task="similarity", scores=True)
    rows = [{"text_a": "a", "text_b": "b", "label": s} for s in (0, 5, 3.8)]
    task = make_task(block, [parse_example("similarity", row) for row in rows], {})
    assert task.levels == (0, 1, 2, 3, 4, 5)
    target = task.target(task.parse(rows[2]))
    assert target == pytest.approx([0, 0, 0, 0.2, 0.8, 0])
    assert task.target(task.parse({**rows[0], "label": 9})) == [0, 0, 0, 0, 0, 1]
    assert task.truth(task.parse(rows[2])) == 3.8


@given(st.floats(-3, 7))
def test_the_expected_level_is_the_score(score: float) -> None:
    task = Task("similarity", levels=(-3.0, -1.0, 1.0, 3.0, 5.0, 7.0))
    target = task.target(task.parse({"text_a": "a", "text_b": "b", "label": score}))
    assert sum(target) == pytest.approx(1)
    assert sum(p * level for p, level in zip(target, task.levels, strict=True)) == pytest.approx(score, abs=1e-9)


def test_labels_are_those_of_the_data_in_order_and_survive_the_disk(tmp_path) -> None:
    examples = [parse_example("classification", {"text": "t", "label": label}) for label in (1, "b", 0, True, 1.0)]
    task = make_task(FinetuneBlock(task="classification"), examples, {"text": "sentence"})
    assert task.labels == ("0", "1", "b", "true")
    task.save(tmp_path)
    assert Task.load(tmp_path) == task
    assert task.parse({"sentence": "s"}).rows == (("s",),)


def test_label_text() -> None:
    assert [label_text(value) for value in ("x", 3, 3.0, 2.5, False)] == ["x", "3", "3", "2.5", "false"]


@pytest.mark.parametrize(
    ("task", "change", "complaint"),
    [
        ("classification", {"text": None}, "text: expected text, not null"),
        ("classification", {"text": "  "}, "text: is empty"),
        ("classification", {"label": None}, "label: is null"),
        ("entailment", {"premise": 3}, "premise: expected text, not 3"),
        ("multiple_choice", {"choices": ["a"]}, "choices: expected a list of two texts or more"),
        ("multiple_choice", {"choices": ["a", ""]}, r"choices\[1\]: is empty"),
    ],
)
def test_bad_examples_are_named(task: str, change: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_example(task, {**ROWS[task], **change})


def test_a_missing_column_gets_a_hint() -> None:
    with pytest.raises(UserError, match=r"no column 'text'; did you mean 'texts'. \(data.columns maps other names\)"):
        parse_example("classification", {"texts": "a", "label": "x"})


@pytest.mark.parametrize(
    ("block", "label", "complaint"),
    [
        (FinetuneBlock(task="classification", labels=["pos", "neg"]), "pso", "unknown label 'pso'; did you mean 'pos'"),
        (FinetuneBlock(task="classification"), ["pos"], "label: expected text or a number"),
        (FinetuneBlock(task="similarity", scores=True), "high", 'label: expected a number, not "high"'),
        (FinetuneBlock(task="multiple_choice"), 2, "number of the right choice, 0 to 1, not 2"),
    ],
)
def test_bad_labels_are_named(block: FinetuneBlock, label: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_label(block, parse_example(block.task, {**ROWS[block.task], "label": label}))


def test_a_held_out_label_that_training_never_saw() -> None:
    task = Task("classification", labels=("neg", "pos"))
    with pytest.raises(UserError, match="unknown label 'other'; known: neg, pos"):
        task.target(task.parse({"text": "t", "label": "other"}))


@pytest.mark.parametrize(
    ("block", "labels", "complaint"),
    [
        (FinetuneBlock(task="classification"), ["a", "a"], "every training example has the label 'a'"),
        (FinetuneBlock(task="classification", n_classes=2), ["a", "b", "c"], "n_classes: 2, but there are 3 labels"),
        (FinetuneBlock(task="classification", scores=True), [1, 1], "every training example has the score 1"),
    ],
)
def test_labels_that_make_no_task(block: FinetuneBlock, labels: list, complaint: str) -> None:
    examples = [parse_example("classification", {"text": "t", "label": label}) for label in labels]
    with pytest.raises(UserError, match=complaint):
        make_task(block, examples, {})
