"""The command `gpt`: verbs, and what an error, a signal or a closed pipe becomes."""

from __future__ import annotations

import ctypes
import io
import os
import sys
import traceback
from typing import NoReturn

import typer

from gptcli import __version__
from gptcli.cli.chat import chat
from gptcli.cli.classify import classify
from gptcli.cli.compare import compare
from gptcli.cli.data import data
from gptcli.cli.doctor import doctor
from gptcli.cli.evaluate import evaluate
from gptcli.cli.exchange import export, import_
from gptcli.cli.generate import generate
from gptcli.cli.inspect import inspect
from gptcli.cli.label import label
from gptcli.cli.plan import plan
from gptcli.cli.recipes import recipes
from gptcli.cli.report import report
from gptcli.cli.score import score
from gptcli.cli.serve import serve
from gptcli.cli.tokenize import tokenize
from gptcli.cli.train import training_verb
from gptcli.cli.weaknesses import memorization, positions
from gptcli.errors import GptError, UserError

HELP = """The whole life of a GPT from one command line: tokenize, pretrain, finetune, RLHF, generate, evaluate.

--version shows the version; --debug, anywhere, shows the traceback of an error.
"""

TRAINING = (
    ("pretrain", "Train a language model on text.", "quickstart"),
    ("sft", "Teach a model to answer, from conversations.", "sft"),
    ("finetune", "Train a task head: classify, entail, compare, choose.", "finetune-classification"),
    ("rlhf-reward", "Train a reward model on preferences.", "rlhf-reward"),
    ("rlhf-ppo", "Train a policy on scores of what it writes, with PPO.", "rlhf-ppo"),
    ("rlhf-grpo", "The same as rlhf-ppo with GRPO, Dr. GRPO or RLOO.", "rlhf-grpo"),
    ("rlhf-dpo", "Train a policy on preferences directly.", "rlhf-dpo"),
)

app = typer.Typer(
    name="gpt",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich costs more than the help itself
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(tokenize)
for stage, what, recipe in TRAINING:
    app.command(stage)(training_verb(stage, f"{what}\n\ngpt {stage} -r {recipe}"))
app.command("rlhf-label")(label)
for verb in (generate, chat, serve, classify, score, compare, report, doctor, plan, export):
    app.command()(verb)
app.command("eval")(evaluate)
app.command("import")(import_)
inspect.command()(positions)
inspect.command()(memorization)
for name, group in (("inspect", inspect), ("data", data), ("recipes", recipes)):
    app.add_typer(group, name=name)


def main() -> NoReturn:
    """Run the command line; exits 0 done, 1 failed, 2 the user's mistake, 128 + signal when stopped."""
    # These two are not Typer options: options before the verb make it import pydantic, which doubles each start.
    if sys.argv[1:] == ["--version"]:
        print(f"gpt {__version__}")
        _leave(0)
    if "--debug" in sys.argv[1:]:
        os.environ["GPT_DEBUG"] = "1"
        sys.argv.remove("--debug")
    keep_freed_memory()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # closed by the shell (>&-)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where a terminal is not UTF-8
    try:
        _run_verb()
        sys.stdout.flush()
        _leave(0)
    except typer.Exit as end:
        _leave(end.exit_code)
    except BrokenPipeError:
        # `| head` has seen enough; keep the interpreter from flushing into the closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(0)
    except (KeyboardInterrupt, typer.Abort):
        _leave(130)
    except GptError as error:
        if os.environ.get("GPT_DEBUG"):
            traceback.print_exc()
        _complain(error)
        _leave(error.exit_code)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of typer's
            verb = getattr(getattr(error, "ctx", None), "command_path", "gpt")
            _complain(UserError(f"{' '.join(error.format_message().split())} (`{verb} --help`)"))
            _leave(error.exit_code)
        if os.environ.get("GPT_DEBUG"):
            raise
        _complain(_translate(error))
        _leave(1)


def keep_freed_memory() -> None:
    """glibc takes blocks of 128 KiB and more from the system and gives them back at once, page by page: a third of the
    time in which a small model reads. Here blocks of up to 32 MiB (its limit) stay, up to 1 GiB at the end of the heap.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 1 << 30)


def _run_verb() -> None:
    """Typer's own entry point would end a closed pipe with status 1, so its command is called directly."""
    command = typer.main.get_command(app)
    if "_GPT_COMPLETE" in os.environ:
        command(prog_name="gpt")  # answers the shell's question and exits
    with command.make_context("gpt", sys.argv[1:]) as context:
        command.invoke(context)


def _translate(error: Exception) -> Exception:
    if isinstance(error, OSError) and error.strerror:
        return GptError(f"{error.filename or 'system'}: {error.strerror}")
    if "gloo" in str(error) or "NCCL" in str(error):  # what torch says when another process is gone
        return GptError("another process of this run has ended; once that is mended, go on with --resume RUN")
    return GptError(f"internal error: {type(error).__name__}: {error} (run with --debug for the traceback)")


def _complain(error: Exception) -> None:
    """One line on stderr; of several processes with the same complaint, only the first speaks."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, UserError):
        return
    prefix = "gpt: " if rank == "0" else f"gpt [rank {rank}]: "
    print(prefix + str(error), file=sys.stderr)


def _leave(code: int) -> NoReturn:
    sys.exit(code)


if __name__ == "__main__":
    main()
