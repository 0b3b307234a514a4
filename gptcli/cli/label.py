"""gpt rlhf-label"""

from __future__ import annotations

import getpass
import json as jsonlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options, sampling
from gptcli.cli.checkpoint import open_checkpoint, pick_checkpoint
from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.generate import Engine
    from gptcli.rlhf.label_answers import Sampling
    from gptcli.rlhf.label_file import LabelFile
    from gptcli.rlhf.label_input import Scale
    from gptcli.rlhf.labels import Question, Queue


def label(
    context: typer.Context,
    files: Annotated[list[Path] | None, typer.Argument(help="With --agreement: files of labels.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='Lines of {"prompt"} or {"messages"}, with an "id" or without.')
    ] = None,
    responses: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Label answers that are there: lines of {"prompt", "responses"}.'),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The labels; goes on where it was stopped.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, answers and labels.")] = False,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", "-c", envvar="GPT_CHECKPOINT", metavar="PATH", help="Who answers. Repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Answers of each checkpoint.")] = 2,
    max_new_tokens: sampling.MaxNewTokens = 200,
    stop: sampling.Stop = None,
    temperature: sampling.Temperature = 1.0,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    min_p: sampling.MinP = None,
    scale: Annotated[
        str | None, typer.Option(metavar="LOW-HIGH", help="Score each answer, as in 1-7, instead of ranking them.")
    ] = None,
    rank_by: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:NAME|reward:CHECKPOINT", help="Let a function or a reward model rank them."),
    ] = None,
    labeller: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who labels; left out: $USER, or --rank-by.")
    ] = None,
    agreement: Annotated[bool, typer.Option("--agreement", help="How far the labellers of FILES agree.")] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Decides the answers and their order.")] = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Have several answers to each prompt ranked by a person, without saying whose they are.

    gpt rlhf-label --prompts prompts.jsonl -o pairs.jsonl

    gpt rlhf-label --agreement anna.jsonl ben.jsonl
    """
    if agreement:
        _report_agreement(files or [], json=json)
        return
    if files:
        raise UserError(f"{files[0]}: files belong to --agreement; name the others with --prompts, --responses and -o")
    if (prompts is None) == (responses is None):
        raise UserError("give --prompts FILE, to have them answered, or --responses FILE, with answers; one of them")
    if output is None:
        raise UserError("-o FILE: missing; it is where the labels go")
    if output.suffix in (".gz", ".zst"):
        raise UserError(
            f"-o {output}: labels are written plain; write {output.stem}, and compress that when it is done"
        )
    if rank_by is not None and scale is not None:
        raise UserError("--scale: is for a person; --rank-by ranks by its own numbers")

    from gptcli.rlhf.label_answers import Sampling, read_questions
    from gptcli.rlhf.label_file import LabelFile
    from gptcli.rlhf.label_input import Scale
    from gptcli.rlhf.labels import Queue

    chosen_scale = Scale.parse(scale) if scale is not None else None
    labeller = labeller or rank_by or os.environ.get("USER") or getpass.getuser()
    with LabelFile(output, overwrite=overwrite) as file:
        if responses is not None:
            asked = read_questions(responses)
        else:
            paths = [pick_checkpoint(path, quiet=quiet) for path in (checkpoint or (None,))]
            plan = Sampling(str(prompts), paths, samples, sampling.params_of(context), _opener(device, precision))
            asked = _sample(plan, output, overwrite=overwrite, quiet=quiet)
        if not asked:
            raise UserError(f"{prompts or responses}: holds nothing to label")
        questions = [question for question in asked if question is not None]
        queue = Queue(questions, file.labelled(labeller, questions))
        if rank_by is not None:
            _rank(rank_by, queue, file, labeller, device, precision)
        else:
            _ask(queue, file, labeller, seed, chosen_scale)
    row = {"output": str(output), "labeller": labeller, "questions": queue.total, "labelled": queue.labelled}
    row |= {"skipped": queue.skipped, "left": len(queue.pending) + queue.skipped}
    row["without_choice"] = len(asked) - len(questions)
    if json:
        print(jsonlib.dumps(row, ensure_ascii=False))
    elif not quiet:
        print(f"gpt: {_words(row)}", file=sys.stderr)


def _sample(plan: Sampling, output: Path, *, overwrite: bool, quiet: bool) -> list[Question | None]:
    """Have the missing answers written."""
    from gptcli.cli.label_screen import progress
    from gptcli.rlhf.label_answers import answers_path, sample_questions

    if len(plan.checkpoints) * plan.samples < 2:
        raise UserError("--samples 1: one answer leaves nothing to choose; take more, or another -c beside it")
    if plan.params.temperature == 0 and plan.samples > 1:
        raise UserError(f"--temperature 0: all {plan.samples} answers of a checkpoint would be the same")
    if plan.source == "-":
        raise UserError("--prompts -: stdin is where the labels are typed; give a file")
    with progress("answers", quiet=quiet) as advance:
        return sample_questions(plan, answers_path(output), overwrite=overwrite, advance=advance)


def _opener(device: str, precision: str) -> Callable[[Path], Engine]:
    return lambda path: open_checkpoint(path, device=device, precision=precision, quiet=True).packed().engine


def _ask(queue: Queue, file: LabelFile, labeller: str, seed: int, scale: Scale | None) -> None:
    """Have a person label what is left."""
    from gptcli.cli.label_screen import Screen
    from gptcli.cli.label_session import LabelSession
    from gptcli.rlhf.label_input import LETTERS

    most = max((len(question.responses) for question in queue.pending), default=0)
    if most > len(LETTERS):
        raise UserError(
            f"{most} answers to a prompt are more than the {len(LETTERS)} that have a letter; ask for fewer"
        )
    LabelSession(queue, file, Screen(scale), labeller=labeller, seed=seed, scale=scale).run()


def _rank(spec: str, queue: Queue, file: LabelFile, labeller: str, device: str, precision: str) -> None:
    from gptcli.dist.runtime import pick_device, pick_precision
    from gptcli.rlhf.label_rank import rank_questions

    place = pick_device(device)
    rank_questions(spec, queue, file, labeller, device=place, dtype=pick_precision(precision, place))


def _words(row: dict[str, Any]) -> str:
    parts = [f"{row['labelled']} of {row['questions']} labelled by {row['labeller']} in {row['output']}"]
    parts += [f"{row['skipped']} skipped"] * bool(row["skipped"])
    parts += [f"{row['without_choice']} prompts had fewer than two different answers"] * bool(row["without_choice"])
    parts += ["the same command goes on"] * bool(row["left"])
    return "; ".join(parts)


def _report_agreement(files: list[Path], *, json: bool) -> None:
    from dataclasses import asdict

    from gptcli.rlhf.label_agreement import agreements, read_choices

    if not files:
        raise UserError("--agreement: name the files of labels, as in --agreement anna.jsonl ben.jsonl")
    found = agreements(read_choices(files))
    if json:
        print(jsonlib.dumps({"agreement": [asdict(pair) for pair in found]}, ensure_ascii=False))
        return
    for pair in found:
        kappa = "undefined" if pair.kappa is None else f"{pair.kappa:.2f}"
        print(
            f"{pair.a} and {pair.b}: {pair.equal:.1%} of {pair.pairs} pairs judged alike (on {pair.prompts} prompts), "
            f"Cohen's kappa {kappa}"
        )
