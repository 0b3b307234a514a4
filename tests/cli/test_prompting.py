"""gpt generate with instructions, examples and templates: what the model reads, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import gpt, make_tiny

SHOTS = '{"prompt": "cheese", "response": "fromage"}\n{"prompt": "cat", "response": "chat"}\n'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = make_tiny(tmp_path_factory.mktemp("prompting"), steps=2)
    tiny.train()
    (tiny.folder / "shots.jsonl").write_text(SHOTS)
    return tiny.folder


def prompt_of(folder: Path, *arguments: str, stdin: bytes = b"") -> str:
    done = gpt("generate", "-q", "--json", "-n", "1", *arguments, cwd=folder, stdin=stdin)
    return done.json()["prompt"]


def test_instruction_and_examples(trained: Path) -> None:
    options = ["--instruction", "To French:", "--examples", "shots.jsonl"]
    whole = prompt_of(trained, "dog", *options)
    assert whole == "To French:\ncheese => fromage\ncat => chat\ndog =>"
    assert prompt_of(trained, "dog", "--instruction", "To French:") == "To French:\ndog =>"
    drawn = {prompt_of(trained, "dog", *options, "--k", "1", "--seed", seed) for seed in "01234"}
    assert drawn == {"To French:\ncheese => fromage\ndog =>", "To French:\ncat => chat\ndog =>"}


def test_templates(trained: Path) -> None:
    assert prompt_of(trained, "--template", "summarize", stdin=b"A post.\n") == "A post.\n\nTL;DR:"
    (trained / "context.txt").write_text("Paris is in France.\n")
    asked = prompt_of(trained, "Where is it?", "--template", "answer-context", "--var", "context=@context.txt")
    assert asked == "Paris is in France.\n\nQ: Where is it?\nA:"
    listed = gpt("generate", "--template", "list", cwd=trained).out
    assert [line.split()[0] for line in listed.splitlines()][:2] == ["answer", "answer-context"]


def test_a_file_of_prompts_goes_through_the_template(trained: Path) -> None:
    done = gpt("generate", "-q", "-i", "-", "-n", "1", "--template", "answer", cwd=trained, stdin=b"Who?\nWhat?\n")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["Q: Who?\nA:", "Q: What?\nA:"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--k", "1"], "--k: says how many of --examples FILE to show; name one"),
        (["--var", "a=b"], "--var: belongs to --template; name one"),
        (["--template", "answer", "--var", "a"], "--var a: write it as NAME=VALUE"),
        (["--template", "translate", "--var", "to=@none.txt"], "--var to=@none.txt: No such file"),
        (["--examples", "none.jsonl"], "none.jsonl: no such file"),
        (["--examples", "shots.jsonl", "--k", "3"], "--k 3: there are only 2 examples"),
    ],
)
def test_mistakes_are_one_line(trained: Path, arguments: list[str], complaint: str) -> None:
    done = gpt("generate", "x", "-q", *arguments, cwd=trained)
    assert done.code == 2
    assert complaint in done.err
    assert len(done.err.splitlines()) == 1


def test_a_prompt_that_is_not_seen_whole_is_told(trained: Path) -> None:
    done = gpt("generate", "ab" * 200, "-n", "2", cwd=trained)
    assert "gpt: the prompt's 400 tokens are more than the context: its first " in done.err
    assert "the context" not in gpt("generate", "ab", "-n", "2", cwd=trained).err
    assert gpt("generate", "ab" * 200, "-n", "2", "-q", cwd=trained).err == ""
