"""A text's own tokens, scored as the model's forward scores them."""

from __future__ import annotations

import pytest
import torch

from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.generate.scoring import score_prompt
from tests.model.test_gpt import SHAPES, make, tokens


@pytest.mark.parametrize("name", SHAPES)
def test_scores_are_those_of_the_forward(name: str) -> None:
    model, row = make(name), tokens(1, 20)
    scored = score_prompt(Engine(model), row[0].tolist(), top_logprobs=3)
    assert ([t.id for t in scored], scored[0].logprob) == (row[0].tolist(), None)
    expected = model(row[:, :-1], targets=row[:, 1:]).logprobs[0]
    torch.testing.assert_close(torch.tensor([t.logprob for t in scored[1:]]), expected, atol=1e-5, rtol=1e-5)
    best = model(row).logits[0, :-1].log_softmax(-1).topk(3)
    assert [[i for i, _ in t.top] for t in scored[1:]] == best.indices.tolist()


def test_the_last_token_is_not_read() -> None:
    engine, ids = Engine(make("gpt2")), tokens(1, 26)[0].tolist()
    assert len(score_prompt(engine, ids[:25])) == 25  # a context of 24, and what follows it
    with pytest.raises(UserError, match="26 tokens exceed the context of 24"):
        score_prompt(engine, ids)


def test_the_first_token_alone_and_none() -> None:
    engine = Engine(make("gpt2"))
    assert [(t.id, t.logprob) for t in score_prompt(engine, [5])] == [(5, None)]
    assert score_prompt(engine, []) == []
