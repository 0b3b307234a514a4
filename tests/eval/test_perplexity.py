"""Perplexity against the plainest loop, and the compressors it is held against."""

from __future__ import annotations

import gzip
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.schema import ModelConfig
from gptcli.errors import UserError
from gptcli.eval import perplexity
from gptcli.eval.compression import compressors, gzip_bits_per_byte, xz_bits_per_byte
from gptcli.eval.perplexity import Perplexity, join_documents, measure_documents, windows
from gptcli.model import GPT
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer

CONTEXT = 8
TEXT = "It was a bright cold day, and the clocks were striking thirteen. é"
BYTES = byte_tokenizer()


def measure(*given: Any, **options: Any) -> Perplexity:
    """Of all documents together."""
    found = measure_documents(*given, **options)
    return Perplexity(*(sum(getattr(d, name) for d in found) for name in ("nll", "tokens", "bytes", "words")))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of a model this small only wait for each other, on a busy machine a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=CONTEXT, vocab_size=257, init_std=0.3)
    model = GPT(config)
    model.init_weights(0)
    return model.eval()


SIZES = st.tuples(st.integers(2, 400), st.integers(1, 50)).flatmap(
    lambda s: st.tuples(st.just(s[0]), st.just(s[1]), st.integers(1, s[1]))
)


@given(SIZES)
def test_windows_cover_every_target_once(sizes):
    n, context, stride = sizes
    made = list(windows(n, context, stride))
    targets = [i for w in made for i in range(w.first + 1, w.end + 1)]
    assert targets == list(range(1, n))
    for w in made:
        assert 0 <= w.begin <= w.first < w.end <= n - 1
        assert w.end - w.begin == min(context, w.end)  # as much context as there is
    assert all(w.end - w.first == stride for w in made[1:-1])


@given(st.integers(2, 400), st.integers(1, 50))
def test_a_stride_of_the_context_gives_disjoint_windows(n, context):
    made = list(windows(n, context, context))
    assert all(w.begin == w.first for w in made[:-1])  # the last one looks back as far as it can
    assert len(made) == -(-(n - 1) // context)


@pytest.mark.parametrize("texts", [[TEXT], ["one", "two and more text", "three"], ["ab"]])
@pytest.mark.parametrize("stride", [1, 3, 5, CONTEXT, None])
def test_measure_is_the_plainest_loop(model, monkeypatch, texts, stride):
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 3 * CONTEXT)  # several batches, the last one smaller
    step = stride or CONTEXT // 2
    ids = [256, *texts[0].encode()]
    for text in texts[1:]:
        ids += [256, *text.encode()]
    if len(texts) > 1:
        ids += [256]
    nll = 0.0
    for i in range(1, len(ids)):
        blocks = max(0, -(-(i - CONTEXT) // step))
        end = min(len(ids) - 1, CONTEXT + blocks * step)
        begin = max(0, end - CONTEXT)
        with torch.inference_mode():
            logits = model(torch.tensor([ids[begin:i]])).logits[0, -1].double()
        nll -= torch.log_softmax(logits, 0)[ids[i]].item()

    measured = measure(model, BYTES, texts, stride=stride)
    assert measured.nll == pytest.approx(nll, rel=1e-5)
    assert measured.tokens == len(ids) - 1
    assert measured.bytes == sum(len(t.encode()) for t in texts)


def test_more_context_changes_the_score_and_batching_does_not(model, monkeypatch):
    scores = {stride: measure(model, BYTES, [TEXT], stride=stride).nll for stride in (1, 4, 8)}
    assert len(set(scores.values())) == 3
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 1)
    assert measure(model, BYTES, [TEXT], stride=4).nll == pytest.approx(scores[4], rel=1e-6)


def test_uniform_model_has_a_perplexity_of_its_vocabulary(model):
    flat = GPT(model.config)
    flat.init_weights(0)
    with torch.no_grad():
        flat.wte.weight.zero_()
    measured = measure(flat.eval(), BYTES, [TEXT])
    assert measured.perplexity == pytest.approx(257, rel=1e-5)
    assert measured.bits_per_byte == pytest.approx(math.log2(257), rel=1e-5)


def test_progress_ends_at_one(model, monkeypatch):
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", CONTEXT)
    shares = []
    measure(model, BYTES, [TEXT], advance=shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 3
    assert shares[-1] == 1


def test_documents_are_joined_as_in_training():
    assert join_documents(["a", "b"], BYTES).ids == [256, ord("a"), 256, ord("b"), 256]
    assert join_documents(["a"], BYTES).ids == [256, ord("a")]
    assert join_documents(["ab"], Tokenizer(byte_tokenizer().backend, {})).ids == [ord("a"), ord("b")]


def test_nothing_to_score_is_refused(model):
    with pytest.raises(UserError, match="nothing to score"):
        measure(model, BYTES, [""])
    with pytest.raises(UserError, match=r"--stride 9: is more than the model's context of 8 tokens"):
        measure(model, BYTES, [TEXT], stride=9)


def test_definitions():
    score = Perplexity(nll=2 * math.log(8), tokens=2, bytes=3, words=1)
    assert score.perplexity == pytest.approx(8)
    assert score.bits_per_byte == pytest.approx(2)
    assert Perplexity(nll=1e9, tokens=1, bytes=1, words=1).perplexity > 1e300  # large, not an overflow


# ---- compressors ---------------------------------------------------------------------------------


def letters(n, seed):
    return "".join(random.Random(seed).choices("abcdefghijklmnop", k=n))  # 4 bits each


def test_text_seen_before_costs_next_to_nothing():
    text = letters(20_000, 0)
    bits = compressors([text], [text])
    assert bits["xz_given_training_text"] < 0.1
    assert 4 <= bits["gzip"] < 5


def test_other_text_costs_what_it_holds():
    bits = xz_bits_per_byte(letters(20_000, 1).encode(), letters(20_000, 0).encode())
    assert 4 <= bits < 5
    assert xz_bits_per_byte(random.Random(0).randbytes(20_000)) >= 8


def test_seen_text_helps_from_far_away():
    """Training text of more than one window of gzip's is still remembered."""
    text, filler = letters(5_000, 0), letters(300_000, 1)
    assert xz_bits_per_byte(text.encode(), (text + filler).encode()) < 0.1


def test_gzip_is_gzip_over_bytes():
    text = ("é" * 1000).encode()
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / 2000
    assert compressors([], ["é" * 500, "é" * 500])["gzip"] == gzip_bits_per_byte(text)
