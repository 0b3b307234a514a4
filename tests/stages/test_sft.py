"""gpt sft: losses fall, resumes are exact, two processes are one, adapters and masks are what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import gptcli
from gptcli.config.load import load_recipe
from gptcli.errors import UserError
from gptcli.stages.console import RunConsole
from tests.conftest import Tiny, gpt, make_tiny
from tests.kill import kill_and_resume

RECIPE = """\
stage: sft
run: {{name: chat, dir: {runs}}}
init_from: {runs}/tiny
data: {{train: [{chat}], val_fraction: 0.1}}
optim: {{lr: 1.0e-2, warmup_steps: 2, weight_decay: 0.0}}
train: {{max_steps: 30, global_batch_size: 8, log_every: 1, eval_every: 10, eval_rows: 8, save_every: 10}}
"""
LORA = "lora={rank: 4, alpha: 8, dropout: 0.1}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny = make_tiny(folder)
    tiny.train("model.context_length=48")
    return folder


@pytest.fixture
def chat(base: Path, tmp_path: Path) -> Tiny:
    return make_chat(base, tmp_path)


def make_chat(base: Path, folder: Path) -> Tiny:
    """A tiny pretrained model, and a recipe that teaches it to answer."""
    (folder / "runs").mkdir()
    (folder / "runs" / "tiny").symlink_to(base / "runs" / "tiny")
    rows = ({"prompt": f"{i}?", "response": "yes" if i % 2 else "no"} for i in range(300))
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.yaml").write_text(RECIPE.format(runs=folder / "runs", chat=folder / "chat.jsonl"))
    return Tiny(folder, folder / "chat.yaml", "sft", "chat")


@pytest.mark.parametrize("overrides", [(), (LORA,), ("sft.packing=false", "train.global_batch_size=32")], ids=str)
def test_held_out_answers_get_likelier(chat: Tiny, overrides: tuple[str, ...]) -> None:
    chat.train(*overrides)
    losses = [row["val_loss"] for row in chat.metrics() if "val_loss" in row]
    assert losses[-1] < (0.9 if LORA in overrides else 0.7) * losses[0]  # a base this small has little to adapt


def test_an_epoch_is_a_pass_over_the_rows(chat: Tiny) -> None:
    data = f"data={{train: [{chat.folder / 'chat.jsonl'}], val: [{chat.folder / 'chat.jsonl'}]}}"
    summary = chat.train(data, "train.max_steps=null", "train.epochs=2", "sft.packing=false", "train.eval_every=250")
    assert summary["step"] == 600 // 8
    assert [row["step"] for row in chat.metrics() if "val_loss" in row] == [-(-300 // 8), 600 // 8]


def test_the_checkpoint_speaks_chatml_and_stops(chat: Tiny) -> None:
    chat.train("train.max_steps=80")
    model = gptcli.load(chat.latest())
    assert model.tokenizer.special["eos"] == "<|im_end|>"
    assert model.tokenizer.special["bos"] == "<|endoftext|>"
    assert model.config.vocab_size == 259
    from gptcli.tokenizer.chat_template import encode_chat

    prompt = encode_chat(model.tokenizer, [{"role": "user", "content": "7?"}])
    done = model.complete([prompt], max_new_tokens=20, temperature=0)[0]  # type: ignore[list-item]
    assert done.finish_reason == "eos"
    assert done.text in ("yes", "no")


@pytest.mark.parametrize("overrides", [(), (LORA,)], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(chat: Tiny, overrides: tuple[str, ...]) -> None:
    chat.train("run.name=whole", *overrides)
    chat.train("run.name=parts", "train.max_steps=10", "optim.decay_steps=30", *overrides)
    chat.train("run.name=parts", "optim.decay_steps=30", *overrides, resume=chat.folder / "runs" / "parts")
    assert chat.metrics("parts") == chat.metrics("whole")
    ours, theirs = chat.weights("parts"), chat.weights("whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), (LORA,)], ids=str)
def test_killed_and_resumed_it_equals_a_run_left_alone(base: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    kill_and_resume(partial(make_chat, base), tmp_path, 6, "train.max_steps=150", *overrides)


@pytest.mark.parametrize("overrides", [(), ("lora={rank: 4}",)], ids=str)
def test_two_processes_give_the_losses_of_one(chat: Tiny, overrides: tuple[str, ...]) -> None:
    sets = [part for o in ("train.max_steps=6", *overrides) for part in ("-s", o)]
    for name, nproc in (("one", "1"), ("two", "2")):
        done = gpt("sft", "-r", chat.recipe, *sets, "-s", f"run.name={name}", "--nproc", nproc, "-q")
        assert done.code == 0, done.err
    one, two = ([(r["loss"], r.get("val_loss", 0.0)) for r in chat.metrics(name)] for name in ("one", "two"))
    assert len(one) == 6
    assert torch.allclose(torch.tensor(one), torch.tensor(two), atol=1e-5, rtol=0)


def test_an_adapter_checkpoint_is_small_and_goes_everywhere(chat: Tiny) -> None:
    chat.train(LORA, "train.max_steps=10")
    files = {p.name for p in chat.latest().iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files
    loaded = gptcli.load(chat.latest()).forward(torch.tensor([[1, 2, 257]])).logits
    done = gpt("export", chat.latest(), "-o", chat.folder / "out")
    assert done.code == 2
    assert "--merge" in done.err
    done = gpt("export", chat.latest(), "--merge", "-o", chat.folder / "out", "--no-check")
    assert done.code == 0, done.err
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(chat.folder / "out")
    assert (theirs(torch.tensor([[1, 2, 257]])).logits - loaded).abs().max() < 1e-4
    chat.train("run.name=more", f"init_from={chat.latest()}", "train.max_steps=2")  # and is a base itself


def test_a_dry_run_writes_nothing(chat: Tiny) -> None:
    done = gpt("sft", "-r", chat.recipe, "--dry-run", "--json", "-q")
    assert done.json()["step"] == 1
    assert not (chat.folder / "runs" / "chat").exists()


def add_line(chat: Tiny, row: dict[str, Any] | str) -> None:
    with (chat.folder / "chat.jsonl").open("a") as file:
        file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ({"messages": [{"content": "x"}]}, "no role"),
        ({"prompt": "x", "response": ""}, "response: is empty"),
        ({"prompt": "x", "response": "y" * 60}, "tokens, and a row holds 49"),
        ({"prompt": "say <|im_end|>", "response": "y"}, "would be read as that token"),
    ],
)
def test_a_bad_line_is_named_or_skipped(
    chat: Tiny, row: dict[str, Any] | str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add_line(chat, row)
    with pytest.raises(UserError, match=f"chat.jsonl:301: .*{reason}"):
        chat.train()
    chat.train("data.skip_bad=true", "train.max_steps=1", console=RunConsole())
    said = capsys.readouterr().err
    assert "skipped 1 bad examples" in said
    assert "chat.jsonl:301: " in said


def test_a_template_error_names_the_line(chat: Tiny) -> None:
    (chat.folder / "t.jinja").write_text("{% for m in messages %}{{ m.content + eos_token + m.name }}{% endfor %}")
    with pytest.raises(UserError, match=r"chat.jsonl:1: the chat template does not take these messages: .*name"):
        chat.train(f"sft.template={chat.folder}/t.jinja")
    with pytest.raises(UserError, match=r"sft\.template: nowhere: No such file"):
        chat.train("sft.template=nowhere")


@pytest.mark.parametrize(
    ("policy", "said"), [("skip", "1 conversations are longer than a row and left out; the first: .*chat.jsonl:301"),
                         ("left", "1 conversations are longer than a row and lost their beginning")]
)  # fmt: skip
def test_what_truncation_does_is_said(chat: Tiny, policy: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    add_line(chat, {"prompt": "x" * 60, "response": "y"})
    chat.train(f"sft.truncation={policy}", "train.max_steps=1", "data.val_fraction=0", console=RunConsole())
    import re

    assert re.search(said, capsys.readouterr().err)


def test_sft_needs_a_trained_model(chat: Tiny) -> None:
    with pytest.raises(UserError, match="init_from: missing; sft goes on from a trained model"):
        load_recipe(str(chat.recipe), ["init_from=null"], stage="sft")
    with pytest.raises(UserError, match=r"optim\.name: muon is for whole matrices"):
        load_recipe(str(chat.recipe), [LORA, "optim.name=muon"], stage="sft")


# ---- real data ------------------------------------------------------------------------------------------------

REAL: dict[str, Callable[[Path], list[str]]] = {
    "gsm8k": lambda d: [f"data.train=[{d}/gsm8k_train.jsonl]", "data.columns={prompt: question, response: answer}"],
    "alpaca": lambda d: [f"data.train=[{d}/alpaca_en_demo.json]", "data.skip_bad=true"],
    "alpaca-zh": lambda d: [f"data.train=[{d}/alpaca_zh_demo.json]", "data.skip_bad=true"],
    "dolly": lambda d: [f"data.train=[{d}/dolly_hhrlhf_1k.jsonl]", "sft.template=none", "data.skip_bad=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_sets_run_end_to_end_and_held_out_loss_falls(name: str, chat: Tiny, shared_data: Path) -> None:
    sets = [*REAL[name](shared_data / "sft"), "sft.truncation=left", "context_length=256"]
    chat.train(*sets, "train.max_steps=40", "train.eval_every=20", "train.eval_rows=32", "data.val_fraction=0.05")
    losses = [row["val_loss"] for row in chat.metrics() if "val_loss" in row]
    assert losses[-1] < losses[0]
