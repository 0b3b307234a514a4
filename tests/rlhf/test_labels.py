"""Questions, the queue, the file of labels, and what the reader of preferences makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.errors import UserError
from gptcli.rlhf.label_file import LabelFile
from gptcli.rlhf.label_input import parse_ranking
from gptcli.rlhf.labels import Question, Queue, label_row, question_of, rank_by_number, ranking_row, scores_row
from gptcli.rlhf.preferences import parse_preference

QUESTIONS = [Question(id, f"prompt {id}", ["one", "two", "three"]) for id in ("x", 1, "y")]


def test_the_order_is_blind_and_derived() -> None:
    orders = [Question(id, "p", list("abcd")).order(seed=3) for id in range(400)]
    assert orders == [Question(id, "p", list("wxyz")).order(seed=3) for id in range(400)]
    assert orders != [Question(id, "p", list("abcd")).order(seed=4) for id in range(400)]
    for place in range(4):  # each answer comes first about as often: 100 of 400, give or take 4 deviations
        assert 65 <= sum(order[0] == place for order in orders) <= 135


def test_equal_and_empty_answers_are_no_choice() -> None:
    a, b = {"checkpoint": "a", "seed": 0}, {"checkpoint": "b", "seed": 1}
    question = question_of(1, "p", [("yes", a), ("no", a), ("yes", b), (" \n", b)])
    assert question == Question(1, "p", ["yes", "no"], [[a, b], [a]])
    assert question_of(1, "p", [("yes", a), ("yes", b), ("", b)]) is None


@settings(deadline=None)
@given(st.permutations(range(5)), st.lists(st.integers(1, 7), min_size=5, max_size=5))
def test_judgements_of_shown_places_become_those_of_responses(order: list[int], scores: list[int]) -> None:
    """The reader sees the same pairs and margins whatever the order on the screen was."""
    responses = [f"answer {place}" for place in range(5)]
    question = Question("q", "p", responses)
    true = dict(zip(order, scores, strict=True))
    wanted = {(a, b, float(true[a] - true[b])) for a in range(5) for b in range(5) if true[a] > true[b]}
    rated = parse_preference(label_row(question, scores_row(scores, order), "me"))
    assert {(p.better, p.worse, p.margin) for p in rated.pairs} == wanted
    ranked = parse_preference(label_row(question, ranking_row(rank_by_number(scores), order), "me"))
    assert {(p.better, p.worse) for p in ranked.pairs} == {(a, b) for a, b, _ in wanted}


def test_a_row_says_who_when_and_where_from() -> None:
    source = [[{"checkpoint": "runs/a", "seed": 1}], [{"checkpoint": "runs/b", "seed": 2}]]
    question = Question("q", "p", ["x", "y"], source)
    row = label_row(question, ranking_row(parse_ranking("b a", 2), [1, 0]), "anna")
    assert row.pop("time").endswith("+00:00")
    assert row == {
        "id": "q",
        "prompt": "p",
        "responses": ["x", "y"],
        "ranking": [0, 1],
        "labeller": "anna",
        "sources": source,
    }


# ---- the queue --------------------------------------------------------------------------------------------------


def test_a_queue_goes_on_skips_and_goes_back() -> None:
    queue, taken = Queue(QUESTIONS, [1]), []

    def take_back(id: str | int) -> bool:
        taken.append(id)
        return id != 1

    assert (queue.total, queue.labelled, queue.current) == (3, 1, QUESTIONS[0])
    queue.skip()
    assert queue.current == QUESTIONS[2]
    queue.label()
    assert (queue.current, queue.labelled, queue.skipped) == (None, 2, 1)
    assert queue.undo(take_back)
    assert queue.current == QUESTIONS[2]
    assert queue.undo(take_back)
    assert (queue.current, queue.skipped, taken) == (QUESTIONS[0], 0, ["y"])
    assert not queue.undo(take_back)  # the file refuses
    assert queue.labelled == 1
    assert not Queue(QUESTIONS, []).undo(take_back)


@settings(deadline=None)
@given(st.lists(st.sampled_from("lsu"), max_size=30))
def test_every_question_is_labelled_skipped_or_pending(moves: list[str]) -> None:
    queue, labels = Queue(QUESTIONS, []), list[str | int]()

    def take_back(id: str | int) -> bool:
        assert labels.pop() == id
        return True

    for move in moves:
        if move == "u":
            queue.undo(take_back)
        elif queue.current and move == "l":
            labels.append(queue.current.id)
            queue.label()
        elif queue.current:
            queue.skip()
    assert queue.labelled == len(labels)
    assert queue.labelled + queue.skipped + len(queue.pending) == 3


# ---- the file ---------------------------------------------------------------------------------------------------


def row(id: str | int, labeller: str = "anna") -> dict:
    sources = [[{"checkpoint": "runs/a", "seed": seed}] for seed in range(3)]
    question = Question(id, f"prompt {id}", ["one", "two", "three"], sources)
    return label_row(question, {"ranking": [0, [1, 2]]}, labeller)


def test_a_file_goes_on_wherever_a_kill_cut_it(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with LabelFile(path) as file:
        file.add(row("x"))
        file.add(row(1, "ben"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        with LabelFile(path) as file:
            ids = [r["id"] for r in file.rows]
            assert ids == (["x", 1] if end >= len(whole) - 1 else ["x"])
            file.add(row("y"))
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [*ids, "y"]


def test_a_label_is_taken_back_by_whom_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with LabelFile(path) as file:
        file.add(row("x"))
        before = path.read_bytes()
        file.add(row("y", "ben"))
        assert not file.take_back("y", "anna")
        assert not file.take_back("x", "anna")  # not the last
        assert file.take_back("y", "ben")
        assert path.read_bytes() == before
        file.add(row(1))
        assert file.labelled("anna", QUESTIONS) == ["x", 1]
        assert file.labelled("ben", QUESTIONS) == []
    with LabelFile(path) as file:
        assert file.take_back(1, "anna")
    assert path.read_bytes() == before


def test_a_file_of_anything_else_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    for text, reason in [
        ("my notes", "is no file of labels"),
        ("my notes\n", "notes:1: not a label"),
        ('{"prompt": "p"}\n', "notes:1: not a label"),
        ("[1]\n", "notes:1: not a label"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=reason):
            LabelFile(path)
        assert path.read_text() == text
    LabelFile(path, overwrite=True)
    assert path.read_text() == ""
    for place in (tmp_path, tmp_path / "no" / "pairs.jsonl"):
        with pytest.raises(UserError, match="folder"):
            LabelFile(place)


def test_a_file_has_one_writer_and_labels_one_set_of_answers(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with LabelFile(path) as file:
        with pytest.raises(UserError, match="another process is writing it"):
            LabelFile(path)
        file.add(row("x"))
        with pytest.raises(UserError, match=r"pairs.jsonl:1: labels other answers to 'x'"):
            file.labelled("anna", [Question("x", "prompt x", ["one", "two", "four"])])
