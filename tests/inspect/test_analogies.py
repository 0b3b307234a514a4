"""Analogy questions: the file, its mistakes, and accuracy on planted answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.errors import UserError
from gptcli.inspect import analogies
from gptcli.inspect.analogies import Section, measure, read_questions, total
from gptcli.inspect.words import WordSpace
from gptcli.tokenizer.build import train_bpe
from tests.inspect.test_words import planted

QUESTIONS = """\
: family
man king woman queen
king man queen woman

man king woman apple
: royal things
man prince woman queen
man king pear queen
: fruit
pear apple plum apple
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "questions.txt"
    file.write_text(text)
    return file


@pytest.mark.parametrize("chunk", [1, 256])
def test_accuracy_per_section_and_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(analogies, "CHUNK", chunk)
    sections = measure(planted(), read_questions(written(tmp_path, QUESTIONS)))
    assert sections == [
        Section("family", correct=2, asked=3, skipped=0),
        Section("royal things", correct=1, asked=1, skipped=1),
        Section("fruit", correct=0, asked=0, skipped=1),
    ]
    assert [s.accuracy for s in sections] == [2 / 3, 1.0, None]
    assert total(sections) == Section("total", correct=3, asked=4, skipped=2)


def test_all_words_after_a_space_or_all_bare() -> None:
    spaced, bare = ["ca", "cb", "cd", "ce"], ["xx", "yy", "zz", "ww"]
    tokenizer = train_bpe([" ca cb cd ce" * 9, "xx,yy,zz,ww," * 9], 300)
    vectors = torch.tensor([[1.0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 1, 1]])  # b - a + c is d
    rows = torch.zeros(tokenizer.vocab_size, 6)
    for block, spellings in ((slice(3), [f" {word}" for word in spaced]), (slice(3, 6), bare)):
        ids = [tokenizer.encode(spelling) for spelling in spellings]
        assert all(len(one) == 1 for one in ids)
        rows[torch.tensor(ids)[:, 0], block] = vectors
    space = WordSpace(rows, tokenizer)
    (section,) = measure(space, {"both": [spaced, bare, [*spaced[:2], *bare[2:]]]})
    # the last question's words share no form
    assert section == Section("both", correct=2, asked=2, skipped=1)


def test_questions_before_any_section(tmp_path: Path) -> None:
    assert read_questions(written(tmp_path, "a b c d\n: late\ne f g h\n")) == {
        "(no section)": [["a", "b", "c", "d"]],
        "late": [["e", "f", "g", "h"]],
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a b c d\na b c\n", "questions.txt:2: expected four words, or `: section`, got 'a b c'"),
        (": s\na b c d e\n", "questions.txt:2: expected four words"),
        (":\na b c d\n", "questions.txt:1: expected four words"),
        (": s\n\n", "questions.txt: holds no question"),
        ("", "questions.txt: holds no question"),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        read_questions(written(tmp_path, text))
    assert complaint in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.txt: No such file"):
        read_questions(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"a b c \xe9\n")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8"):
        read_questions(tmp_path / "latin.txt")
