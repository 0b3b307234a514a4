"""Planted items are all found, in real text too; what is not there is not."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.data import sources
from gptcli.data.sources import SourceReader
from gptcli.errors import UserError
from gptcli.eval.contamination import (
    WORD,
    Item,
    Overlap,
    item_texts,
    ngram_size,
    read_items,
    scores_apart,
    words_of,
)  # fmt: skip
from gptcli.eval.results import Aggregate, Result

NUMBERS = [f"w{i}" for i in range(500)]


def scanned(items: list[Item], *documents: str, n: int | None = None) -> Overlap:
    overlap = Overlap(items, n)
    list(overlap.scan(("corpus", False, text) for text in documents))
    return overlap


def brute_force(items: list[Item], documents: list[str], n: int) -> set[str]:
    grams = {tuple(w[i : i + n]) for w in map(words_of, documents) for i in range(len(w) - n + 1)}
    return {
        item.id
        for item in items
        for w in map(words_of, item.texts)
        if any(tuple(w[i : i + n]) in grams for i in range(len(w) - n + 1))
    }


def test_words() -> None:
    assert words_of("Don't  STOP_now: 3.14!") == ["don", "t", "stop", "now", "3", "14"]
    assert words_of("“Ünï-code” naïve 你好world") == ["ünï", "code", "naïve", "你", "好", "world"]
    assert words_of("e\u0301te\u0301") == words_of("été")


@given(st.text(st.characters(max_codepoint=127)))
def test_the_quick_way_for_ascii_is_the_other(text: str) -> None:
    assert words_of(text) == WORD.findall(text.lower())


@given(st.data())
def test_what_is_found_is_what_brute_force_finds(data: st.DataObject) -> None:
    text = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=12).map(" ".join)
    items = [Item(str(i), (t,)) for i, t in enumerate(data.draw(st.lists(text, min_size=1, max_size=5)))]
    documents = data.draw(st.lists(text, max_size=4))
    n = data.draw(st.integers(1, 4))
    assert set(scanned(items, *documents, n=n).matches) == brute_force(items, documents, n)


def test_gpt3_s_rule() -> None:
    assert ngram_size([5] * 100) == 8
    assert ngram_size([100] * 100) == 13
    assert ngram_size([10] * 6 + [50] * 94) == 10


def test_a_match_says_where_and_how_much() -> None:
    item = Item("x", (" ".join(NUMBERS[:20]),))
    overlap = Overlap([item, Item("short", ("only a few words",))], 13)
    pieces = [("a.txt", False, "nothing"), ("b.txt", False, "before. " + " ".join(NUMBERS[2:17]).upper() + ", after")]
    assert list(overlap.scan(pieces)) == [len(text) for _, _, text in pieces]
    match = overlap.matches["x"]
    assert (match.where, match.ngram, len(match.found)) == ("b.txt", " ".join(NUMBERS[2:15]), 3)
    assert overlap.too_short == ["short"]


def test_ngrams_cross_pieces_but_not_documents() -> None:
    item = Item("x", (" ".join(NUMBERS[:13]),))
    halves = " ".join(NUMBERS[:6]) + " ", " ".join(NUMBERS[6:13])
    for goes_on in (True, False):
        overlap = Overlap([item], 13)
        list(overlap.scan([("c", False, halves[0]), ("c", goes_on, halves[1])]))
        assert bool(overlap.matches) == goes_on


def test_texts_of_a_row() -> None:
    row = {"id": "q1", "query": "Where is it?", "choices": ["here", "there"], "gold": 1}
    assert item_texts(row) == ("Where is it? here", "Where is it? there")
    assert item_texts({"context": "a b", "continuation": "c", "gold": 0}) == ("a b c",)
    assert item_texts({"gold": 0, "choices": []}) == ()


@pytest.mark.parametrize("name", ["lambada_openai", "piqa", "arc_easy", "copa"])
def test_planted_items_are_all_found_in_real_text(
    name: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the real items, upper-cased and with other punctuation, hidden in WikiText, with small pieces."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 4096)
    file = shared_data / f"eval/{name}.jsonl"
    items = read_items([file])[:1000]
    planted = random.Random(0).sample(items, len(items) // 2)
    lines = (shared_data / "text/wikitext2/test.txt").read_text().splitlines()
    clean = Overlap(items)
    list(clean.scan(("", False, "\n".join(lines)) for _ in "1"))
    for item in planted:
        text = re.sub(r"[,.]", " -- ", max(item.texts, key=lambda text: len(words_of(text)))).upper()
        lines.insert(random.Random(item.id).randrange(len(lines)), text)
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    overlap = Overlap(items)
    list(overlap.scan(SourceReader([str(tmp_path / "corpus.txt")]).pieces()))
    judged = {item.id for item in planted} - set(overlap.too_short)
    assert judged
    assert judged <= overlap.matches.keys()  # recall 1
    found_for_nothing = overlap.matches.keys() - judged - clean.matches.keys()
    assert len(found_for_nothing) <= len(items) // 50  # items that share their words with planted ones


def test_scores_with_and_without() -> None:
    items = [{"id": str(i), "acc": float(i < 3)} for i in range(10)]
    result = Result("t", {"acc": 0.3}, 10, "c", "h", "p", aggregates={"acc": Aggregate("acc")}, items=items)
    (row,) = scores_apart(result, {"0", "1"})
    assert (row["all"], row["clean"], row["flagged"]) == (0.3, 0.125, 1.0)
    assert (row["n_all"], row["n_clean"], row["n_flagged"]) == (10, 8, 2)
    (row,) = scores_apart(result, set())
    assert (row["clean"], row["flagged"], row["flagged_stderr"]) == (0.3, None, None)


def test_pieces_are_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    text = "".join(f"línea {i} 你好 of the file\n" for i in range(50)) + "no newline at the end" + "x" * 200
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    reader = SourceReader([str(tmp_path)])
    pieces = list(reader.pieces())
    assert "".join(piece for where, _, piece in pieces if where.endswith("a.txt")) == text
    assert [goes_on for where, goes_on, _ in pieces if where.endswith("a.txt")][:3] == [False, True, True]
    assert [piece for piece in pieces if piece[0].endswith("b.jsonl")] == [
        (str(tmp_path / "b.jsonl"), False, "one"), (str(tmp_path / "b.jsonl"), False, "two"),
    ]  # fmt: skip
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\n\xff")
    with pytest.raises(UserError, match=r"a.txt:52: not UTF-8"):
        list(reader.pieces())


@pytest.mark.parametrize(
    ("lines", "words"), [([], "holds no items"), ([{"gold": 1}], ":1: holds no text"), (["x"], ":1: expected one JSON")]
)
def test_bad_items(lines, words, tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=words):
        read_items([tmp_path / "i.jsonl"])
