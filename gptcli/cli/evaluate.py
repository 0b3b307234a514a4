"""gpt eval"""

from __future__ import annotations

import json as jsonlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gptcli.cli import options
from gptcli.cli.checkpoint import open_checkpoint
from gptcli.cli.classify import SkipBad, evaluate_head, head_table
from gptcli.cli.evaluate_show import progress, table, task_list, task_rows
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.api import LoadedModel
    from gptcli.eval.results import Result
    from gptcli.eval.run import Options, Subject

ON_TEXT = ("perplexity", "compression")
NORMALIZE = ("none", "chars", "bytes", "tokens", "answer-context")


def evaluate(
    task: Annotated[
        str,
        typer.Option("--task", metavar="NAME,...|FILE", help="What to measure: names (--list), or a task file."),
    ] = "perplexity",
    list_tasks: Annotated[
        bool, typer.Option("--list", help="Name the tasks, their data and figures, and end.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text (perplexity) or rows: files, folders, globs, -; TASK=FILE for one of several tasks. Left out: "
            "the held-out part of the run's own data, or the task's data set."
        ),
    ] = None,
    checkpoint: options.Checkpoint = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", "--k", min=0, help="Solved examples before each item.")
    ] = None,
    examples: Annotated[
        list[str] | None, typer.Option(help="Where they come from; left out: the task's training part, or --data.")
    ] = None,
    instruction: Annotated[str, typer.Option(help="Text before everything else.")] = "",
    normalize: Annotated[
        str, typer.Option(metavar="|".join(NORMALIZE), help="What acc_norm divides by, as GPT-3 did; acc never does.")
    ] = "chars",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many items of each task or part.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which examples each item gets.")] = 0,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens a window moves on; left out: half the context (compression: a quarter, wikitext: all)."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a written answer; left out: the task's.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Read in one go; changes the speed alone.")] = None,
    harness: Annotated[bool, typer.Option(help="The tasks are lm_eval's (`pip install 'gptcli[harness]'`).")] = False,
    include: Annotated[Path | None, typer.Option(help="--harness: a folder of task files of one's own.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A JSON file for the results, item by item; finetune: predictions as JSONL."
        ),
    ] = None,
    skip_bad: SkipBad = False,
    int8: options.Int8 = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Measure a model: on text, on tasks by name, or on a task file of your own.

    perplexity: per token, per word, and bits per byte. compression: bits per byte beside gzip -9, and xz -9e that was
    given the training text first, on the run's held-out documents. finetune: a task head's figures on labelled
    examples. All else: --list.
    """
    if list_tasks:
        print(jsonlib.dumps({"tasks": task_rows()}) if json else "\n".join(task_list()))
        return
    if normalize not in NORMALIZE:
        raise UserError(f"--normalize {normalize}: expected one of {', '.join(NORMALIZE)}")
    if output is not None:
        check_output(output, [*(data or []), *(examples or [])])
    names = [name.strip() for name in task.split(",") if name.strip()]
    not_asked = {
        "--num-fewshot": num_fewshot, "--examples": examples, "--instruction": instruction,
        "--max-new-tokens": max_new_tokens, "--normalize": normalize != "chars",
    }  # fmt: skip
    if not set(names) - {*ON_TEXT, "finetune"} and not harness:
        refuse(task, not_asked | ({"--stride": stride, "--batch-tokens": batch_tokens} if task == "finetune" else {}))
    if include is not None and not harness:
        raise UserError("--include: is for --harness; a task file of your own is given to --task")
    if task == "finetune":
        loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)
        loaded = loaded.packed(int8=True) if int8 else loaded
        row = evaluate_head(loaded, data, output=output, skip_bad=skip_bad, limit=limit, quiet=quiet)
        row |= {"checkpoint": str(loaded.path), "tokenizer": loaded.tokenizer.hash}
        print(jsonlib.dumps(row) if json else "\n".join(head_table(row)))
        return
    if not harness:
        check_names(names, data or [])

    from gptcli.eval.results import results_tree, write_results
    from gptcli.eval.run import Options, Subject
    from gptcli.eval.scorer import Scorer

    loaded = open_checkpoint(checkpoint, device=device, precision=precision, quiet=quiet)
    asked = Options(
        data=list(data or []), examples=list(examples or []), num_fewshot=num_fewshot, limit=limit, seed=seed,
        instruction=instruction, normalize=cast(Any, normalize), stride=stride, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    settings = {
        "context_length": loaded.config.context_length, "device": loaded.engine.device.type,
        "precision": str(loaded.dtype).removeprefix("torch."), "int8": int8,
    }  # fmt: skip
    scorer = Scorer(loaded.engine, batch_tokens=batch_tokens)
    subject = Subject(scorer, str(loaded.path), loaded.tokenizer.hash, settings)
    if harness:
        found = run_in_harness(loaded, subject, names, asked, include)
    else:
        unpacked = {}
        if int8:  # what that costs
            texts = [name for name in names if name in ON_TEXT]
            unpacked = {n: measure_text(n, loaded, subject, asked, quiet=quiet)[0].metrics["perplexity"] for n in texts}
            loaded.packed(int8=True)
        found = [run(name, loaded, subject, asked, quiet=quiet) for name in names]
        found = [with_cost(result, unpacked.get(result.task)) for result in found]
    if output is not None:
        write_results(output, found)
    print(jsonlib.dumps(results_tree(found, items=False)) if json else "\n".join(table(found)))


def check_output(output: Path, inputs: list[str]) -> None:
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output}: the folder it should be in is missing")
    if output.is_dir():
        raise UserError(f"{output}: is a folder; name a file")
    for spec in inputs:
        path = Path(spec.partition("=")[2] or spec)
        if output.exists() and path.exists() and output.samefile(path):
            raise UserError(f"{output}: is what is read; name another file for the results")


def refuse(task: str, given: dict[str, Any]) -> None:
    """Options that say nothing to this task."""
    for name, value in given.items():
        if value:
            raise UserError(f"{name}: has no meaning with --task {task}")


def check_names(names: list[str], data: list[str]) -> None:
    """Before a checkpoint is read: is every task known, and its file in order?"""
    from gptcli.eval.tasks import find_task

    if not names:
        raise UserError("--task: names no task; `gpt eval --list` does")
    if "compression" in names and data_of("compression", data):
        raise UserError("--task compression: compares on the run's own held-out documents, so it takes no --data")
    for name in names:
        if name not in ON_TEXT:
            find_task(name)


def data_of(name: str, data: list[str]) -> list[str]:
    """What --data says for a task: TASK=FILE for it, and all that name no task."""
    from gptcli.eval.tasks import TASKS

    chosen = []
    for spec in data:
        before, equals, after = spec.partition("=")
        if not equals or before not in {*TASKS, "perplexity", name}:
            chosen.append(spec)
        elif before == name:
            chosen.append(after)
    return chosen


def run(name: str, loaded: LoadedModel, subject: Subject, asked: Options, *, quiet: bool) -> Result:
    from gptcli.eval.run import run_task
    from gptcli.eval.tasks import find_task

    if name in ON_TEXT:
        return run_on_text(name, loaded, subject, asked, quiet=quiet)
    asked = replace(asked, data=data_of(name, asked.data))
    with progress(name, quiet) as advance:
        return run_task(find_task(name), subject, asked, advance)


def run_on_text(name: str, loaded: LoadedModel, subject: Subject, asked: Options, *, quiet: bool) -> Result:
    """perplexity and compression."""
    from gptcli.eval.compression import compressors

    found, train, texts = measure_text(name, loaded, subject, asked, quiet=quiet)
    if name == "compression":
        bits = {"bits_per_byte": found.metrics["bits_per_byte"], **compressors(train, texts)}
        found = replace(found, task=name, metrics=bits | found.metrics)
    return found


def measure_text(
    name: str, loaded: LoadedModel, subject: Subject, asked: Options, *, quiet: bool
) -> tuple[Result, list[str], list[str]]:
    """The model's figures; what it was trained on, as far as that is known, and the text measured."""
    from gptcli.data.sources import SourceReader
    from gptcli.eval.run import run_perplexity

    asked = replace(asked, data=data_of(name, asked.data))
    train: list[str] = []
    if asked.data:
        texts = list(SourceReader(asked.data).documents())
    else:
        train, texts = texts_of_run(loaded.path)
    texts = texts[: asked.limit]
    if not texts:
        raise UserError(f"{', '.join(asked.data) or loaded.path}: no text to measure on")
    # A compressor looks back as far as it can; for perplexity half a context is the usual price.
    stride = asked.stride or max(1, loaded.config.context_length // (4 if name == "compression" else 2))
    with progress(name, quiet) as advance:
        return run_perplexity(texts, subject, replace(asked, stride=stride), advance), train, texts


def with_cost(found: Result, unpacked: float | None) -> Result:
    """Beside the perplexity of int8, that of the weights as they are."""
    if unpacked is None:
        return found
    cost = {"perplexity_unpacked": unpacked, "int8_cost": found.metrics["perplexity"] / unpacked - 1}
    return replace(found, metrics=found.metrics | cost)


def run_in_harness(
    loaded: LoadedModel, subject: Subject, names: list[str], asked: Options, include: Path | None
) -> list[Result]:
    from gptcli.eval.harness import run_harness

    if asked.data or asked.examples or asked.instruction or asked.stride or asked.max_new_tokens:
        raise UserError(
            "--harness: its tasks say where data and examples are and how to ask; leave out --data, --examples, "
            "--instruction, --stride and --max-new-tokens (a task of your own: --include FOLDER)"
        )
    if subject.settings["int8"]:
        loaded.packed(int8=True)
    return run_harness(
        subject.scorer, names, checkpoint=subject.checkpoint, include=include, num_fewshot=asked.num_fewshot,
        limit=asked.limit, seed=asked.seed, settings=subject.settings,
    )  # fmt: skip


def texts_of_run(checkpoint: Path) -> tuple[list[str], list[str]]:
    """The training and held-out documents of the run that a checkpoint belongs to."""
    from gptcli.config.load import load_recipe
    from gptcli.data.prepare import corpus_of

    recipe_file = checkpoint.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{checkpoint}: not a run's checkpoint, so its held-out text is unknown; give --data")
    data = load_recipe(str(recipe_file)).data
    if data.path is not None or data.mixture:
        raise UserError(f"{recipe_file}: trained on tokenized data, whose text is not kept; give --data")
    train: list[str] = []
    held_out: list[str] = []
    for split, text in corpus_of(data).parts():
        (held_out if split == "val" else train).append(text)
    return train, held_out
