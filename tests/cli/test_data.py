"""gpt data: rows, masks and counts as the training sees them, and what a step was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptcli.config.load import load_recipe
from gptcli.dist.runtime import Runtime
from gptcli.stages.console import RunConsole
from gptcli.stages.job import run_stage
from tests.conftest import Tiny, gpt, make_tiny

CHAT = [{"prompt": f"{i}?", "response": "yes" if i % 2 else "no"} for i in range(20)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = make_tiny(tmp_path_factory.mktemp("data"), steps=4)
    tiny.train()
    (tiny.folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHAT))
    (tiny.folder / "chat.yaml").write_text(
        f"stage: sft\ninit_from: {tiny.run_dir}\nrun: {{dir: {tiny.folder}/runs}}\n"
        f"data: {{train: [{tiny.folder}/chat.jsonl], val_fraction: 0.0}}\n"
        "train: {max_steps: 3, global_batch_size: 4, seq_len: 16}\nsft: {packing: false, truncation: left}\n"
    )
    recipe = load_recipe(str(tiny.folder / "chat.yaml"), ["context_length=48", "train.seq_len=40"], stage="sft")
    run_stage(recipe, Runtime(), RunConsole(quiet=True))
    return tiny


def test_show_marks_what_is_learned(trained: Tiny) -> None:
    chat = trained.folder / "chat.jsonl"
    sets = ("-s", "context_length=48", "-s", "sft.packing=false")
    done = gpt("data", "show", chat, "--mask", "-n", "20", "-c", trained.run_dir, *sets, "-q")
    assert done.code == 0, done.err
    for row in CHAT:
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n⟦{row['response']}<|im_end|>⟧\n"
        assert text in done.out
    rows = gpt("data", "show", chat, "-n", "2", "-c", trained.run_dir, *sets, "-q", "--json").out.splitlines()
    assert [json.loads(line)["row"] for line in rows] == [1, 2]
    assert [p["trained"] for p in json.loads(rows[0])["pieces"]] == [False, True]


def test_show_and_stats_of_a_recipe_and_of_shards(trained: Tiny) -> None:
    done = gpt("data", "stats", trained.folder / "chat.yaml", "-s", "context_length=48", "-s", "train.seq_len=40",
               "--json", "-q")  # fmt: skip
    counts = done.json()
    assert (counts["conversations"], counts["answers"], counts["rows"]) == (20, 20, 20)
    assert counts["trained_tokens"] == sum(len(row["response"]) + 1 for row in CHAT)
    assert (
        gpt("tokenize", trained.folder / "text.txt", "-o", trained.folder / "shards", "--tokenizer", "bytes").code == 0
    )
    counts = gpt("data", "stats", trained.folder / "shards", "--json", "-q").json()
    assert counts["train_documents"] == 1
    shown = gpt("data", "show", trained.folder / "shards", "-n", "1", "-q")
    assert "the square of" in shown.out
    assert "the square of" in gpt("data", "show", trained.recipe, "-n", "20", "-q").out.replace("\n", "")


@pytest.mark.parametrize("run", ["tiny", "chat"])
def test_trace_shows_the_rows_of_a_step(trained: Tiny, run: str) -> None:
    folder = trained.folder / "runs" / run
    rows_a_step = 8 if run == "tiny" else 4
    steps = []
    for step in (1, 2, 3):
        done = gpt("data", "trace", folder, "--step", str(step), "--json", "-q")
        assert done.code == 0, done.err
        steps.append([json.loads(line)["text"] for line in done.out.splitlines()])
        assert len(steps[-1]) == rows_a_step
    assert len({text for texts in steps for text in texts}) == 3 * rows_a_step
    done = gpt("data", "trace", folder, "--step", "99", "-q")
    assert done.code == 2
    assert "stands at step" in done.err


def test_trace_refuses_other_data(trained: Tiny, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, steps=2)
    tiny.train()
    (tmp_path / "text.txt").write_text("other text " * 200)
    done = gpt("data", "trace", tiny.run_dir, "--step", "1", "-q")
    assert done.code == 2
    assert "the data has changed since" in done.err
