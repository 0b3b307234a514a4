"""A score is that of the last real token; reward models of other tokenizers; where a response ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.config.tuning import RolloutBlock
from gptcli.model import GPT
from gptcli.modeldir import save_model
from gptcli.rlhf.rewards import Normalization, RewardModel, Sample, last_scores, score_rows
from gptcli.rlhf.rollout import end_ids, truncate
from gptcli.rlhf.sequences import pad_rows
from gptcli.tokenizer.build import byte_tokenizer, char_tokenizer

CONFIG = ModelConfig(
    n_layer=2, n_head=2, n_embd=16, context_length=32, vocab_size=257, scalar_heads={"reward": 1}, init_std=0.2
)
EOS = 256


def reward_model(folder: Path, tokenizer, config: ModelConfig = CONFIG) -> GPT:
    model = GPT(config).eval()
    model.init_weights(1)
    folder.mkdir()
    save_model(folder, config, dict(model.named_parameters()), tokenizer)
    return model


def test_padding_and_neighbours_change_no_score() -> None:
    """An empty response and one without end among them."""
    model = GPT(CONFIG).eval()
    model.init_weights(1)
    rows = [[1, 2, 3, EOS], [1, 2, EOS], [9, 8, 7, 6, 5, 4], [3]]
    with torch.no_grad():
        alone = torch.cat([last_scores(model, torch.tensor([row])) for row in rows])
        right, mask = pad_rows(rows, EOS, 9), pad_rows([[1] * len(row) for row in rows], 0, 9)
        left = torch.tensor([[EOS] * (9 - len(row)) + row for row in rows])
        for tokens, keep in ((right, mask), (left, mask.flip(1))):
            assert torch.allclose(last_scores(model, tokens, keep), alone, atol=1e-5)
    assert torch.allclose(score_rows(model, rows), alone, atol=1e-5)


def test_a_normalization_is_stored_and_undoes_shift_and_scale(tmp_path: Path) -> None:
    scores = torch.tensor([1.0, 3.0, 5.0, 11.0])
    Normalization.of(scores).save(tmp_path)
    ours = Normalization.load(tmp_path)(scores)
    assert ours.mean().item() == pytest.approx(0, abs=1e-6)
    assert ours.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert Normalization.load(tmp_path / "elsewhere") == Normalization()
    assert Normalization.of(torch.ones(4)).std == 1.0


def test_a_reward_model_of_another_tokenizer_reads_the_text_anew(tmp_path: Path) -> None:
    theirs = byte_tokenizer()
    model = reward_model(tmp_path / "rm", theirs)
    ours = char_tokenizer(["abc?"])
    sample = Sample(ours.encode("ab?"), [*ours.encode("ca"), ours.eos_id], "ab?", "ca", True)
    expected = score_rows(model, [[*b"ab?ca", EOS]])
    found = RewardModel(str(tmp_path / "rm"), ours, torch.device("cpu"), torch.float32)([sample])
    assert torch.allclose(found, expected)
    unended = Sample(sample.prompt_ids, sample.response_ids[:-1], "ab?", "ca", False)
    found = RewardModel(str(tmp_path / "rm"), ours, torch.device("cpu"), torch.float32)([unended])
    assert torch.allclose(found, score_rows(model, [[*b"ab?ca"]]))


def test_a_reward_model_of_another_tokenizer_reads_what_begins_a_prompt(tmp_path: Path) -> None:
    """As in its training: bos where its tokenizer adds one, and what stands for an empty prompt."""
    theirs = byte_tokenizer()
    model = reward_model(tmp_path / "rm", theirs)
    ours = char_tokenizer(["abc?"])
    empty = Sample([], ours.encode("ca"), "", "ca", False)
    found = RewardModel(str(tmp_path / "rm"), ours, torch.device("cpu"), torch.float32)([empty])
    assert torch.allclose(found, score_rows(model, [[EOS, *b"ca"]]))


@pytest.mark.parametrize(
    ("ids", "ends", "after", "kept"),
    [
        ([1, 2, 3], [9], 0, 3),
        ([1, 9, 3], [9], 0, 2),
        ([9, 2, 3], [9], 0, 1),
        ([9, 2, 9, 4], [9], 1, 3),
        ([1, 9, 3], [9], 2, 3),
        ([1, 2, 9], [9], 2, 3),
        ([1, 8, 9], [8, 9], 0, 2),
        ([1, 2], [], 0, 2),
    ],
)
def test_a_response_ends_at_the_first_stop_from_its_place_on(
    ids: list[int], ends: list[int], after: int, kept: int
) -> None:
    assert truncate(ids, ends, after) == ids[:kept]


def test_what_ends_a_response() -> None:
    block = RolloutBlock(rollout_batch_size=1, stop_token=".")
    assert end_ids(byte_tokenizer(), SamplingParams(), block) == [EOS, ord(".")]
    assert end_ids(byte_tokenizer(), SamplingParams(ignore_eos=True), block) == [ord(".")]
    assert end_ids(byte_tokenizer(), SamplingParams(ignore_eos=True), RolloutBlock(rollout_batch_size=1)) == []
