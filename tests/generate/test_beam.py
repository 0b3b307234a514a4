"""Beam search against transformers, exhaustive search, greedy decoding, re-scoring, and trees made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.generate import Engine, complete
from gptcli.generate.beam import Beam, beam_search
from gptcli.generate.scheduler import window_start
from gptcli.model import GPT, KVCache, Output
from gptcli.tokenizer.build import byte_tokenizer

ALPHAS, EARLY = (-0.5, 0.0, 1.0, 2.0), (True, False, "never")


def small_gpt(seed: int, vocab_size: int, context_length: int = 32) -> GPT:
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=16, context_length=context_length, vocab_size=vocab_size, init_std=0.4,
        vocab_pad_multiple=1,
    )  # fmt: skip
    model = GPT(config)
    model.init_weights(seed)
    return model.eval()


def engine_of(model: Any, eos_id: int | None = None) -> Engine:
    """With no more of a tokenizer than an end-of-text."""
    tokenizer: Any = SimpleNamespace(eos_id=eos_id, chat_template=None)
    return Engine(model, tokenizer)


def search(engine: Engine, prompt: Sequence[int], **options: Any) -> list[Beam]:
    return beam_search(engine, prompt, SamplingParams(**{"num_return": options["num_beams"], **options}))


# ---- against transformers -------------------------------------------------------------------------------------


def as_transformers(model: GPT) -> Any:
    """The same weights in their GPT-2, whose linear weights are (in, out)."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.context_length, vocab_size=c.vocab_size,
            tie_word_embeddings=c.tie_embeddings, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    state = theirs.state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            place = state[name if name == "lm_head.weight" else "transformer." + name]
            place.copy_(p.T if p.ndim == 2 and name.startswith("h.") else p)
    return theirs


def their_generate(theirs: Any, prompt: list[int], eos_id: int | None, options: dict[str, Any]) -> Any:
    renamed = {"no_repeat_ngram": "no_repeat_ngram_size", "num_return": "num_return_sequences"}
    return theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        eos_token_id=eos_id,
        pad_token_id=theirs.config.vocab_size - 1,  # a pad id of 0 is taken for eos there, which we do not follow
        return_dict_in_generate=True,
        output_scores=True,
        **{renamed.get(name, name): value for name, value in options.items()},
    )


