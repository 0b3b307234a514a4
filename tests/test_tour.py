"""`make tour`: its data, its reward, and (slow) all of its stages in small."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptcli.config.load import load_recipe
from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import train_bpe
from tests.conftest import REPOSITORY, gpt

TOUR = REPOSITORY / "data/tour"
N = 100_000


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("reward", monkeypatch)


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("functions", monkeypatch)


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As the tour imports it: from the folder that it lies in, beside the others there."""
    monkeypatch.syspath_prepend(str(TOUR.parent))
    monkeypatch.syspath_prepend(str(TOUR))
    for name_there in ("reward", "functions", "steps", "tour"):
        monkeypatch.delitem(sys.modules, name_there, raising=False)
    return importlib.import_module(name)


# ---- the reward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return x", 1),
        ("'''Words.'''\n    x += 1", 1),
        ("print(x)  # out", 1),
        ("if x:\n        pass\n    else:\n        x.go()", 1),
        ("x", 1),
        (r"return '\d' is 1", 1),  # Python warns of both, and parses them
        ("pass", 0),
        ("'''Words alone.'''", 0),
        ("...", 0),
        ("1", 0),
        ("# a comment", 0),
        ("", 0),
        ("if x:\n        pass\n    else:\n        '''Words.'''", 0),
        ("def inner():\n        pass", 0),
        ("return (x", 0),
        ("return x\n  y", 0),
        ("return '\x00'", 0),
        ("return \ud800", 0),
        ("\ufffd", 0),
    ],
)
def test_reward_of_a_body(reward: ModuleType, body: str, expected: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward.score(["def f(x):\n"], ["    " + body]) == [expected]


def test_a_docstring_in_the_prompt_is_no_body(reward: ModuleType) -> None:
    prompt = 'def f(x):\n    """What it does."""\n'
    assert reward.score([prompt] * 3, ["", "    pass", "    return x"]) == [0, 0, 1]


@pytest.mark.parametrize(
    "code",
    ["-" * N + "1", "(" * N, "[" * N + "]" * N, "a" + ".b" * N, "lambda:" * N, "not " * N, "x" + "[0]" * N, "1+" * N],
)
def test_what_is_nested_too_deep_earns_nothing_and_stops_nothing(reward: ModuleType, code: str) -> None:
    assert reward.score([""], [code]) == [0]


# ---- functions ------------------------------------------------------------------------------------------------

SOURCE = '''
import os
\f

def plain(a, b=1):
    # how it goes
    return a + b

class Box:
    @property
    def size(self):
        """How much it holds.

        In litres.
        """
        # no rounding
        return self._size

    def nothing(self):
        """It does nothing."""

    def later(self): ...

    def one_line(self): return 1

    def wide(self,
             x):
        def inner(y):
            return x
        return inner

async def fetch(url):
    "Says \\"hello\\""
    return await url
'''


def test_functions_are_cut_into_head_and_body(functions: ModuleType) -> None:
    found = {f.prompt: f for f in functions.functions_of(SOURCE)}
    size = found['def size(self):\n    """How much it holds."""\n']
    assert size.response == "    # no rounding\n    return self._size"
    assert size.is_documented
    plain = found["def plain(a, b=1):\n    # how it goes\n"]
    assert plain.response == "    return a + b"
    assert not plain.is_documented
    assert "def inner(y):\n" in found
    assert found["def wide(self,\n         x):\n"].response.startswith("    def inner(y):")
    # left out: one whose docstring cannot be written again on one line, and those that do nothing or are one line
    assert len(found) == 4


def test_what_is_no_python_has_no_functions(functions: ModuleType) -> None:
    assert list(functions.functions_of("def f(x):\n    return x\nno python")) == []


def test_functions_of_the_standard_library_parse(functions: ModuleType, reward: ModuleType) -> None:
    found = [f for name in ("ast", "json/decoder", "textwrap") for f in functions.functions_of(stdlib(name))]
    assert len(found) > 50
    assert any(f.is_documented for f in found)
    assert all(reward.score([f.prompt for f in found], [f.response for f in found]))
    assert not any(reward.score([f.prompt for f in found], ["" for _ in found]))


def stdlib(name: str) -> str:
    return (Path(os.__file__).parent / f"{name}.py").read_text("utf-8")


# ---- damage ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe([stdlib("ast"), stdlib("textwrap")], 512)


def test_damage_edits_exactly_one_token(functions: ModuleType, tokenizer: Tokenizer) -> None:
    text = "    return a + [b.name for b in self.children]"
    before = tokenizer.encode(text)
    places = set()
    for number in range(60):
        damaged = functions.damage(text, tokenizer, 1, number)
        after = tokenizer.encode(damaged)
        assert damaged == functions.damage(text, tokenizer, 1, number)
        assert len(after) == len(before)
        (place,) = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        places.add(place)
    assert len(places) > len(before) / 2  # anywhere in the text
    assert len({functions.damage(text, tokenizer, seed, 1) for seed in range(9)}) > 5


def test_a_text_that_no_edit_can_change_is_given_up(functions: ModuleType) -> None:
    class OneToken:
        vocab_size = 1

        def encode(self, text: str) -> list[int]:
            return [0] * len(text)

        def decode(self, ids: list[int]) -> str:
            return "a" * len(ids)

    assert functions.damage("aaa", OneToken(), 1) is None
    function = functions.Function("def f():\n", "aaa", False)
    assert list(functions.damaged_rows([function], OneToken(), 1, 3)) == []


# ---- recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "grpo"])
def test_recipes_are_of_the_stage_that_they_are_named_after(name: str) -> None:
    recipe = load_recipe(str(TOUR / f"{name}.yaml"))
    assert recipe.stage.removeprefix("rlhf-") == recipe.run.name == name


# ---- figures --------------------------------------------------------------------------------------------------


def test_figures_and_table_show_by_what_trick_a_body_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tour = module("tour", monkeypatch)
    texts = ["    return x", "    return x", "    return (x", "    y = x\n    return y"]
    answers = [
        {"prompt": "def f(x):\n", "text": t, "tokens": n, "finish_reason": end}
        for t, n, end in zip(texts, (3, 3, 4, 6), ("eos", "eos", "length", "eos"), strict=True)
    ]
    rollouts = [{"kl": 0.0, "entropy": 2.5}, {"kl": 1.5, "entropy": 2.0}]
    (tmp_path / "ppo").mkdir()
    shutil.copytree(TOUR, tmp_path, dirs_exist_ok=True)
    write(tmp_path / "ppo/metrics.jsonl", rollouts)
    write(tmp_path / "prompts-val.jsonl", [{"prompt": row["prompt"]} for row in answers])
    for name in tour.WRITERS:
        write(tmp_path / f"{name}.answers.jsonl", answers)
    (tmp_path / "grpo").symlink_to(tmp_path / "ppo")
    life = {name: tour.written(tmp_path, name) for name in tour.WRITERS}
    shares = {"parses": 0.75, "ends": 0.75, "tokens": 4.0, "duplicates": 0.25}
    assert life["ppo"] == {**shares, "kl": 1.5, "entropy": 2.0}
    assert life["sft"] == {**shares, "kl": 0.0, "entropy": 2.5}
    assert life["pretrained"] == {**shares, "kl": None, "entropy": None}
    judge = {"accuracy": 0.9, "likelihood_accuracy": 1.0, "length_accuracy": 0.5, "pairs": 8}
    tour.show([{**life, "seed": seed, "reward_model": judge} for seed in (1, 2)], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert sum("│ ppo" in line and "75.0%" in line and "1.50" in line for line in lines) == 2
    assert sum("90.0%" in line and "100.0%" in line for line in lines) == 2
    assert max(map(len, lines)) <= 80


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- all of it ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tour_runs_in_small_and_once(tmp_path: Path) -> None:
    root = Path(os.__file__).parent
    sources = ",".join(str(root / name) for name in ("json", "email", "asyncio", "logging", "xml"))
    small = [f"data.source=[{sources}]", "data.val_fraction=0.2", "model.n_layer=2", "model.n_embd=32"]
    small += ["tokenizer=bpe:512", "train.max_steps=20"]
    done = gpt("pretrain", "-r", "quickstart", *[x for s in small for x in ("-s", s)], "-q", cwd=tmp_path)
    assert done.code == 0, done.err
    first = tour(tmp_path)
    for stage in ("sft", "rlhf-reward", "rlhf-ppo", "rlhf-grpo"):
        assert f"$ gpt {stage} -r " in first
    assert "parses" in first
    (life,) = json.loads((tmp_path / "runs/tour.json").read_text())["lives"]
    assert 0 <= life["reward_model"]["accuracy"] <= 1
    for name in ("pretrained", "sft", "ppo", "grpo"):
        assert {"parses", "tokens", "duplicates", "ends"} <= life[name].keys()
    folder = tmp_path / "runs/tour-1"
    assert not {row["prompt"] for row in rows(folder / "prompts.jsonl")} & {
        row["prompt"] for row in rows(folder / "prompts-val.jsonl")
    }
    shutil.rmtree(folder / "grpo")
    again = tour(tmp_path)
    assert "$ gpt rlhf-grpo" in again
    assert "ppo is trained already" in again
    assert json.loads((tmp_path / "runs/tour.json").read_text())["lives"] == [life]


def tour(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "data/tour.py"), "--steps", "8"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
