"""`gpt rlhf-reward`: a scalar head on a checkpoint learns which of two answers people prefer."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.schema import RewardRecipe, SamplingParams
from gptcli.dist.runtime import Runtime, pick_precision
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.modeldir import load_model, open_model_dir
from gptcli.randomness import derive
from gptcli.rlhf.calibration import histogram, judge_scores
from gptcli.rlhf.comparisons import ComparisonSource, whole_rows
from gptcli.rlhf.preferences import Comparison
from gptcli.rlhf.rewards import HEAD, Normalization, score_rows
from gptcli.rlhf.sequences import pass_order
from gptcli.stages.build import open_run_dir, pick_plan, pinned, start_model
from gptcli.stages.console import RunConsole
from gptcli.stages.frozen import builder, fingerprint
from gptcli.stages.preferences import read_preferences
from gptcli.stages.run import TrainingRun
from gptcli.train.checkpoint import find_checkpoint
from gptcli.train.objectives.reward import BradleyTerry
from gptcli.train.optim import make_optimizer


def run(
    recipe: RewardRecipe,
    runtime: Runtime,
    console: RunConsole,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train and return the summary. `resume` is a run directory whose latest checkpoint to go on from."""
    recipe = pinned(recipe)
    assert recipe.init_from is not None
    with tempfile.TemporaryDirectory(prefix="gpt-dry-run-") if dry_run else nullcontext() as scratch:
        folder = open_model_dir(find_checkpoint(recipe.init_from))
        tokenizer, dtype = folder.require_tokenizer(), pick_precision(recipe.train.precision, runtime.device)
        reference = Engine(load_model(folder, device=runtime.device), tokenizer, dtype=dtype)
        data, data_hash = read_preferences(recipe, reference, console.say), fingerprint(recipe)
        head = {HEAD: 1 / math.sqrt(folder.config.n_embd + 1)}
        build = builder(recipe, head, tokenizer, runtime, console.say)
        model, resumed = start_model(recipe, tokenizer, data_hash, runtime, console.say, resume=resume, build=build)
        if model.lm_head is not None:
            model.lm_head.requires_grad_(False)  # the words it would write are no part of the loss
        samples: list[list[int]] = []
        if recipe.reward.normalize:
            samples = reference_samples(recipe, reference, data.train, runtime)
            if resumed is None and HEAD not in folder.config.scalar_heads:
                fold(Normalization.of(score_rows(model, samples, dtype=dtype)), model)
        plan = pick_plan(recipe, model.config, runtime, console.say, dtype=dtype, texts_per_row=data.most)
        run_dir = Path(scratch) if scratch else open_run_dir(recipe, runtime, resume=resume is not None)

        def measure() -> dict[str, Any]:
            scores = shared_scores(model, data.held_out, runtime, dtype)
            if runtime.is_main:
                text = json.dumps(histogram(scores, data.held_out), indent=2)
                (run_dir / "scores.json").write_text(text + "\n", "utf-8")
            return judge_scores(scores, data.held_out)

        def beside(checkpoint: Path) -> None:
            if samples:
                Normalization.of(score_rows(model, samples, dtype=dtype)).save(checkpoint)

        training = TrainingRun(
            recipe=recipe,
            runtime=runtime,
            console=console,
            run_dir=run_dir,
            model=model,
            tokenizer=tokenizer,
            optimizer=make_optimizer(model, recipe.optim, model.hidden_matrices()),
            plan=plan,
            dtype=dtype,
            source=ComparisonSource(data.train, whole_rows, plan, runtime, recipe.run.seed),
            objective=BradleyTerry(recipe.reward.margins),
            held_out=[],
            data_hash=data_hash,
            resumed=resumed,
            measure=measure if data.held_out else None,
            beside=beside,
        )
        return training.execute()


def reference_samples(
    recipe: RewardRecipe, reference: Engine, comparisons: list[Comparison], runtime: Runtime
) -> list[list[int]]:
    """Whole rows that the checkpoint itself writes after prompts of the data; the same in every process."""
    limit = reference.model.config.context_length
    order = pass_order(len(comparisons), recipe.run.seed, "normalize", range(recipe.reward.normalize_samples))
    new = min(recipe.sampling.max_new_tokens, max(1, limit // 2))
    params = SamplingParams(max_new_tokens=new, seed=derive(recipe.run.seed, "normalize"))
    rows = [comparisons[i].prompt[new - limit :] for i in order]
    for token in reference.tokens(rows.copy(), params, logprobs=False):
        place = int(token.key)  # type: ignore[call-overload]
        rows[place] = [*rows[place], token.id]
    return rows


def fold(normalization: Normalization, model: GPT) -> None:
    """Put it into the head, before training."""
    weight, bias = (model.get_parameter(f"scalar_heads.{HEAD}.{name}") for name in ("weight", "bias"))
    with torch.no_grad():
        weight.div_(normalization.std)
        bias.sub_(normalization.mean).div_(normalization.std)


def shared_scores(model: GPT, comparisons: list[Comparison], runtime: Runtime, dtype: torch.dtype) -> Tensor:
    """The scores (N,) of all responses in order, each process having done its share."""
    rows = [row for c in comparisons for row in c.rows]
    scores = torch.zeros(len(rows))
    mine = slice(runtime.dp_rank, None, runtime.dp_size)
    scores[mine] = score_rows(model, rows[mine], dtype=dtype)
    return runtime.all_sum(scores.to(runtime.device)).cpu()
