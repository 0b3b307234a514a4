"""Clean code passes every check; ten faults, one for each promise, are each caught by their check."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from gptcli.config.schema import ModelConfig
from gptcli.doctor import subject as subjects
from gptcli.doctor.checks import CHECKS
from gptcli.doctor.examine import Finding, examine, pick_checks
from gptcli.doctor.subject import Subject, random_model, split_batch, uneven_batch
from gptcli.errors import UserError
from gptcli.model import GPT
from gptcli.modeldir import open_model_dir, save_model
from tests.doctor.faults import FAULTS

CPU = torch.device("cpu")
LLAMA = ModelConfig(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=32, context_length=64, vocab_size=96, norm="rmsnorm", activation="swiglu",
    position="rope", bias=False, tie_embeddings=False, init_std=0.1,
)  # fmt: skip
GPT3 = ModelConfig(
    n_layer=2, n_head=2, n_embd=32, context_length=40, vocab_size=96, attention_pattern="alternating", band_width=7,
    init_std=0.1,
)  # fmt: skip
ALIBI = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=16, vocab_size=9, position="alibi", init_std=0.1)
QUICK = [name for name in CHECKS if name != "two processes"]  # two further interpreters take seconds


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(random_model(tmp_path), CPU)


def model_dir(config: ModelConfig, folder: Path) -> Subject:
    model = GPT(config)
    model.init_weights(seed=1)
    save_model(folder, config, dict(model.named_parameters()), None)
    return Subject(open_model_dir(folder), CPU)


def findings(subject: Subject, *names: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(subject, pick_checks(names))}


def test_clean_code_passes(subject: Subject) -> None:
    found = findings(subject, *QUICK)
    assert list(found) == QUICK
    assert all(finding.passed for finding in found.values()), found


@pytest.mark.parametrize("config", [LLAMA, GPT3, ALIBI], ids=["llama", "gpt3", "alibi"])
def test_other_shapes_pass_or_say_why_not(config: ModelConfig, tmp_path: Path) -> None:
    found = findings(model_dir(config, tmp_path), *QUICK)
    skipped = {name: finding.note for name, finding in found.items() if finding.passed is None}
    assert not [finding for finding in found.values() if finding.passed is False], found
    assert list(skipped) == ([] if config is LLAMA else ["exported"])
    assert all(skipped.values())


def test_there_is_a_fault_for_every_check() -> None:
    assert FAULTS.keys() == CHECKS.keys()
    assert len(FAULTS) == 11


@pytest.mark.parametrize("name", QUICK)
def test_its_fault_is_caught(name: str, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    finding = findings(subject, name)[name]
    assert finding.passed is False
    assert finding.figure is None or finding.figure > 1.5 * CHECKS[name].tolerance  # no close call
    assert (finding.figure is None) == (name == "exported")  # which refuses what its own proof finds wrong
    assert finding.figure is not None or "the logits differ" in finding.note


@pytest.mark.slow
def test_two_processes_agree_with_one_and_a_fault_is_caught(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(subject, "two processes")["two processes"].passed
    FAULTS["two processes"](monkeypatch)
    finding = findings(subject, "two processes")["two processes"]
    assert finding.passed is False
    assert finding.figure is not None
    assert finding.figure > 0.01


def test_a_check_that_breaks_has_failed_and_nan_has_too(subject: Subject) -> None:
    def breaks(_: Subject) -> float:
        raise RuntimeError("out of\npatience")

    broken = dataclasses.replace(CHECKS["saved"], measure=breaks)
    nan = dataclasses.replace(CHECKS["saved"], measure=lambda _: float("nan"))
    first, second = examine(subject, [broken, nan])
    assert (first.passed, first.figure) == (False, None)
    assert "patience" in first.note
    assert second.passed is False


def test_the_checks_leave_the_model_as_it_is(subject: Subject) -> None:
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    findings(subject, "accumulated", "overfitted", "exported")
    assert all(torch.equal(before[name], p) for name, p in subject.model.named_parameters())


def test_micro_batches_have_unequal_weights_that_add_up() -> None:
    batch = uneven_batch(50, 4, 16)
    parts = split_batch(batch, [1, 2, 1])
    assert sum(part.weight for part in parts) == batch.weight
    assert len({part.weight / len(part["tokens"]) for part in parts}) == 3
    counts = batch["targets"][:, :-1] >= 0
    assert torch.equal(batch["tokens"][:, 1:][counts], batch["targets"][:, :-1][counts])


def test_what_cannot_be_examined_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="doctor needs 8"):
        model_dir(dataclasses.replace(ALIBI, context_length=subjects.SHORTEST - 1), tmp_path)
    with pytest.raises(UserError, match="did you mean 'cached'"):
        pick_checks(["cache"])
