"""Tokens on disk: what is written, what is refused, and when it is made again."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.schema import DataBlock, MixturePart
from gptcli.data.prepare import prepare
from gptcli.data.shards import Corpus, Splitter, open_tokens, write_tokens
from gptcli.errors import UserError
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import LONGEST, char_tokenizer, in_pieces, train_bpe

EOT = 256
PAIRS = [("train", "one"), ("val", "zwei"), ("train", "três"), ("train", "4")]


def write(out, pairs, spec="bytes", **options):
    return write_tokens(lambda: iter(pairs), out, spec, origin={"source": ["here"]}, **options)


def ids(data, split):
    return data.tokens(split).tolist()


# ---- writing -------------------------------------------------------------------------------------


def test_documents_end_in_end_of_text(tmp_path):
    data = write(tmp_path / "out", PAIRS)
    assert ids(data, "train") == [*b"one", EOT, *"três".encode(), EOT, *b"4", EOT]
    assert ids(data, "val") == [*b"zwei", EOT]
    assert data.meta["splits"] == {
        "train": {"documents": 3, "tokens": 9, "eot_tokens": 3, "bytes": 9},
        "val": {"documents": 1, "tokens": 4, "eot_tokens": 1, "bytes": 4},
    }
    assert (data.meta["dtype"], data.meta["vocab_size"], data.meta["source"]) == ("uint16", 257, ["here"])


@pytest.mark.parametrize("pairs", [[("train", "one")], [("train", "on"), ("val", "e")]])
def test_one_document_needs_no_end(tmp_path, pairs):
    data = write(tmp_path / "out", pairs)
    assert bytes(ids(data, "train") + ids(data, "val")) == b"one"
    assert data.meta["splits"]["train"]["eot_tokens"] == 0


def test_end_of_text_in_a_document_is_text(tmp_path):
    data = write(tmp_path / "out", [("train", "<|endoftext|>"), ("train", "a")])
    assert ids(data, "train").count(EOT) == 2


@given(docs=st.lists(st.tuples(st.sampled_from(["train", "val"]), st.text(min_size=1)), min_size=3, max_size=6))
def test_everything_written_can_be_read_back(tmp_path_factory, docs):
    docs = [("train", "first"), *docs]
    data = write(tmp_path_factory.mktemp("t") / "out", docs)
    for split in ("train", "val"):
        texts = [t for s, t in docs if s == split]
        assert data.tokenizer.decode(ids(data, split)) == "".join(t + "<|endoftext|>" for t in texts)
        counts = data.meta["splits"][split]
        assert (counts["documents"], counts["eot_tokens"]) == (len(texts), len(texts))
        assert counts["tokens"] == counts["bytes"] == sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize(("characters", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, characters, dtype):
    points = [c for c in range(0x20, 0x20000) if not 0xD800 <= c < 0xE000][:characters]
    data = write(tmp_path / "out", [("train", "".join(map(chr, points)))], "char")
    assert (data.meta["dtype"], data.meta["vocab_size"]) == (dtype, characters + 1)
    assert ids(data, "train") == list(range(characters))


def test_a_text_without_spaces_is_learned_from_in_pieces():
    """The time to count its pairs grows with the square of its length: 25 seconds for 400 kB in one."""
    genome = "".join(random.Random(0).choices("ACGT", k=3_000))
    pieces = in_pieces(f"a {genome}\n{'x' * LONGEST} b")
    assert [len(piece) for piece in pieces.split()] == [1, *[512] * 5, 440, 512, 1]
    assert pieces.replace("\n", "") == f"a {genome}{'x' * LONGEST} b"
    tokenizer = train_bpe([genome], 300)
    assert tokenizer.decode(tokenizer.encode(genome)) == genome


def test_the_tokenizer_learns_from_the_training_split(tmp_path):
    pairs = [("train", "abab" * 50), ("val", "xyxy" * 50), ("train", "cdcd")]
    bpe = write(tmp_path / "bpe", pairs, "bpe:259").tokenizer
    assert (len(bpe.encode("abab")), len(bpe.encode("xyxy"))) == (1, 4)
    char = write(tmp_path / "char", pairs, "char")
    assert char.tokenizer.decode(ids(char, "val")[:4]) == "xyxy"  # but must know every character


def test_progress_adds_up(tmp_path):
    done = []
    write(tmp_path / "out", PAIRS, advance=done.append)
    assert sum(done) == sum(len(text) for _, text in PAIRS)


def test_hash_is_of_the_tokens(tmp_path):
    hashes = [write(tmp_path / f"{i}", p).hash for i, p in enumerate([PAIRS, PAIRS, PAIRS[:-1], PAIRS[::-1]])]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize("pairs", [[], [("val", "only held out")]])
@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_empty_corpus_is_refused_and_leaves_nothing(tmp_path, pairs, spec):
    with pytest.raises(UserError, match=r"here: .*nothing to train on"):
        write(tmp_path / "out", pairs, spec)
    assert os.listdir(tmp_path) == []


def test_failed_write_leaves_the_old_tokens(tmp_path, monkeypatch):
    out = tmp_path / "out"
    old = write(out, PAIRS).hash

    def broken():
        yield ("train", "new")
        raise OSError(errno.EIO, "the disk is gone")

    with pytest.raises(OSError, match="gone"):
        write_tokens(broken, out, "bytes", origin={})

    def no_space(self, folder):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Tokenizer, "save", no_space)
    for place in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="full"):
            write(place, [("train", "new")])
    assert os.listdir(tmp_path) == ["out"]
    assert open_tokens(out).hash == old
    monkeypatch.undo()
    assert ids(write(out, [("train", "new")]), "train") == list(b"new")


# ---- opening -------------------------------------------------------------------------------------


def test_not_a_tokenized_directory(tmp_path):
    with pytest.raises(UserError, match="not a tokenized directory"):
        open_tokens(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta\.json: not JSON"):
        open_tokens(tmp_path)
    for other in ('{"format_version": 9}', "[]"):
        (tmp_path / "meta.json").write_text(other)
        with pytest.raises(UserError, match=r"meta\.json"):
            open_tokens(tmp_path)


@pytest.mark.parametrize("change", [lambda b: b[:-2], lambda b: b[:-1], lambda b: b + b"\0\0", lambda b: None])
def test_wrong_size_is_refused(tmp_path, change):
    data = write(tmp_path / "out", PAIRS)
    file = tmp_path / "out" / "train.bin"
    changed = change(file.read_bytes())
    file.unlink()
    if changed is not None:
        file.write_bytes(changed)
    with pytest.raises(UserError, match=r"train\.bin: .* but meta\.json says 12 uint16 tokens; tokenize again"):
        data.tokens("train")
    assert len(data.tokens("val")) == 5


def test_swapped_tokenizer_is_refused(tmp_path):
    write(tmp_path / "out", PAIRS)
    char_tokenizer(["abc"]).save(tmp_path / "out")
    with pytest.raises(UserError, match="not the one that made these tokens"):
        open_tokens(tmp_path / "out")


# ---- splitting -----------------------------------------------------------------------------------


@given(st.text(), st.floats(0, 1))
def test_a_single_document_is_cut_at_its_tail(text, fraction):
    parts = list(Splitter(fraction)([text]))
    assert "".join(t for _, t in parts) == text
    train = "".join(t for s, t in parts if s == "train")
    assert len(train) == int(len(text) * (1 - fraction))
    assert all(t for _, t in parts)


@given(st.lists(st.text(), min_size=2), st.lists(st.text()), st.floats(0, 1))
def test_adding_documents_moves_none(old, new, fraction):
    split = Splitter(fraction)
    before, after = list(split(old)), list(split(new + old))
    assert after[len(new) :] == before
    assert {text: s for s, text in split(old[::-1])} == {text: s for s, text in before}
    assert [t for _, t in before] == old


def test_hash_split_has_the_share_asked_for():
    parts = list(Splitter(0.2)(f"document {i}" for i in range(5000)))
    held_out = sum(split == "val" for split, _ in parts)
    assert abs(held_out - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5


def test_tail_split_takes_the_last():
    parts = list(Splitter(0.3, "tail")(str(i) for i in range(10)))
    assert parts == [("train" if i < 7 else "val", str(i)) for i in range(10)]


# ---- corpora and the cache -----------------------------------------------------------------------


def test_train_and_val_given_apart(tmp_path):
    (tmp_path / "t.txt").write_text("training")
    (tmp_path / "v.txt").write_text("held out")
    both = Corpus(train=[str(tmp_path / "t.txt")], val=[str(tmp_path / "v.txt")])
    assert list(both.parts()) == [("train", "training"), ("val", "held out")]
    alone = Corpus(train=[str(tmp_path / "t.txt")], val_fraction=0.25)
    assert list(alone.parts()) == [("train", "traini"), ("val", "ng")]


def test_cache_key_changes_whenever_the_tokens_would(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.txt"
    file.write_text("text")
    source = [str(file)]
    key = Corpus(source).key("bytes")
    assert Corpus(source).key("bytes") == key
    others = [
        Corpus(source).key("char"),
        Corpus(source, val_fraction=0.1).key("bytes"),
        Corpus(source, split="tail").key("bytes"),
        Corpus(source, text_key="body").key("bytes"),
        Corpus(source, skip_bad=True).key("bytes"),
        Corpus(train=source).key("bytes"),
        Corpus(source * 2).key("bytes"),
    ]
    char_tokenizer(["abc"]).save(tmp_path)
    others.append(Corpus(source).key(str(tmp_path)))
    char_tokenizer(["abcd"]).save(tmp_path)
    others.append(Corpus(source).key(str(tmp_path)))
    file.write_text("other text")
    others.append(Corpus(source).key("bytes"))
    assert len({key, *others}) == len(others) + 1


def test_a_file_named_like_a_tokenizer_does_not_stand_in_its_way(tmp_path, monkeypatch):
    """`bytes` is a name before it is a path, when resolved and so in the key."""
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    key = Corpus(["a.txt"]).key("bytes")
    (tmp_path / "bytes").mkdir()
    assert Corpus(["a.txt"]).key("bytes") == key


def test_stdin_has_a_key_of_its_content(monkeypatch):
    def key(data):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
        return Corpus(["-"]).key("bytes")

    assert key(b"a") == key(b"a") != key(b"b")


def test_a_source_is_tokenized_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some text")
    said = []
    block = DataBlock(source=[str(tmp_path / "a.txt")], val_fraction=0.5)
    first = prepare(block, "bytes", say=said.append)
    assert len(said) == 1
    again = prepare(block, "bytes", say=said.append)
    assert len(said) == 1
    assert again.hash == first.hash
    assert bytes(again.held_out().tolist()) == b" text"
    (tmp_path / "a.txt").write_text("some other text")
    assert prepare(block, "bytes", say=said.append).hash != first.hash
    assert len(said) == 2


def test_mixture_of_sources_and_directories(tmp_path):
    write(tmp_path / "a", PAIRS)
    (tmp_path / "b.txt").write_text("zehn Worte")
    parts = [MixturePart(path=str(tmp_path / "a"), weight=1), MixturePart(source=[str(tmp_path / "b.txt")], weight=3)]
    data = prepare(DataBlock(mixture=parts, val_fraction=0.5), "bytes")
    assert data.weights == [1, 3]
    assert data.held_out().tolist() == [*b"zwei", EOT, *b"Worte"]


@pytest.mark.parametrize(("spec", "size"), [("char", 9), ("bpe:270", 270)])
def test_mixture_of_sources_has_one_tokenizer_of_all_their_text(tmp_path, monkeypatch, spec, size):
    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("abab" * 50)
    (tmp_path / "b.txt").write_text("cdef gh" * 50)
    parts = [MixturePart(source=[str(tmp_path / f"{name}.txt")], weight=1) for name in "ab"]
    data = prepare(DataBlock(mixture=parts), spec)
    assert {part.tokenizer.hash for part in data.parts} == {data.tokenizer.hash}
    assert all(data.tokenizer.decode(data.tokenizer.encode(text)) == text for text in ("abab", "cdef gh"))
    assert data.tokenizer.vocab_size == size + (spec == "char")  # and end-of-text
    again = prepare(DataBlock(mixture=parts), spec, say=lambda line: pytest.fail(line))
    assert again.hash == data.hash


def test_mixture_of_tokenized_directories(tmp_path):
    write(tmp_path / "a", PAIRS)
    write(tmp_path / "b", PAIRS[:2])
    write(tmp_path / "c", PAIRS, "char")

    def mixture(*names):
        return DataBlock(mixture=[MixturePart(path=str(tmp_path / n), weight=1) for n in names])

    both = prepare(mixture("a", "b"), None)
    assert both.held_out().tolist() == [*b"zwei", EOT, *b"zwei"]
    with pytest.raises(UserError, match="different tokenizers"):
        prepare(mixture("a", "c"), None)
    with pytest.raises(UserError, match="nothing to train on"):
        prepare(DataBlock(), "bytes")
    assert json.loads((tmp_path / "a" / "meta.json").read_text())["hash"] in both.hash
    assert np.array_equal(prepare(DataBlock(path=str(tmp_path / "a")), None).held_out(), both.parts[0].tokens("val"))
