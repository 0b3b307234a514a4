"""gptcli.load: a model in a notebook."""

from __future__ import annotations

import pytest
import torch

import gptcli
from gptcli.api import LoadedModel
from tests.serve.clients import make_engine, save_engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return gptcli.load(save_engine(make_engine(), tmp_path_factory.mktemp("loaded")), device="cpu", precision="fp32")


def test_a_text_is_scored_from_its_beginning(model: LoadedModel) -> None:
    scored = model.score("été")
    assert [token.id for token in scored] == list("été".encode())
    assert [token.text for token in scored] == ["", "é", "t", "", "é"]  # a character comes with its last byte
    row = torch.tensor([[256, *"été".encode()]])
    expected = model.forward(row[:, :-1], targets=row[:, 1:]).logprobs[0].tolist()
    assert [token.logprob for token in scored] == pytest.approx(expected, abs=1e-5)


def test_how_long_a_text_may_be(model: LoadedModel) -> None:
    assert model.score("") == []
    for length in (1, 128, 129, 400):  # beyond the context, in windows
        assert len(model.score("a" * length)) == length
