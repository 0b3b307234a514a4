"""What the stages share: compiling, and what a dry run or a refused one leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gptcli.errors import UserError
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


def test_a_dry_run_and_a_refused_one_leave_nothing(tiny: Tiny) -> None:
    tiny.train("train.max_steps=1", dry_run=True)
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        tiny.train("data.source=[nowhere.txt]")
    with pytest.raises(UserError, match="does not divide"):
        tiny.train("train.micro_batch_size=3")
    assert not (tiny.folder / "runs").exists()