def check_beams(model: GPT, theirs: Any, prompt: list[int], eos_id: int | None, options: dict[str, Any]) -> None:
    found = their_generate(theirs, prompt, eos_id, options)
    ours = beam_search(engine_of(model, eos_id), prompt, SamplingParams(**options))
    assert len(ours) == len(found.sequences)
    for beam, row in zip(ours, found.sequences[:, len(prompt) :].tolist(), strict=True):
        assert list(beam.ids) == row[: len(beam.ids)], options
        assert set(row[len(beam.ids) :]) <= {model.vocab_size - 1}
    scores = torch.tensor([beam.score for beam in ours])
    torch.testing.assert_close(scores, found.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_beams", [2, 3, 4])
def test_beams_equal_transformers(num_beams: int) -> None:
    model = small_gpt(num_beams, vocab_size=13)
    theirs = as_transformers(model)
    generator = torch.Generator().manual_seed(num_beams)
    for number, (alpha, early, ngram, penalty) in enumerate(itertools.product(ALPHAS, EARLY, (0, 2), (1.0, 1.4))):
        options = {
            "num_beams": num_beams,
            "length_penalty": alpha,
            "early_stopping": early,
            "no_repeat_ngram": ngram,
            "repetition_penalty": penalty,
            "min_new_tokens": number % 4,
            "max_new_tokens": 12,
            "num_return": 1 + number % num_beams,
        }
        prompt = torch.randint(0, 13, (5,), generator=generator).tolist()
        check_beams(model, theirs, prompt, 3, options)


def test_greedy_equals_transformers(nano_sort: GPT) -> None:
    generator = torch.Generator().manual_seed(0)
    for model, eos_id, n in (
        (small_gpt(5, vocab_size=13), 3, 12),
        (small_gpt(6, vocab_size=13), None, 12),
        (nano_sort, 1, 5),
    ):
        theirs = as_transformers(model)
        for ngram, penalty, least in itertools.product((0, 2, 3), (1.0, 1.4), (0, 4)):
            if model is nano_sort and ngram:  # three tokens are soon used up, which transformers has no answer to
                continue
            options = {"no_repeat_ngram": ngram, "repetition_penalty": penalty, "max_new_tokens": n}
            options |= {"min_new_tokens": least} if eos_id is not None else {}
            prompt = torch.randint(0, model.vocab_size, (6,), generator=generator).tolist()
            found = their_generate(theirs, prompt, eos_id, options).sequences[0, 6:].tolist()
            ours = engine_of(model, eos_id).tokens([prompt], SamplingParams(temperature=0.0, **options))
            assert [token.id for token in ours] == found, options


@pytest.mark.parametrize("eos_id", [None, 1])
def test_beams_of_a_real_model_equal_transformers(nano_sort: GPT, eos_id: int | None) -> None:
    theirs = as_transformers(nano_sort)
    prompts = [[0, 2, 1, 1, 0, 2], [2, 2, 2, 0, 0, 0], [1, 0, 1, 2, 0, 1]]
    for prompt, num_beams, alpha, early in itertools.product(prompts, (2, 3), (0.0, 1.0), EARLY):
        options = {
            "num_beams": num_beams,
            "length_penalty": alpha,
            "early_stopping": early,
            "num_return": num_beams,
            "max_new_tokens": 5,
        }
        check_beams(nano_sort, theirs, prompt, eos_id, options)


def test_the_sorter_sorts_by_search_too(nano_sort: GPT) -> None:
    best = search(engine_of(nano_sort), [2, 0, 1, 1, 0, 2], num_beams=3, max_new_tokens=6)[0]
    assert best.ids == (0, 0, 1, 1, 2, 2)


# ---- against what must be so ----------------------------------------------------------------------------------


def logprobs_of(model: GPT, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Each token's log-probability in one pass, with no cache."""
    row = torch.tensor([[*prompt, *ids]])
    with torch.no_grad():
        logprobs = model(row[:, :-1]).logits.log_softmax(-1)
    return logprobs[0, len(prompt) - 1 :].gather(1, row[0, len(prompt) :, None])[:, 0].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_wide_beams_find_the_best_there_is(seed: int) -> None:
    V, T, eos = 4, 4, 3
    model, prompt = small_gpt(seed, V), [0, 2, 1]
    texts = [
        ids
        for length in range(1, T + 1)
        for ids in itertools.product(range(V), repeat=length)
        if eos not in ids[:-1] and (ids[-1] == eos or length == T)
    ]
    best = max(texts, key=lambda ids: sum(logprobs_of(model, prompt, ids)))
    options = {"length_penalty": 0.0, "early_stopping": "never", "max_new_tokens": T}
    found = search(engine_of(model, eos), prompt, num_beams=V ** (T - 1), num_return=1, **options)[0]
    assert found.ids == best


@pytest.mark.parametrize("early_stopping", EARLY)
def test_one_beam_is_greedy(early_stopping: Any) -> None:
    for seed in range(4):
        engine = engine_of(small_gpt(seed, vocab_size=20), eos_id=7)
        options = {"early_stopping": early_stopping, "length_penalty": 0.0}
        beam = search(engine, [1, 2, 3], num_beams=1, max_new_tokens=15, **options)[0]
        greedy = engine.tokens([[1, 2, 3]], SamplingParams(temperature=0.0, max_new_tokens=15))
        assert list(beam.ids) == [token.id for token in greedy]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_score_is_the_rescored_sum_over_the_length(alpha: float) -> None:
    model, prompt = small_gpt(4, vocab_size=13), [5, 1, 1, 4]
    beams = search(engine_of(model, eos_id=3), prompt, num_beams=4, max_new_tokens=9, length_penalty=alpha)
    assert {beam.finish_reason for beam in beams} <= {"eos", "length"}
    for beam in beams:
        logprobs = logprobs_of(model, prompt, beam.ids)
        assert beam.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert beam.score == pytest.approx(sum(logprobs) / len(beam.ids) ** alpha, abs=1e-4)
        assert (beam.ids[-1] == 3) == (beam.finish_reason == "eos")
    assert [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)
    assert len({b.ids for b in beams}) == 4


def test_beams_beyond_the_context_read_the_stated_view() -> None:
    model = small_gpt(6, vocab_size=13, context_length=8)
    engine = engine_of(model)
    for beam in search(engine, list(range(11)), num_beams=3, max_new_tokens=20):
        row = [*range(11), *beam.ids]
        for length in range(11, len(row)):
            view = row[window_start(length, 8) : length]
            expected = logprobs_of(model, view, row[length : length + 1])
            assert beam.logprobs[length - 11] == pytest.approx(expected[0], abs=1e-4)
    greedy = [t.id for t in engine.tokens([[1, 2, 3]], SamplingParams(temperature=0.0, max_new_tokens=20))]
    assert list(search(engine, [1, 2, 3], num_beams=1, max_new_tokens=20)[0].ids) == greedy


def test_where_fewer_texts_exist_fewer_come() -> None:
    beams = search(engine_of(small_gpt(0, vocab_size=3)), [0], num_beams=8, max_new_tokens=1)
    assert sorted(b.ids for b in beams) == [(0,), (1,), (2,)]


def test_least_length_and_ngrams_hold_in_beams() -> None:
    engine = engine_of(small_gpt(4, vocab_size=13), eos_id=3)
    options = {"num_beams": 4, "max_new_tokens": 12, "length_penalty": 0.0}
    assert min(len(b.ids) for b in search(engine, [5, 1], **options)) < 8
    for beam in search(engine, [5, 1], min_new_tokens=8, no_repeat_ngram=2, **options):
        assert len(beam.ids) > 8 or beam.finish_reason == "length"
        row = [5, 1, *beam.ids]
        assert len(set(itertools.pairwise(row))) == len(row) - 1


# ---- three trees made by hand ---------------------------------------------------------------------------------

START, EOS = 0, 1
NAMES = {name: i for i, name in enumerate("^$abcdefghx")}


class Tree(torch.nn.Module):
    """Each token has one parent, so the newest says where we are; what has no entry goes on to x forever."""

    def __init__(self, edges: dict[str, dict[str, float]]) -> None:
        super().__init__()
        self.vocab_size, self.calls = len(NAMES), 0
        self.config = ModelConfig(n_layer=1, n_head=1, n_embd=1, context_length=64, vocab_size=self.vocab_size)
        self.wte = torch.nn.Embedding(1, 1)
        probs = torch.zeros(self.vocab_size, self.vocab_size)
        for name, at in NAMES.items():
            for token, p in edges.get(name, {"x": 1.0}).items():
                probs[at, NAMES[token]] = p
        self.logits = probs.log()

    def forward(self, tokens: torch.Tensor, cache: KVCache, last_only: bool) -> Output:
        self.calls += 1
        return Output(self.logits[tokens[:, -1:]], None, None, {})


def grow(edges: dict[str, dict[str, float]], **options: Any) -> tuple[list[str], int]:
    """The texts found, best first, and how often the model was asked."""
    tree = Tree(edges)
    letters = list(NAMES)
    beams = search(engine_of(tree, EOS), [START], num_beams=2, **options)
    return ["".join(letters[i] for i in beam.ids) for beam in beams], tree.calls


def test_tree_where_stopping_at_once_misses_the_second_best() -> None:
    edges = {
        "^": {"$": 0.4, "a": 0.35, "b": 0.25},
        "a": {"$": 0.6, "c": 0.4},  # a$ .21, the second to end
        "b": {"d": 1.0},
        "d": {"$": 0.9, "e": 0.1},  # bd$ .225
    }
    options = {"length_penalty": 0.0, "max_new_tokens": 6}
    assert grow(edges, early_stopping=True, **options) == (["$", "a$"], 2)
    # both others see that .25 is more than .21, go on, and then that nothing is left to gain
    assert grow(edges, early_stopping=False, **options) == (["$", "bd$"], 3)
    assert grow(edges, early_stopping="never", **options) == (["$", "bd$"], 3)


def test_tree_where_the_guess_misses_a_longer_text() -> None:
    edges = {
        "^": {"$": 0.5, "a": 0.3, "b": 0.2},  # $ -0.693
        "a": {"c": 0.6, "$": 0.4},  # ac .18: -0.857
        "b": {"$": 1.0},  # b$ .2: -0.805, the second to end
        "c": {"d": 1.0},
        "d": {"e": 1.0},
        "e": {"$": 1.0},  # acde$ .18 as well, but over five tokens: -0.343
    }
    options = {"length_penalty": 1.0, "max_new_tokens": 6}
    assert grow(edges, early_stopping=True, **options) == (["$", "b$"], 2)
    assert grow(edges, early_stopping=False, **options) == (["$", "b$"], 2)
    assert grow(edges, early_stopping="never", **options)[0] == ["acde$", "$"]


def test_tree_where_all_three_differ() -> None:
    edges = {
        "^": {"$": 0.3, "a": 0.5, "b": 0.2},  # $ -1.204
        "a": {"$": 0.6, "c": 0.4},  # a$ .3: -0.602, and two have ended; ac .2: -0.805, more than -1.204
        "b": {"d": 0.95, "$": 0.05},
        "c": {"$": 0.55, "e": 0.45},  # ac$ .11: -0.736
        "d": {"f": 0.5, "g": 0.45, "$": 0.05},  # bdf .095: -0.785 is less than -0.736, so the guess stops
        "e": {"$": 0.2, "x": 0.8},
        "f": {"h": 1.0},
        "h": {"$": 1.0},  # bdfh$ .095 over five: -0.471
    }
    options = {"length_penalty": 1.0, "max_new_tokens": 5}
    assert grow(edges, early_stopping=True, **options)[0] == ["a$", "$"]
    assert grow(edges, early_stopping=False, **options)[0] == ["a$", "ac$"]
    assert grow(edges, early_stopping="never", **options)[0] == ["bdfh$", "acexx"]


# ---- texts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_engine() -> Engine:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=32, vocab_size=257, init_std=0.2))
    model.init_weights(3)
    return Engine(model.eval(), byte_tokenizer())


def test_several_prompts_return_what_each_returns_alone(bytes_engine: Engine) -> None:
    prompts = ["a", "def main(", "once upon a time"]
    params = SamplingParams(num_beams=3, num_return=2, max_new_tokens=8, ignore_eos=True)
    together = complete(bytes_engine, prompts, params)
    assert [c.prompt for c in together] == [p for p in prompts for _ in range(2)]
    assert together == [c for p in prompts for c in complete(bytes_engine, [p], params)]
    assert all(c.score is not None and len(c.logprobs) == len(c.ids) == 8 for c in together)


def test_a_stop_string_ends_a_beam_and_is_cut_off(bytes_engine: Engine) -> None:
    params = SamplingParams(num_beams=3, max_new_tokens=8, ignore_eos=True)
    free = complete(bytes_engine, ["a"], params)[0]
    stop = free.text[2:4]
    params = SamplingParams(num_beams=3, num_return=3, max_new_tokens=8, ignore_eos=True, stop=[stop])
    stopped = complete(bytes_engine, ["a"], params)
    assert any(c.finish_reason == "stop" for c in stopped)
    for c in stopped:
        text = bytes_engine.tokenizer.decode(c.ids, skip_special=True)  # type: ignore[union-attr]
        assert (c.finish_reason == "stop") == (stop in text)
        assert c.text == text.split(stop)[0]


def test_the_end_of_text_is_scored_but_not_shown(bytes_engine: Engine) -> None:
    params = SamplingParams(num_beams=2, max_new_tokens=5, logit_bias={"<|endoftext|>": 20.0})
    done = complete(bytes_engine, ["abc"], params)[0]
    assert (done.text, done.ids, done.logprobs, done.finish_reason) == ("", [], [], "eos")
    assert done.eos_logprob is not None
    assert done.score == pytest.approx(done.eos_logprob + 20.0, abs=1e-4)
