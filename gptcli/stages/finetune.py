"""`gpt finetune`: a language model and labelled examples in, a classifier (or scorer, or chooser) out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from gptcli.config.schema import FinetuneRecipe
from gptcli.data.examples import Example, Examples, open_examples, report_skipped
from gptcli.data.taskrows import TaskData, TaskEncoder, TaskSource
from gptcli.data.tasks import HEAD, SPECIAL_TOKENS, Task, TaskExample, check_label, make_task, parse_example
from gptcli.errors import UserError
from gptcli.eval.finetune import measure
from gptcli.model import GPT
from gptcli.model.extend import add_task_head, add_token_rows
from gptcli.stages.build import first_weights, trainable
from gptcli.stages.job import Job
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.resolve import resolve_tokenizer
from gptcli.train.checkpoint import find_checkpoint
from gptcli.train.objectives.finetune import finetune_objective


def run(job: Job[FinetuneRecipe]) -> dict[str, Any]:
    recipe, runtime, block = job.recipe, job.runtime, job.recipe.finetune
    examples = _read(recipe)
    task = make_task(block, (example.value for example in examples.train), recipe.data.columns)
    base = _base_tokenizer(job, examples)
    tokenizer = base.with_tokens(SPECIAL_TOKENS)
    if job.resume is not None and Task.load(find_checkpoint(job.resume)) != task:
        raise UserError(f"{job.resume}: was begun with another task or other labels; a resume must keep them")
    started = job.start(tokenizer, examples.hash, partial(_build, job, task, base, tokenizer))
    model = started.model
    encoder = TaskEncoder(task, tokenizer, recipe.train.seq_len or model.config.context_length)
    train = _encode(examples.train, encoder, job, examples.skipped)
    held_out = _encode(examples.val, encoder, job, examples.skipped, held_out=True)
    report_skipped(examples.skipped, job.say)
    plan = started.plan(examples=len(train.items), example_tokens=max(item.tokens for item in train.items))
    if not block.lm_coef and model.lm_head is not None:
        model.lm_head.requires_grad_(False)  # nothing asks it, which DDP would wait for
    return started.train(
        plan,
        TaskSource(train, plan, recipe.run.seed, runtime.dp_rank),
        finetune_objective(is_choice=task.is_choice, lm_coef=block.lm_coef),
        measure=(lambda step: measure(model, held_out, task, runtime, job.dtype)) if held_out.items else None,
        beside=task.save,
    )


def _read(recipe: FinetuneRecipe) -> Examples[TaskExample]:
    def parse(row: dict[str, Any]) -> TaskExample:
        example = parse_example(recipe.finetune.task, row)
        check_label(recipe.finetune, example)
        return example

    return open_examples(recipe.data, parse)


def _base_tokenizer(job: Job[FinetuneRecipe], examples: Examples[TaskExample]) -> Tokenizer:
    """The tokenizer that the weights were trained with, or that a new model is to have."""
    recipe = job.recipe
    if recipe.init_from is not None:
        if recipe.tokenizer is not None:
            raise UserError("tokenizer: comes with the weights of init_from; leave it out")
        return job.base.require_tokenizer()
    assert recipe.tokenizer is not None
    texts = (part for example in examples.train for row in example.value.rows for part in row)
    return resolve_tokenizer(recipe.tokenizer, lambda: texts, say=job.say)


def _build(job: Job[FinetuneRecipe], task: Task, base: Tokenizer, tokenizer: Tokenizer) -> GPT:
    """The model to begin with: rows for the special tokens and the task's head are fresh."""
    recipe, block, seed = job.recipe, job.recipe.finetune, job.recipe.run.seed
    config, weights, _ = first_weights(recipe, base, job.runtime, job.say)
    new_tokens = range(base.vocab_size, tokenizer.vocab_size)
    config, weights = add_token_rows(config, weights, new_tokens, seed)
    config, weights = add_task_head(config, weights, HEAD, task.head_width, seed, segments=block.segment_embedding)
    if block.dropout is not None:
        config = replace(config, dropout=block.dropout)
    return trainable(recipe, job.runtime, config, weights, new_tokens)


def _encode(
    examples: list[Example[TaskExample]],
    encoder: TaskEncoder,
    job: Job[FinetuneRecipe],
    skipped: list[str],
    *,
    held_out: bool = False,
) -> TaskData:
    """The examples as rows and targets; what does not fit ends the run, or is noted in `skipped` under skip_bad."""
    task, block = encoder.task, job.recipe.finetune
    data = TaskData([], [], [], encoder, block.segment_embedding, lm=block.lm_coef > 0)
    for example, encoded in zip(examples, encoder.encode([e.value for e in examples]), strict=True):
        try:
            if isinstance(encoded, UserError):
                raise encoded
            target, truth = task.target(example.value), task.truth(example.value)
        except UserError as error:
            complaint = UserError(f"{example.place}: {error}")
            if not job.recipe.data.skip_bad:
                raise complaint from error
            skipped.append(str(complaint))
            continue
        data.items.append(encoded)
        data.targets.append(target)
        data.truth.append(truth)
    what = "held-out" if held_out else "training"
    if cut := sum(item.cut for item in data.items):
        job.say(
            f"{cut} of {len(data.items)} {what} examples exceed {encoder.context_length} tokens: their parts were cut"
        )
    if not data.items and not held_out:
        raise UserError(f"nothing to train on: all {len(examples)} examples are bad ({skipped[0]})")
    return data
