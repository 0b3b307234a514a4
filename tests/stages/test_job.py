"""What the stages share: compiling, and what a dry run or a refused one leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gptcli.errors import UserError
from gptcli.files import open_locked
from gptcli.model import GPT
from gptcli.stages import job
from tests.conftest import Tiny


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every graph that would be compiled, without the compiler."""
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(job, "has_cpp_compiler", lambda: True)
    monkeypatch.setattr(GPT, "compile", lambda self, **how: nn.Module.compile(self, backend=backend, **how))
    torch.compiler.reset()
    return found


@pytest.mark.parametrize(("wanted", "compiled"), [("true", True), ("auto", False)])
def test_a_compiled_model_is_compiled_once_however_often_it_writes(
    tiny: Tiny, graphs: list[Any], wanted: str, compiled: bool
) -> None:
    once = ("train.max_steps=3", "train.eval_every=0", f"train.compile={wanted}")
    tiny.train(*once, "run.name=silent")
    silent = len(graphs)
    assert bool(silent) == compiled
    torch.compiler.reset()
    tiny.train(*once, "run.name=writing", "train.sample_every=1")
    assert len(graphs) == 2 * silent
    assert all(torch.equal(t, tiny.weights("writing")[n]) for n, t in tiny.weights("silent").items())


def test_a_run_is_written_by_one_process(tiny: Tiny) -> None:
    tiny.train("train.max_steps=1")
    with open_locked(tiny.run_dir / ".lock"):
        for how in ({}, {"resume": tiny.run_dir}):
            with pytest.raises(UserError, match=r"runs/tiny: another process is writing it"):
                tiny.train("train.max_steps=2", **how)
    tiny.train("train.max_steps=2", resume=tiny.run_dir)


def test_a_run_that_ended_before_its_first_save_is_begun_anew(tiny: Tiny) -> None:
    folder = tiny.folder / "runs/tiny"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("stage: pretrain\n")
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    with pytest.raises(UserError, match="has not saved a checkpoint yet; begin it again, without --resume"):
        tiny.train("train.max_steps=2", resume=folder)
    tiny.train("train.max_steps=2")
    assert [row["step"] for row in tiny.metrics()] == [1, 2]


def test_a_folder_of_something_else_is_no_run(tiny: Tiny) -> None:
    (tiny.folder / "runs/tiny").mkdir(parents=True)
    (tiny.folder / "runs/tiny/thesis.tex").touch()
    with pytest.raises(UserError, match="holds something else than a run"):
        tiny.train()


def test_a_dry_run_and_a_refused_one_leave_nothing(tiny: Tiny) -> None:
    tiny.train("train.max_steps=1", dry_run=True)
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        tiny.train("data.source=[nowhere.txt]")
    with pytest.raises(UserError, match="does not divide"):
        tiny.train("train.micro_batch_size=3")
    assert not (tiny.folder / "runs").exists()
