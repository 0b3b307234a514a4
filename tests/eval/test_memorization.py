"""A model that has learned a text by heart recites it, and recites nothing else."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest

import gptcli
from gptcli.errors import UserError
from gptcli.eval.memorization import draw_passages, recite
from gptcli.tokenizer.build import byte_tokenizer
from tests.conftest import Tiny, gpt, make_tiny

SIZES = ["--prefix", "8", "--continuation", "6"]


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Trained on letters that follow no rule, so that what is not learned by heart cannot be guessed."""
    tiny = make_tiny(tmp_path_factory.mktemp("parrot"), steps=400)
    letters = random.Random(0).choices(string.ascii_lowercase, k=140)
    (tiny.folder / "text.txt").write_text("".join(letters))
    tiny.train("model.n_embd=48", "optim.lr=3e-3", "train.eval_every=0", "data.val_fraction=0.3")
    return tiny


def test_the_training_text_is_recited_and_the_held_out_text_is_not(parrot: Tiny, tmp_path: Path) -> None:
    row = gpt("inspect", "memorization", "-c", parrot.run_dir, *SIZES, "--json").json()
    assert row["training"]["exact"] > 0.8
    assert row["held_out"]["exact"] == 0
    assert row["held_out"]["n"] >= 2
    assert row["training"]["n"] == len(row["training"]["items"])
    assert row["training"]["matched"] >= row["training"]["exact"]

    done = gpt("inspect", "memorization", "-c", parrot.run_dir, *SIZES)
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["training", "held"]


def test_an_item_is_the_engine_s_own_greedy_text(parrot: Tiny) -> None:
    model = gptcli.load(parrot.run_dir)
    text = (parrot.folder / "text.txt").read_text()
    passages = draw_passages(model.tokenizer, [text], prefix=5, continuation=4, count=8)
    items = recite(model.engine, passages)
    for passage, item in zip(passages, items, strict=True):
        written = model.generate(text[passage.start : passage.start + 5], temperature=0.0, max_new_tokens=4)
        truth = text[passage.start + 5 : passage.start + 9]
        assert item["exact"] == (written == truth)
        assert item["matched"] == next((i for i in range(4) if written[i : i + 1] != truth[i]), 4) / 4
    assert 0 < sum(item["exact"] for item in items) < 8


def test_passages_are_apart_spread_and_decided_by_the_seed() -> None:
    tokenizer, texts = byte_tokenizer(), ["x" * 3, *(str(i) * 100 for i in range(5))]
    options = {"prefix": 6, "continuation": 4, "count": 20}
    found = draw_passages(tokenizer, texts, **options)
    assert len(found) == 20
    assert len({(p.document, p.start) for p in found}) == 20
    assert all(p.start % 10 == 0 and len(p.prefix) == 6 and len(p.rest) == 4 for p in found)
    assert {p.document for p in found} == {1, 2, 3, 4, 5}
    assert found == draw_passages(tokenizer, texts, **options)
    assert found != draw_passages(tokenizer, texts, **options, seed=1)
    assert len(draw_passages(tokenizer, ["a" * 35], **options)) == 3
    with pytest.raises(UserError, match="no document has 10 tokens"):
        draw_passages(tokenizer, ["short", ""], **options)


def test_mistakes_take_one_line(parrot: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    for arguments, words in [
        (["--prefix", "50"], "more than the model's context of 16"),
        ([*SIZES, "--data", tmp_path / "empty.txt"], "no text to measure on"),
    ]:
        done = gpt("inspect", "memorization", "-c", parrot.run_dir, *arguments)
        assert done.code == 2
        assert words in done.err
        assert len(done.err.splitlines()) == 1
