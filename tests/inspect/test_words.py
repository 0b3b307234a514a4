"""Word arithmetic on planted embeddings, where the answers are known."""

from __future__ import annotations

import math

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from gptcli.errors import UserError
from gptcli.inspect.words import Term, WordSpace, nearest_rows, parse_sum, pca, unit
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer, train_bpe

# royalty, maleness, femaleness, and a direction of its own for each of the others
VECTORS = {
    "king": [1.0, 1, 0, 0, 0],
    "queen": [1.0, 0, 1, 0, 0],
    "man": [0.0, 1, 0, 0, 0],
    "woman": [0.0, 0, 1, 0, 0],
    "apple": [0.0, 0, 0, 1, 0],
    "prince": [1.0, 1, 0, 0, 0.2],
    "well-known": [0.0, 0, 0, 1, 1],
}


def planted(vectors: dict[str, list[float]] = VECTORS, *, scale: float = 1.0) -> WordSpace:
    """A tokenizer of whole words, each with its vector; one more row pads the embedding."""
    words = [*vectors, "[UNK]"]
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]"])
    rows = torch.tensor([*vectors.values(), [-1.0] * 5, [9.0] * 5])
    return WordSpace(scale * rows, Tokenizer(backend))


def names(space: WordSpace, found: list[tuple[int, float]]) -> list[str]:
    return [space.tokenizer.decode([id]) for id, _ in found]


def test_king_without_man_with_woman_is_queen() -> None:
    for scale in (1.0, 50.0):  # lengths do not matter
        space = planted(scale=scale)
        assert names(space, space.neighbours("king - man + woman", 1)) == ["queen"]


def test_neighbours_come_closest_first_without_the_word_itself() -> None:
    space = planted()
    found = space.neighbours("king", 3)
    assert names(space, found) == ["prince", "man", "queen"]
    assert [cosine for _, cosine in found] == pytest.approx([2 / math.sqrt(2 * 2.04), 1 / math.sqrt(2), 1 / 2])


def test_padding_rows_are_nobodys_neighbours() -> None:
    space = planted()
    assert len(space.neighbours("king", 99)) == len(VECTORS) + 1 - 1  # [UNK], not the king


def test_projection_is_a_cosine() -> None:
    space = planted()
    assert space.projection("queen", "woman - man") == pytest.approx(1 / 2)
    assert space.projection("king", "woman - man") == pytest.approx(-1 / 2)
    assert space.projection("apple", "woman - man") == pytest.approx(0, abs=1e-6)
    assert space.projection("woman", "woman") == pytest.approx(1)


def test_sums_are_parsed() -> None:
    assert parse_sum("king - man + woman") == [Term(1, "king"), Term(-1, "man"), Term(1, "woman")]
    assert parse_sum("well-known") == [Term(1, "well-known")]
    assert parse_sum(" king") == [Term(1, " king")]
    for bad in ("", " ", "king -", "king + "):
        with pytest.raises(UserError, match="not a word or a sum of words"):
            parse_sum(bad)


def test_a_word_is_its_token_after_a_space_then_bare() -> None:
    space = WordSpace(torch.eye(300, 300), train_bpe(["cat cat the cat " * 9], 300))
    after_space, bare = space.tokenizer.encode(" cat")[0], space.tokenizer.encode("cat")[0]
    assert space.forms("cat") == [after_space, bare]
    assert space.forms(" cat") == [after_space]
    assert not {after_space, bare} & {id for id, _ in space.neighbours("cat", 20)}


def test_a_word_of_several_tokens_is_refused_with_its_pieces() -> None:
    space = WordSpace(torch.eye(257), byte_tokenizer())
    with pytest.raises(UserError, match=r"'ab' is no single token of this model \(a, b\)"):
        space.vector("ab")


def test_an_unknown_word_is_no_token() -> None:
    with pytest.raises(UserError, match="'pear' is no single token"):
        planted().neighbours("pear", 1)
    assert WordSpace(torch.eye(4), char_tokenizer(["abc"])).forms("z") == []


def test_nearest_rows_and_unit() -> None:
    table = unit(torch.tensor([[3.0, 0], [0, 2], [1, 1]]))
    assert [id for id, _ in nearest_rows(table, torch.tensor([2.0, 1]), top=9)] == [2, 0, 1]
    assert [id for id, _ in nearest_rows(table, torch.tensor([2.0, 1]), top=9, exclude={2})] == [0, 1]


def test_pca_keeps_the_distances_of_points_on_a_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(2, 7, generator=generator)
    points = torch.randn(6, 2, generator=generator) @ plane + 5
    torch.testing.assert_close(torch.cdist(pca(points), pca(points)), torch.cdist(points, points), atol=1e-4, rtol=1e-4)
    assert pca(points[:1]).tolist() == [[0.0, 0.0]]
