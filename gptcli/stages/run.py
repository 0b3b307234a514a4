"""A training run as every stage lives it: logging, validation, samples, checkpoints and resume around train()."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptcli import __version__
from gptcli.config.flops import flops_per_token_with_attention
from gptcli.config.plan import TrainPlan
from gptcli.config.schema import Recipe
from gptcli.contracts import Batch, BatchSource, Objective
from gptcli.dist.runtime import Runtime
from gptcli.dist.wrap import parallelize
from gptcli.errors import GptError, UserError
from gptcli.generate import Engine, complete
from gptcli.generate.engine import Prompt
from gptcli.generate.processors import Processors
from gptcli.model import GPT
from gptcli.modeldir import save_adapter, save_model
from gptcli.stages.console import RunConsole
from gptcli.tokenizer import Tokenizer
from gptcli.train.checkpoint import Training, find_checkpoint, prune, save_checkpoint, what_is_kept
from gptcli.train.loop import Every, StepResult, evaluate, train
from gptcli.train.metrics import Logger, MetricsFile, Speed, TensorBoardLogger, cut_after, peak_flops, read_metrics
from gptcli.train.optim import Optimizers
from gptcli.train.plot import braille_chart, save_loss_png
from gptcli.train.state import TrainState

SAMPLES = "samples.jsonl"


@dataclass
class TrainingRun:
    """The built parts of a stage; `execute` trains and returns the summary that --json prints.

    A stage may validate by figures of its own (`measure(step)`: val_loss and others) instead of the objective's loss on
    `held_out`, log more of a step (`figures`), and put files of its own beside the model (`beside`).
    """

    recipe: Recipe
    runtime: Runtime
    console: RunConsole
    run_dir: Path
    model: GPT
    tokenizer: Tokenizer
    optimizer: Optimizers
    plan: TrainPlan
    dtype: torch.dtype
    source: BatchSource
    objective: Objective
    held_out: Sequence[Batch]
    data_hash: str
    sample_prompt: Prompt | None = None  # left out: train.sample_prompt as it is
    resumed: Training | None = None
    measure: Callable[[int], dict[str, Any]] | None = None
    figures: Callable[[], Mapping[str, float]] = dict
    beside: Callable[[Path], None] | None = None
    state: TrainState = field(default_factory=TrainState)

    def execute(self) -> dict[str, Any]:
        # Whatever is wrong with the sampling of samples is said now, not at the first of them.
        Processors(self.recipe.sampling, self.model.vocab_size, self.tokenizer)
        self._eval_every = self.plan.epoch_steps or self.recipe.train.eval_every
        if self.resumed is not None:
            self.state = self.resumed.state
            self.state.stopped = self._out_of_patience(self.state.step)  # as the recipe says now
            self.source.load_state_dict(self.resumed.source)
            self.optimizer.load_state_tensors(self.resumed.optimizer)
        self._validated: dict[str, Any] = {}
        self._saved_step = self.state.step
        self._row: dict[str, Any] = {}
        self._fresh = self.resumed is None and self.recipe.init_from is None and self.recipe.stage == "pretrain"
        self._loggers = self._open_loggers()
        if self.runtime.is_main:
            cut_after(self.run_dir / SAMPLES, self.state.step)
        flops = flops_per_token_with_attention(self.model.config, self.plan.seq_len)
        self._speed = Speed(flops, self.runtime.world_size, peak_flops(self.runtime.device))
        self._speed.restart(self.state.tokens_seen)
        self._began, self._began_at = (
            time.perf_counter(),
            self.plan.progress(self.state.step, self.state.tokens_seen),
        )
        self._tokens_before, self._aside = self.state.tokens_seen, 0.0
        if self.plan.is_done(self.state.step, self.state.tokens_seen):
            self.console.say(f"the run has had all of its {self.state.step:,} steps (-s train.max_steps=N: more)")
        try:
            with self.console:
                self._train()
        except UserError:  # between two steps, from a source that left everything as the last step made it
            self._save()
            raise
        finally:
            self._close_loggers()
        return self._finish()

    def _train(self) -> None:
        t = self.recipe.train
        train(
            parallelize(self.model, self.recipe, self.runtime),
            self.optimizer,
            self.source,
            self.objective,
            self.state,
            self.plan,
            self.runtime,
            seed=self.recipe.run.seed,
            dtype=self.dtype,
            every=[
                Every(1 if self._fresh else 0, self._compare_first_loss),
                Every(self._eval_every, self._validate, at_end=self._eval_every > 0),
                Every(t.log_every, self._log, at_end=t.log_every > 0),
                Every(t.sample_every, self._sample),
                Every(1, self._save_best),
                Every(t.save_every, self._save, at_end=True),
            ],
        )

    # ---- what happens every so often --------------------------------------------------------------------------

    def _compare_first_loss(self, result: StepResult) -> None:
        """A fresh model knows nothing: its first loss is near ln(vocabulary), or something is wrong."""
        if result.step != 1:
            return
        loss, expected = self._mean_loss(result), math.log(self.model.vocab_size)
        if abs(loss - expected) > 0.15 * expected:
            self.console.say(
                f"surprise: the first loss is {loss:.2f}, but a fresh model's should be near "
                f"ln({self.model.vocab_size}) = {expected:.2f}; look at model.init_std and at the data"
            )

    def _mean_loss(self, result: StepResult) -> float:
        return self.runtime.all_sum(result.loss_sum).item() / max(result.weight, 1.0)

    def _validate(self, result: StepResult) -> None:
        if not self.held_out and self.measure is None:
            return
        with self._not_training():
            self._validated = self._measured()
        val_loss = self._validated["val_loss"]
        if self.state.best_val_loss is None or val_loss < self.state.best_val_loss:
            self.state.best_val_loss, self.state.best_step = val_loss, result.step
        if self._out_of_patience(result.step):
            self.state.stopped = True
            validations = f"{self.recipe.train.patience} validations were no better"
            self.console.say(f"stopping: {validations} than that of step {self.state.best_step or 0}")
        if self.recipe.train.log_every == 0 or result.step % self.recipe.train.log_every:
            self._log(result)

    def _out_of_patience(self, step: int) -> bool:
        patience = self.recipe.train.patience
        return patience > 0 and step - (self.state.best_step or 0) >= patience * self._eval_every

    def _measured(self) -> dict[str, Any]:
        if self.measure is not None:
            return self.measure(self.state.step)
        return {"val_loss": evaluate(self.model, self.held_out, self.objective, self.runtime, dtype=self.dtype)}

    def _log(self, result: StepResult) -> None:
        if self._row.get("step") == result.step:
            return
        loss = self._mean_loss(result)
        rate, mfu = self._speed.read(self.state.tokens_seen)
        self._row = {
            "step": result.step,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm.item(),
            "tokens": self.state.tokens_seen,
            "tokens_per_second": round(rate, 1),
            "mfu": None if mfu is None else round(mfu, 4),
        }
        for name, value in result.metric_sums.items():
            self._row[name] = self.runtime.all_sum(value).item() / max(result.weight, 1.0)
        self._row |= self.figures()
        self._row |= self._validated
        self._validated = {}
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        for logger in self._loggers:
            logger.write(self._row)
        progress = self.plan.progress(self.state.step, self.state.tokens_seen)
        passed, done = time.perf_counter() - self._began, progress - self._began_at
        left = passed * (1 - progress) / done if done > 0 and result.step > 1 else None
        self.console.step(self._row, progress, left)

    def _sample(self, result: StepResult) -> None:
        # A text grows with every token: each length would be compiled, until torch gives up on the model altogether.
        with self._not_training(), torch.compiler.set_stance("force_eager"):
            self.model.eval()
            engine = Engine(self.model, self.tokenizer)
            prompt = self.recipe.train.sample_prompt if self.sample_prompt is None else self.sample_prompt
            completion = complete(engine, [prompt], self.recipe.sampling)[0]
            self.model.train()
        if self.runtime.is_main:
            row = {"step": result.step, "prompt": completion.prompt, "text": completion.text}
            with (self.run_dir / SAMPLES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.console.say(f"--- sample at step {result.step}\n{completion.prompt}{completion.text}\n---")

    def _save_best(self, result: StepResult) -> None:
        if self.state.best_step == result.step:
            self._save(result)

    def _save(self, result: StepResult | None = None) -> None:
        if self._saved_step == self.state.step:
            return
        if self.runtime.all_sum(self._not_finite()).item():
            raise self._diverged("there are weights that are no finite numbers")
        self._saved_step = self.state.step
        with self._not_training():
            if self.runtime.is_main:
                best = self.state.best_step == self.state.step
                save_checkpoint(self.run_dir, self._training(), self._write_model, best=best)
                prune(self.run_dir, self.recipe.train.save_every, self.recipe.train.keep_last)
            self.runtime.barrier()

    def _not_finite(self) -> torch.Tensor:
        trained = [p.detach() for p in self.model.parameters() if p.requires_grad]
        return torch.stack([(~p.isfinite()).any() for p in trained]).any().float()

    def _diverged(self, how: str) -> GptError:
        return GptError(
            f"step {self.state.step}: {how}; {what_is_kept(self.run_dir)}. "
            "A smaller optim.lr or a longer warmup usually helps"
        )

    def _training(self) -> Training:
        optimizer = {name: t.detach().cpu().contiguous() for name, t in self.optimizer.state_tensors().items()}
        facts = {
            "tokenizer_hash": self.tokenizer.hash,
            "data_hash": self.data_hash,
            "parent": self.recipe.init_from,
            "gptcli": __version__,
            "torch": torch.__version__,
        }
        return Training(self.state, self.source.state_dict(), optimizer, facts)

    def _write_model(self, folder: Path) -> None:
        config, lora = self.model.config, self.recipe.lora
        if lora is None:
            save_model(folder, config, dict(self.model.named_parameters()), self.tokenizer)
        else:
            assert self.recipe.init_from is not None
            base = find_checkpoint(self.recipe.init_from)
            save_adapter(folder, self.model, lora, self.tokenizer, base=base)
        if self.beside is not None:
            self.beside(folder)

    # ---- beginning and end ------------------------------------------------------------------------------------

    def _open_loggers(self) -> list[Logger]:
        if not self.runtime.is_main:
            return []
        loggers: list[Logger] = [MetricsFile(self.run_dir / "metrics.jsonl", self.state.step)]
        if "tensorboard" in self.recipe.train.loggers:
            loggers.append(TensorBoardLogger(self.run_dir / "tensorboard", self.state.step))
        return loggers

    def _close_loggers(self) -> None:
        for logger in self._loggers:
            if isinstance(logger, MetricsFile):
                logger.close()

    @contextlib.contextmanager
    def _not_training(self) -> Iterator[None]:
        """Time spent here is left out of the throughput."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._aside += seconds
        self._speed.skip(seconds)

    def _finish(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._began - self._aside
        rate = (self.state.tokens_seen - self._tokens_before) / max(seconds, 1e-9)
        rows: list[dict[str, Any]] = []
        if self.runtime.is_main:
            rows = read_metrics(self.run_dir / "metrics.jsonl")
            self._draw(rows)
        last: dict[str, Any] = next((r for r in reversed(rows) if "val_loss" in r), {"val_loss": None})
        latest = self.run_dir / "latest"
        return {
            "run_dir": str(self.run_dir),
            "checkpoint": str(latest.resolve().relative_to(Path.cwd())) if _inside(latest) else str(latest.resolve()),
            "step": self.state.step,
            "tokens": self.state.tokens_seen,
            "train_loss": rows[-1]["loss"] if rows else None,
            **{name: value for name, value in last.items() if name.startswith("val_")},
            "best_val_loss": self.state.best_val_loss,
            "tokens_per_second": round(rate, 1),
            "mfu": self._row.get("mfu"),
            "train_seconds": round(seconds, 1),
        }

    def _draw(self, rows: list[dict[str, Any]]) -> None:
        if len(rows) < 2:
            return
        unit = " (nats per token)" if self.recipe.stage in ("pretrain", "sft") else ""
        save_loss_png(rows, self.run_dir / "loss.png", str(self.recipe.run.name), f"loss{unit}")
        if self.console.console.is_terminal:
            for line in braille_chart([r["loss"] for r in rows]):
                self.console.say(line)


def _inside(path: Path) -> bool:
    return path.resolve().is_relative_to(Path.cwd())
