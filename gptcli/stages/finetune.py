"""`gpt finetune`: a language model and labelled examples in, a classifier (or scorer, or chooser) out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gptcli.config.schema import FinetuneRecipe
from gptcli.data.examples import Example, Examples, open_examples, report_skipped
from gptcli.data.taskrows import TaskData, TaskEncoder, TaskSource
from gptcli.data.tasks import HEAD, SPECIAL_TOKENS, Task, TaskExample, check_label, make_task, parse_example
from gptcli.dist.runtime import Runtime, pick_precision
from gptcli.errors import UserError
from gptcli.eval.finetune import measure
from gptcli.model import GPT
from gptcli.model.extend import add_task_head, add_token_rows
from gptcli.model.lora import add_lora
from gptcli.modeldir import model_of, open_model_dir
from gptcli.stages.build import build_model, compile_model, open_run_dir, pick_plan, pinned, start_model
from gptcli.stages.console import RunConsole
from gptcli.stages.run import TrainingRun
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.resolve import resolve_tokenizer
from gptcli.train.checkpoint import find_checkpoint
from gptcli.train.objectives.finetune import finetune_objective
from gptcli.train.optim import make_optimizer


def run(
    recipe: FinetuneRecipe,
    runtime: Runtime,
    console: RunConsole,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train and return the summary. `resume` is a run directory whose latest checkpoint to go on from."""
    recipe, block = pinned(recipe), recipe.finetune
    examples = _read(recipe)
    task = make_task(block, (example.value for example in examples.train), recipe.data.columns)
    base = _base_tokenizer(recipe, examples, console.say)
    tokenizer = base.with_tokens(SPECIAL_TOKENS)
    build = partial(_build, recipe, task, base, tokenizer, runtime, console.say)
    if resume is not None and Task.load(find_checkpoint(resume)) != task:
        raise UserError(f"{resume}: was begun with another task or other labels; a resume must keep them")
    model, resumed = start_model(recipe, tokenizer, examples.hash, runtime, console.say, resume=resume, build=build)
    encoder = TaskEncoder(task, tokenizer, recipe.train.seq_len or model.config.context_length)
    train = _encode(examples.train, task, encoder, recipe, examples.skipped, console.say)
    held_out = _encode(examples.val, task, encoder, recipe, examples.skipped, console.say, held_out=True)
    report_skipped(examples.skipped, console.say)
    dtype = pick_precision(recipe.train.precision, runtime.device)
    longest = max(item.tokens for item in train.items)
    n = len(train.items)
    plan = pick_plan(recipe, model.config, runtime, console.say, dtype=dtype, examples=n, example_tokens=longest)
    if not block.lm_coef and model.lm_head is not None:
        model.lm_head.requires_grad_(False)  # nothing asks it, which DDP would wait for
    compile_model(model, recipe, console.say)
    with tempfile.TemporaryDirectory(prefix="gpt-dry-run-") if dry_run else nullcontext() as scratch:
        training = TrainingRun(
            recipe=recipe,
            runtime=runtime,
            console=console,
            run_dir=Path(scratch) if scratch else open_run_dir(recipe, runtime, resume=resume is not None),
            model=model,
            tokenizer=tokenizer,
            optimizer=make_optimizer(model, recipe.optim, model.hidden_matrices()),
            plan=plan,
            dtype=dtype,
            source=TaskSource(train, plan, recipe.run.seed, runtime.dp_rank),
            objective=finetune_objective(is_choice=task.is_choice, lm_coef=block.lm_coef),
            held_out=[],
            data_hash=examples.hash,
            resumed=resumed,
            measure=partial(measure, model, held_out, task, runtime, dtype) if held_out.items else None,
            beside=task.save,
        )
        return training.execute()


def _read(recipe: FinetuneRecipe) -> Examples[TaskExample]:
    def parse(row: dict[str, Any]) -> TaskExample:
        example = parse_example(recipe.finetune.task, row)
        check_label(recipe.finetune, example)
        return example

    return open_examples(recipe.data, parse)


def _base_tokenizer(recipe: FinetuneRecipe, examples: Examples[TaskExample], say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that the weights were trained with, or that a new model is to have."""
    if recipe.init_from is not None:
        if recipe.tokenizer is not None:
            raise UserError("tokenizer: comes with the weights of init_from; leave it out")
        return open_model_dir(find_checkpoint(recipe.init_from)).require_tokenizer()
    assert recipe.tokenizer is not None
    texts = (part for example in examples.train for row in example.value.rows for part in row)
    return resolve_tokenizer(recipe.tokenizer, lambda: texts, say=say)


def _build(
    recipe: FinetuneRecipe,
    task: Task,
    base: Tokenizer,
    tokenizer: Tokenizer,
    runtime: Runtime,
    say: Callable[[str], None],
) -> GPT:
    """The model to begin with: rows for the special tokens and the task's head are fresh."""
    model, block, seed = build_model(replace(recipe, lora=None), base, runtime, say), recipe.finetune, recipe.run.seed
    new_tokens = range(base.vocab_size, tokenizer.vocab_size)
    config, weights = add_token_rows(model.config, model.state_dict(), new_tokens, seed)
    config, weights = add_task_head(config, weights, HEAD, task.head_width, seed, segments=block.segment_embedding)
    if block.dropout is not None:
        config = replace(config, dropout=block.dropout)
    model = model_of(config, weights, device=runtime.device).train()
    if recipe.lora is not None:
        add_lora(model, recipe.lora, seed, new_tokens=new_tokens)
    return model


def _encode(
    examples: list[Example[TaskExample]],
    task: Task,
    encoder: TaskEncoder,
    recipe: FinetuneRecipe,
    skipped: list[str],
    say: Callable[[str], None],
    *,
    held_out: bool = False,
) -> TaskData:
    """The examples as rows and targets; what does not fit ends the run, or is noted in `skipped` under skip_bad."""
    data = TaskData([], [], [], encoder, recipe.finetune.segment_embedding, lm=recipe.finetune.lm_coef > 0)
    for example, encoded in zip(examples, encoder.encode([e.value for e in examples]), strict=True):
        try:
            if isinstance(encoded, UserError):
                raise encoded
            target, truth = task.target(example.value), task.truth(example.value)
        except UserError as error:
            complaint = UserError(f"{example.place}: {error}")
            if not recipe.data.skip_bad:
                raise complaint from error
            skipped.append(str(complaint))
            continue
        data.items.append(encoded)
        data.targets.append(target)
        data.truth.append(truth)
    what = "held-out" if held_out else "training"
    if cut := sum(item.cut for item in data.items):
        say(f"{cut} of {len(data.items)} {what} examples exceed {encoder.context_length} tokens: their parts were cut")
    if not data.items and not held_out:
        raise UserError(f"nothing to train on: all {len(examples)} examples are bad ({skipped[0]})")
    return data
