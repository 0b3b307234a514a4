"""The next token, sampling's view of it, and the logit lens."""

from __future__ import annotations

import math

import pytest
import torch

from gptcli.config.schema import SamplingParams
from gptcli.inspect.capture import residual_stream
from gptcli.inspect.predict import entropy, layer_names, lens, next_logits, sampled_probabilities
from tests.model.test_gpt import SHAPES, make, tokens

IDS = tokens(1, 20)[0].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_the_next_token_is_the_last_row_of_the_logits(name: str) -> None:
    model = make(name)
    torch.testing.assert_close(next_logits(model, IDS), model(torch.tensor([IDS])).logits[0, -1])


def test_a_long_text_is_seen_as_generation_sees_it() -> None:
    model, ids = make("gpt2"), tokens(1, 31)[0].tolist()  # a context of 24 slides by 12
    torch.testing.assert_close(next_logits(model, ids), next_logits(model, ids[12:]))


@pytest.mark.parametrize("name", SHAPES)
def test_the_last_layers_lens_is_the_model(name: str) -> None:
    model = make(name)
    stream, logits = residual_stream(model, IDS)
    by_layer = lens(model, stream)
    assert by_layer.shape == (len(layer_names(model)), 20, 37)
    torch.testing.assert_close(by_layer[-1], logits)
    assert not torch.allclose(by_layer[0], logits)


def test_the_lens_of_a_middle_layer_is_the_model_without_the_rest() -> None:
    model = make("gpt2")
    stream, _ = residual_stream(model, IDS)
    model.h = model.h[:2]
    torch.testing.assert_close(lens(model, stream)[2], model(torch.tensor([IDS])).logits[0])


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [math.log(3), 0, -math.inf, -math.inf]])
    expected = [math.log(4), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    assert entropy(logits).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.5, 0.3, 0.2]),
        ({"temperature": 0.0}, [1, 0, 0]),
        ({"temperature": 0.5}, [25 / 38, 9 / 38, 4 / 38]),
        ({"top_p": 0.6}, [5 / 8, 3 / 8, 0]),
        ({"top_k": 1}, [1, 0, 0]),
    ],
)
def test_what_sampling_makes_of_it(sampling: dict[str, float], expected: list[float]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert sampled_probabilities(logits, SamplingParams(**sampling)).tolist() == pytest.approx(expected)
