"""All tasks by name, and one's own."""

from __future__ import annotations

from pathlib import Path

from gptcli.errors import UserError, nearest
from gptcli.eval import tasks_choice, tasks_generate, tasks_text
from gptcli.eval.own import read_task
from gptcli.eval.task import Task

TASKS = {task.name: task for task in [*tasks_text.TASKS, *tasks_choice.TASKS, *tasks_generate.TASKS]}


def find_task(name: str) -> Task:
    """A task by name, or by the path of its file. Raises UserError."""
    if name in TASKS:
        return TASKS[name]
    if Path(name).suffix in (".yaml", ".yml", ".py") or "/" in name:
        return read_task(Path(name))
    known = [*TASKS, "perplexity", "compression"]
    raise UserError(f"--task {name}: no such task{nearest(name, known) or '; `gpt eval --list` names them'}")
