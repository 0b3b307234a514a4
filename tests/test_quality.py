"""Slow proofs on real text: published losses are reached, the quickstart keeps its promise, poems come out whole."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import gpt

pytestmark = pytest.mark.slow
HOURS = 4 * 3600  # on a busy machine these take long, and being slow is no failure


def test_shakespeare_reaches_nanogpts_published_loss(shared_data: Path, tmp_path: Path) -> None:
    text = shared_data / "text/tinyshakespeare.txt"
    done = gpt(
        "pretrain", "-r", "shakespeare-char", "-s", f"data.source=[{text}]", "--json", "-q", cwd=tmp_path, timeout=HOURS
    )
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["step"] == 2000
    assert summary["val_loss"] <= 1.88


def test_chinese_poems_train_and_come_out_in_whole_characters(shared_data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "poems.yaml"
    recipe.write_text(
        "model: {n_layer: 2, n_head: 2, n_embd: 64, context_length: 64}\n"
        f"tokenizer: bpe:2048\ndata: {{source: [{shared_data}/text/song_ci_zh.txt]}}\n"
        "optim: {name: muon, lr: 5.0e-3}\n"
        "train: {max_steps: 150, global_batch_size: 16, eval_every: 150, eval_rows: 64}\n"
    )
    summary = json.loads(gpt("pretrain", "-r", recipe, "--json", "-q", cwd=tmp_path).out)
    assert summary["val_loss"] < 6.5  # ln(2048) is 7.6
    rows = gpt("generate", "", "--samples", "8", "-n", "60", "--seed", "1", "--json", "-q", cwd=tmp_path).out
    text = "".join(json.loads(line)["text"] for line in rows.splitlines())
    assert sum("\u4e00" <= c <= "\u9fff" for c in text) > 0.5 * len(text)
    # The output is valid UTF-8 always; bytes that a model this young puts in a wrong order come out as U+FFFD.
    assert text.count("\ufffd") < 0.03 * len(text)


def test_the_quickstart_beats_gzip_and_xz_in_time(tmp_path: Path) -> None:
    started = time.monotonic()
    done = gpt("pretrain", "-r", "quickstart", "--json", "-q", cwd=tmp_path, timeout=HOURS, OMP_NUM_THREADS="2")
    assert done.code == 0, done.err
    row = json.loads(gpt("eval", "--task", "compression", "--json", "-q", cwd=tmp_path, OMP_NUM_THREADS="2").out)
    assert row["bits_per_byte"] < row["xz_given_training_text"] < row["gzip"]
    print(json.dumps({**json.loads(done.out), **row, "seconds": round(time.monotonic() - started)}))


def share_that_stops(run: Path, prompts: list[list[int]]) -> float:
    """Of texts drawn after the prompts, how many the model ends by itself within 256 tokens."""
    import gptcli

    model: Any = gptcli.load(run)
    done = model.complete(prompts, max_new_tokens=256, seed=1)
    return sum(c.finish_reason == "eos" for c in done) / len(done)


def test_a_model_stops_by_itself_after_sft_and_not_before(shared_data: Path, tmp_path: Path) -> None:
    """Pretrained on WikiText-2 for a few minutes, then taught on those of GSM8K's answers that 256 tokens hold well:
    a model that learned from longer ones would be right to go on."""
    import gptcli
    from gptcli.tokenizer.chat_template import encode_chat

    text, gsm8k = shared_data / "text/wikitext2/train.txt", shared_data / "sft/gsm8k_train.jsonl"
    lines = [line for line in gsm8k.read_text().splitlines(keepends=True) if len(json.loads(line)["answer"]) < 300]
    (tmp_path / "train.jsonl").write_text("".join(lines[:-100]))
    (tmp_path / "held-out.jsonl").write_text("".join(lines[-100:]))
    (tmp_path / "base.yaml").write_text(
        "model: {n_layer: 3, n_head: 2, n_embd: 96, context_length: 512, position: rope, norm: rmsnorm}\n"
        f"tokenizer: bpe:2048\ndata: {{source: [{text}]}}\noptim: {{name: muon, lr: 5.0e-3}}\n"
        "train: {max_steps: 200, global_batch_size: 4, eval_every: 0}\n"
    )
    (tmp_path / "chat.yaml").write_text(
        "stage: sft\ninit_from: runs/base\n"
        "data: {train: [train.jsonl], val: [held-out.jsonl], columns: {prompt: question, response: answer}}\n"
        "sft: {truncation: skip}\noptim: {lr: 3.0e-3, warmup_steps: 10}\n"
        "train: {max_steps: 300, global_batch_size: 4, eval_every: 100, eval_rows: 16}\n"
    )
    assert gpt("pretrain", "-r", "base.yaml", "-q", cwd=tmp_path, timeout=HOURS).code == 0
    done = gpt("sft", "-r", "chat.yaml", "--json", "-q", cwd=tmp_path, timeout=HOURS)
    summary = done.json()
    rows = [json.loads(line) for line in (tmp_path / "runs/chat/metrics.jsonl").read_text().splitlines()]
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    assert held_out[-1] < held_out[0]
    asked = [json.loads(line)["question"] for line in lines[-100:]]
    base, chat = tmp_path / "runs/base", tmp_path / "runs/chat"
    # The base never saw a template: it is asked in the same words, in tokens that it knows.
    plain = gptcli.load(base).tokenizer
    spoken = gptcli.load(chat).tokenizer
    before = share_that_stops(base, [plain.encode(question + "\n") for question in asked])
    after = share_that_stops(chat, [encode_chat(spoken, [{"role": "user", "content": q}]) for q in asked])
    print(json.dumps({"stops_before": before, "stops_after": after, "val_loss": summary["val_loss"]}))
    assert before < 0.5
    assert after >= 0.95
