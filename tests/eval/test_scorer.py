"""Each answer of the scorer against the plainest computation, whatever it is batched with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.config.schema import ModelConfig
from gptcli.errors import UserError
from gptcli.eval.perplexity import windows
from gptcli.eval.scorer import Prompt, Scorer, batches, encode_pairs
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer

EOT, LIMIT = 256, 24
BYTES = byte_tokenizer()


def make(position: str = "learned") -> Scorer:
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=16, context_length=LIMIT, vocab_size=257, init_std=0.3, position=position
    )
    model = GPT(config)
    model.init_weights(0)
    return Scorer(Engine(model.eval(), BYTES))


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return make()


@torch.inference_mode()
def plain(scorer: Scorer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One row, all logits, as the harness defines it."""
    row = (context + continuation)[-(LIMIT + 1) :]
    logp = scorer.model(torch.tensor([row[:-1]])).logits[0].double().log_softmax(-1)[-len(continuation) :]
    target = torch.tensor(continuation)
    return logp.gather(1, target[:, None]).sum().item(), bool((logp.argmax(1) == target).all())


IDS = st.lists(st.integers(0, 5), min_size=1, max_size=LIMIT).map(tuple)
CONTEXT = st.one_of(IDS, st.just((3,) * 20), st.just(tuple(range(40))))  # some are shared, some too long


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CONTEXT, IDS), min_size=1, max_size=12), st.sampled_from([1, 60, 4096]))
def test_a_likelihood_does_not_depend_on_its_batch(scorer, pairs, most):
    scorer.batch_tokens = most
    for (context, continuation), found in zip(pairs, scorer.loglikelihood_tokens(pairs), strict=True):
        logprob, greedy = plain(scorer, list(context), list(continuation))
        assert found.logprob == pytest.approx(logprob, abs=1e-4)
        assert found.greedy == greedy
        assert found.tokens == len(continuation)


@pytest.mark.parametrize("position", ["learned", "rope", "alibi", "sinusoidal"])
def test_a_context_is_read_once_for_all_its_continuations(position, monkeypatch):
    scorer = make(position)
    read = []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, x, **k: (read.append(x.numel()), forward(self, x, **k))[1])
    context = tuple(range(20))
    pairs = [(context, (i,)) for i in range(8)] + [(context, (1, 2, 3)), (context, (1,)), (tuple(range(9)), (4, 5))] * 2
    found = scorer.loglikelihood_tokens(pairs)
    assert read[1:] == [19, 9 * 3]  # the context but for its last token; then from there, nine distinct continuations
    for (context, continuation), one in zip(pairs, found, strict=True):
        assert one.logprob == pytest.approx(plain(scorer, list(context), list(continuation))[0], abs=1e-4)


def test_greedy_is_every_token(scorer):
    with torch.inference_mode():
        ids = [7, 9]
        for _ in range(3):
            ids.append(int(scorer.model(torch.tensor([ids])).logits[0, -1].argmax()))
    right, wrong = scorer.loglikelihood_tokens([((7, 9), tuple(ids[2:])), ((7, 9), (*ids[2:4], 255))])
    assert right.greedy
    assert not wrong.greedy


@given(st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4)), max_size=20), st.integers(1, 200))
def test_batches_hold_every_group_once_and_no_more_than_they_may(groups, most):
    made = list(batches(list(groups), most))
    assert sorted(g for batch in made for g in batch) == sorted(groups)
    for batch in made:
        rows = sum(len(g[1]) for g in batch)
        width = max(len(g[0]) for g in batch) + max(len(c) for g in batch for c in g[1])
        assert len(batch) == 1 or rows * width <= most


# ---- tokens of text ----------------------------------------------------------------------------------------


def ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def test_pairs_become_tokens_as_the_harness_makes_them():
    pairs = [("ab", " c"), ("ab ", "c"), ("ab \n", "c"), ("", "c"), ("  ", "c")]
    assert encode_pairs(BYTES, pairs) == [
        (ids("ab"), ids(" c")),
        (ids("ab"), ids(" c")),  # white space that ends a context goes over
        (ids("ab"), ids(" \nc")),
        ((EOT,), ids("c")),
        ((EOT,), ids("  c")),
    ]


def test_what_a_tokenizer_cannot_spell_is_one_line(scorer):
    with pytest.raises(UserError, match=r"request 1: the tokenizer has no tokens .* continuation ''"):
        encode_pairs(BYTES, [("a", "b"), ("a", "")])
    with pytest.raises(UserError, match="character 'z' is not in this character tokenizer's vocabulary"):
        encode_pairs(char_tokenizer(["abc "]), [("a", " z")])
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"request 0: the tokenizer cannot spell the continuation ' z' \(<unk>"):
        encode_pairs(Tokenizer(words, {"unk": "<unk>"}), [("a", " z")])
    with pytest.raises(UserError, match="names no token that begins a text"):
        encode_pairs(Tokenizer(byte_tokenizer().backend, {}), [("", "a")])
    with pytest.raises(UserError, match="a continuation of 25 tokens exceeds the model's context of 24"):
        scorer.loglikelihood([("a", "b" * 25)])


@pytest.mark.parametrize("stride", [None, 1, 7])
def test_rolling_is_the_plainest_loop(scorer, stride):
    texts = ["It was a bright cold day in April, and the clocks were striking thirteen.", "", "short"]
    for text, found in zip(texts, scorer.loglikelihood_rolling(texts, stride=stride), strict=True):
        stream, total = [EOT, *text.encode()], 0.0
        for w in windows(len(stream), LIMIT, stride or LIMIT):
            total += plain(scorer, stream[w.begin : w.first + 1], stream[w.first + 1 : w.end + 1])[0]
        assert found.logprob == pytest.approx(total, abs=1e-3)
        assert found.tokens == len(text)


def test_generate_until(scorer):
    whole = scorer.generate_until([Prompt("ab", (), 10)])[0]
    assert whole
    stop = whole[3:5]
    prompts = [Prompt("ab", (stop,), 10), Prompt("x" * 50, (), 4), Prompt("ab", (), 10), Prompt("", (), 5)]
    found = scorer.generate_until(prompts)
    assert found[0] == whole[: whole.index(stop)]
    assert found[1] == scorer.generate_until([Prompt("x" * (LIMIT - 4), (), 4)])[0]  # cut on the left
    assert found[2] == whole
    assert found[3] == scorer.generate_until([Prompt("", (), 5)])[0]
    with pytest.raises(UserError, match="24 new tokens leave no room"):
        scorer.generate_until([Prompt("a", (), LIMIT)])
