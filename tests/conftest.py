"""Fixtures for all tests."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.config.schema import ModelConfig
from gptcli.model import GPT
from tests.forkserver import MESSAGE_BYTES, Forkserver

# Tiny models are fastest on one thread, and tests that run side by side do not fight for cores.
torch.set_num_threads(1)
# A job in a shell's background ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, so that none waits for it at the end."""
    items.sort(key=lambda item: "test_readme" not in item.nodeid)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that lies beside a developer's checkout; a user's clone has none."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache."""
    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def decode_tensor(entry: dict[str, Any]) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(base64.b64decode(entry["data"])), dtype=torch.float32)
    return raw.view(entry["shape"])


@pytest.fixture
def nano_sort(shared_data: Path) -> GPT:
    """A real trained model: sorts six digits out of three, which it takes as prompt."""
    tree = json.loads((shared_data / "weights/gpt-nano-sort/gpt-nano-sort-model.json").read_text())
    model = GPT(
        ModelConfig(
            n_layer=3,
            n_head=3,
            n_embd=48,
            context_length=11,
            vocab_size=3,
            vocab_pad_multiple=1,
            tie_embeddings=False,
        )
    ).eval()
    weights = {n.removeprefix("transformer."): decode_tensor(e) for n, e in tree.items() if n != "config"}
    model.load_state_dict({n: t for n, t in weights.items() if not n.endswith(".attn.bias")})
    return model


TINY = """\
# a tiny recipe
run: {{name: tiny, dir: {runs}}}
model: {{n_layer: 2, n_head: 2, n_embd: 16, context_length: 16, dropout: {dropout}}}
tokenizer: bytes
data: {{source: [{source}], val_fraction: 0.1}}
optim: {{lr: 1.0e-2, warmup_steps: 5}}
train: {{max_steps: {steps}, global_batch_size: 8, log_every: 1, eval_every: 10, eval_rows: 8, save_every: 10}}
"""


@dataclass(frozen=True)
class Tiny:
    """A recipe that trains in a second, and the folder it runs in; `name` is that of its run."""

    folder: Path
    recipe: Path
    stage: str = "pretrain"
    name: str = "tiny"
    runs: str = "runs"

    @property
    def run_dir(self) -> Path:
        return self.folder / self.runs / self.name

    def train(self, *overrides: str, **options: Any) -> dict[str, Any]:
        """Run the real stage in this process; options go to it (resume=..., console=...)."""
        from gptcli.config.load import load_recipe
        from gptcli.dist.runtime import Runtime
        from gptcli.stages.console import RunConsole
        from gptcli.stages.job import run_stage

        recipe = load_recipe(str(self.recipe), overrides, stage=self.stage)
        return run_stage(recipe, Runtime(), options.pop("console", RunConsole(quiet=True)), **options)

    def latest(self, run: str | None = None) -> Path:
        return self.folder / self.runs / (run or self.name) / "latest"

    def weights(self, run: str | None = None) -> dict[str, torch.Tensor]:
        """The model's, or the adapter's alone."""
        from safetensors.torch import load_file

        return {name: t for file in self.latest(run).glob("*.safetensors") for name, t in load_file(file).items()}

    def metrics(self, run: str | None = None) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl without what a clock decides."""
        lines = (self.latest(run).parent / "metrics.jsonl").read_text().splitlines()
        timed = ("tokens_per_second", "mfu")
        return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return make_tiny(tmp_path)


def make_tiny(folder: Path, *, steps: int = 30, dropout: float = 0.0) -> Tiny:
    source = folder / "text.txt"
    source.write_text("".join(f"line {i}: the square of {i} is {i * i}.\n" for i in range(400)))
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY.format(runs=folder / "runs", source=source, steps=steps, dropout=dropout))
    return Tiny(folder, recipe)


def gpt(
    *arguments: str | Path, cwd: Path | None = None, stdin: bytes | None = None, timeout: float = 600, **env: str
) -> Finished:
    """Run the real command line in a process of its own, on one thread."""
    command, given = list(map(str, arguments)), stdin or b""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    long = sum(map(len, (*command, *environment, *environment.values()))) > MESSAGE_BYTES
    if long or "OMP_NUM_THREADS" in env:  # which is read once, when torch starts
        done = subprocess.run(
            [sys.executable, "-m", "gptcli", *command],
            input=given,
            capture_output=True,
            cwd=cwd,
            env=environment,
            timeout=timeout,
            check=False,
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = _forkserver().run(command, cwd=cwd, environment=environment, stdin=given, timeout=timeout)
    return Finished(code, out.decode(), err.decode())


@cache
def _forkserver() -> Forkserver:
    return Forkserver()


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one object on stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out)
