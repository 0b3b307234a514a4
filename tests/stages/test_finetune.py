"""gpt finetune: the loss is GPT-1's, the order of a pair is nothing, a resume and two processes change nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gptcli.api import LoadedModel
from gptcli.config.load import load_recipe
from gptcli.config.schema import ModelConfig
from gptcli.data.taskrows import TaskEncoder
from gptcli.data.tasks import HEAD, SPECIAL_TOKENS, Task
from gptcli.dist.runtime import Runtime
from gptcli.errors import Stopped, UserError
from gptcli.eval.finetune import TaskModel
from gptcli.model import GPT
from gptcli.stages.console import RunConsole
from gptcli.stages.job import run_stage
from gptcli.tokenizer.build import byte_tokenizer
from gptcli.train.objectives.finetune import finetune_objective
from tests.conftest import gpt

TOKENIZER = byte_tokenizer().with_tokens(SPECIAL_TOKENS)
RECIPE = """\
stage: finetune
run: {{name: head, dir: {folder}/runs}}
model: {{n_layer: 2, n_head: 2, n_embd: 16, context_length: 32, dropout: {dropout}}}
tokenizer: bytes
data: {{train: ["{folder}/train.jsonl"], val: ["{folder}/dev.jsonl"]}}
finetune: {{task: {task}}}
optim: {{lr: 1.0e-2, warmup_ratio: 0.1, schedule: linear, min_lr_ratio: 0.0}}
train: {{epochs: 3, global_batch_size: 8, log_every: 1, save_every: 5}}
"""


def example(task: str, draw: random.Random) -> dict[str, Any]:
    a, b = (draw.choice("abcdefgh") for _ in range(2))
    if task == "classification":
        letter = draw.choice("ah")
        return {"text": letter * draw.randint(3, 9), "label": "early" if letter == "a" else "late"}
    if task == "entailment":
        return {"premise": f"it is {a}", "hypothesis": b, "label": "yes" if a == b else "no"}
    if task == "similarity":
        return {"text_a": a, "text_b": b, "label": abs(ord(a) - ord(b))}
    return {"context": f"{a} and {b}", "choices": [a, b, "z"][: draw.choice((2, 3))], "label": int(a > b)}


def make(folder: Path, task: str = "classification", *, dropout: float = 0.0, n: int = 60) -> Callable[..., Any]:
    """Writes data and a recipe; what is returned runs the stage with overrides."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    for name, count in (("train", n), ("dev", 20)):
        rows = [json.dumps(example(task, draw)) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    path = folder / "head.yaml"
    path.write_text(RECIPE.format(folder=folder, task=task, dropout=dropout))

    def run(*overrides: str, **options: Any) -> dict[str, Any]:
        recipe = load_recipe(str(path), overrides, stage="finetune")
        return run_stage(recipe, Runtime(), RunConsole(quiet=True), **options)

    return run


def weights(folder: Path, run: str = "head") -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / run / "latest" / "model.safetensors")


def rows(folder: Path, run: str = "head") -> list[dict[str, Any]]:
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_second", "mfu")} for line in lines]


def model_for(task: Task, **changes: Any) -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 32, "vocab_size": TOKENIZER.vocab_size}
    model = GPT(ModelConfig(**shape, scalar_heads={HEAD: task.head_width}, **changes))
    model.init_weights(0)
    return model


def batch_of(task: Task, examples: list[dict[str, Any]], *, segments: bool = False, lm: bool = False):
    encoder = TaskEncoder(task, TOKENIZER, 32)
    parsed = [task.parse(row) for row in examples]
    return encoder.batch(encoder.encode(parsed), [task.target(e) for e in parsed], segments=segments, lm=lm)


PAIRS = [{"text_a": "abc", "text_b": "de", "label": 1.5}, {"text_a": "f", "text_b": "ghij", "label": 4}]
SIMILAR = Task("similarity", levels=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0))


# ---- the objective ------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers() -> None:
    """Against the formula, example by example, without padding."""
    model = model_for(SIMILAR)
    found = finetune_objective(is_choice=False, lm_coef=0.5)(model, batch_of(SIMILAR, PAIRS, lm=True))
    task_loss = lm_loss = 0.0
    for row in PAIRS:
        parsed = SIMILAR.parse(row)
        ids = [torch.tensor([r]) for r in TaskEncoder(SIMILAR, TOKENIZER, 32).encode([parsed])[0].rows]
        logits = sum(model(x).scalars[HEAD][0, -1] for x in ids)
        task_loss -= (torch.tensor(SIMILAR.target(parsed)) * logits.log_softmax(-1)).sum()
        lm_loss += sum(F.cross_entropy(model(x).logits[0, :-1], x[0, 1:]) for x in ids) / 2
    assert torch.allclose(found.metrics["task_loss"], task_loss, atol=1e-5)
    assert torch.allclose(found.metrics["lm_loss"], lm_loss, atol=1e-5)
    assert torch.allclose(found.loss, task_loss + 0.5 * lm_loss, atol=1e-5)


def test_without_the_lm_loss_it_is_plain_classification_to_the_bit() -> None:
    """Three steps of Adam beside a classifier written by hand."""
    task = Task("classification", labels=("x", "y"))
    batch = batch_of(task, [{"text": "abc", "label": "x"}, {"text": "de", "label": "y"}])
    ours, plain = model_for(task), model_for(task)
    steps = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (ours, plain)]
    for _ in range(3):
        loss = finetune_objective(is_choice=False, lm_coef=0.0)(ours, batch).loss
        states = plain(batch["tokens"]).scalars[HEAD]
        expected = F.cross_entropy(torch.stack([states[0, 4], states[1, 3]]), torch.tensor([0, 1]), reduction="sum")
        assert torch.equal(loss, expected)
        for optimizer, value in zip(steps, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_multiple_choice_is_a_softmax_over_the_choices_there_are() -> None:
    task = Task("multiple_choice")
    model = model_for(task)
    examples = [
        {"context": "c", "choices": ["a", "b"], "label": 1},
        {"context": "cc", "choices": ["d", "e", "f"], "label": 0},
    ]
    together = finetune_objective(is_choice=True, lm_coef=0.5)(model, batch_of(task, examples, lm=True))
    alone = [finetune_objective(is_choice=True, lm_coef=0.5)(model, batch_of(task, [e], lm=True)) for e in examples]
    assert torch.allclose(together.loss, sum(x.loss for x in alone), atol=1e-5)
    assert torch.isfinite(together.loss)
    uniform = model_for(task)
    torch.nn.init.zeros_(uniform.scalar_heads[HEAD].weight)
    found = finetune_objective(is_choice=True, lm_coef=0.0)(uniform, batch_of(task, examples))
    assert found.loss.item() == pytest.approx(torch.log(torch.tensor(6.0)).item())


# ---- similarity and segments --------------------------------------------------------------------------------------


def test_similarity_does_not_know_the_order() -> None:
    model = TaskModel(model_for(SIMILAR).eval(), TOKENIZER, SIMILAR)
    for row in PAIRS:
        swapped = {"text_a": row["text_b"], "text_b": row["text_a"]}
        one, other = (model.predict([SIMILAR.parse(r)])[0].score for r in (row, swapped))
        assert one == pytest.approx(other, abs=1e-6)


def test_segments_tell_the_sides_apart_and_none_is_the_model_without() -> None:
    task = Task("entailment", labels=("no", "yes"))
    examples = [{"premise": "ab", "hypothesis": "c", "label": "yes"}]
    objective = finetune_objective(is_choice=False, lm_coef=0.0)
    without, with_segments = model_for(task), model_for(task, n_segment=2)
    off = objective(without, batch_of(task, examples)).loss
    assert torch.equal(objective(with_segments, batch_of(task, examples)).loss, off)
    assert not torch.equal(objective(with_segments, batch_of(task, examples, segments=True)).loss, off)
    torch.nn.init.zeros_(with_segments.wse.weight)
    assert torch.equal(objective(with_segments, batch_of(task, examples, segments=True)).loss, off)


# ---- the stage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "entailment", "similarity", "multiple_choice"])
def test_every_task_trains_and_reports_its_figures(tmp_path: Path, task: str) -> None:
    more = ["finetune.scores=true"] if task == "similarity" else []
    summary = make(tmp_path, task)(*more)
    names = {"similarity": ["val_pearson", "val_spearman"], "multiple_choice": ["val_accuracy"]}
    assert set(names.get(task, ["val_accuracy", "val_f1", "val_matthews", "val_confusion"])) <= summary.keys()
    logged = rows(tmp_path)
    assert [r["step"] for r in logged if "val_loss" in r] == [8, 16, 23]  # 60 examples by 8, three times
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert {"lm_loss", "accuracy"} <= logged[0].keys()
    assert Task.load(tmp_path / "runs/head/latest").task == task
    best = min((r for r in logged if "val_loss" in r), key=lambda r: r["val_loss"])["step"]
    assert (tmp_path / "runs/head/best").resolve().name == f"step-{best:06d}"


def test_a_resume_is_exact(tmp_path: Path) -> None:
    make(tmp_path / "alone", dropout=0.1)()
    run = make(tmp_path / "stopped", dropout=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptcli.train.loop.StopSignal.__enter__", stop_at(11))
        with pytest.raises(Stopped):
            run()
    shutil.rmtree(tmp_path / "stopped/runs/head/step-000011")  # go on from an earlier one, as after a kill
    (tmp_path / "stopped/runs/head/latest").unlink()
    run(resume=tmp_path / "stopped/runs/head/step-000010")
    assert rows(tmp_path / "stopped") == rows(tmp_path / "alone")
    one, other = weights(tmp_path / "stopped"), weights(tmp_path / "alone")
    assert all(torch.equal(one[name], other[name]) for name in one)


def stop_at(step: int) -> Callable[[Any], Any]:
    """A StopSignal that has seen SIGTERM when it is asked for the step-th time."""

    class Late:
        asked = 0

        @property
        def signum(self) -> int:
            self.asked += 1
            return 15 if self.asked >= 2 * step - 1 else 0  # asked for twice a step

    return lambda _: Late()


def test_it_starts_from_a_pretrained_model(tmp_path: Path) -> None:
    from tests.conftest import make_tiny

    tiny = make_tiny(tmp_path, steps=3)
    tiny.train()
    make(tmp_path)("model=null", "tokenizer=null", f"init_from={tiny.run_dir}", "optim.lr=1e-9", "train.epochs=0.1")
    before, after = tiny.weights(), weights(tmp_path)
    assert after["wte.weight"].shape[0] == 320  # 257 and the three tokens, padded to a multiple of 64
    assert torch.allclose(after["wte.weight"][:257], before["wte.weight"][:257], atol=1e-6)
    assert after["wte.weight"][257:260].std().item() == pytest.approx(0.02, rel=0.5)
    assert after["scalar_heads.task.weight"].shape == (2, 16)
    assert torch.allclose(after["h.1.mlp.c_fc.weight"], before["h.1.mlp.c_fc.weight"], atol=1e-6)


def test_lora_trains_the_head_and_little_else_and_resumes_exactly(tmp_path: Path) -> None:
    from tests.conftest import make_tiny

    tiny = make_tiny(tmp_path, steps=3)
    tiny.train()
    lora = ("model=null", "tokenizer=null", f"init_from={tiny.run_dir}", "lora.rank=2", "optim.lr=1e-2")
    for name in ("alone", "again"):
        run = make(tmp_path / name, dropout=0.1)
        run(*lora)
    run(*lora, resume=tmp_path / "again/runs/head/step-000010")
    assert rows(tmp_path / "again") == rows(tmp_path / "alone")
    one, other = (LoadedModel.open(tmp_path / name / "runs/head", device="cpu").model for name in ("alone", "again"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    before = tiny.weights()
    assert torch.equal(one.wte.weight[:257], before["wte.weight"][:257])
    assert torch.equal(one.h[0].ln_1.weight, before["h.0.ln_1.weight"])
    assert not torch.equal(one.h[0].attn.c_attn.weight, before["h.0.attn.c_attn.weight"])
    assert one.scalar_heads[HEAD].bias.abs().max() > 0


def test_lora_keeps_new_tokens_where_the_vocabulary_is_larger_than_the_tokenizer(tmp_path: Path) -> None:
    """An imported checkpoint may have more rows than its tokenizer has tokens; new ones follow the tokenizer's last."""
    from tests.conftest import make_tiny

    tiny = make_tiny(tmp_path, steps=2)
    tiny.train("model.vocab_size=300")
    run = make(tmp_path / "head")
    run("model=null", "tokenizer=null", f"init_from={tiny.run_dir}", "lora.rank=2", "optim.lr=1e-2", "train.epochs=1")
    folder = tmp_path / "head/runs/head/latest"
    after = LoadedModel.open(folder, device="cpu").model.wte.weight
    before = tiny.weights()["wte.weight"]
    changed = [i for i in range(300) if not torch.equal(after[i], before[i])]
    assert changed == [257, 258, 259]
    told = json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"]
    assert list(told.values()) == [[257, 258, 259]]


def test_predictions_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    make(tmp_path)("train.epochs=1")
    run, dev, out = tmp_path / "runs/head", tmp_path / "dev.jsonl", tmp_path / "p.jsonl"
    arguments = ("eval", "-c", run, "--task", "finetune", "-q", "--data")
    assert gpt(*arguments, dev, "-o", out, "--limit", "7", "--json").json()["n"] == 7
    assert len(out.read_text().splitlines()) == 7
    before = dev.read_bytes()
    assert gpt(*arguments, dev, "-o", dev).code == 2
    assert gpt(*arguments, tmp_path / "none.jsonl", "-o", out).code == 2
    assert (dev.read_bytes(), len(out.read_text().splitlines())) == (before, 7)
    assert "accuracy" in gpt(*arguments, dev, "--int8", "--json").json()
    assert "(of late)" in gpt(*arguments, dev).out  # whose F1


def test_patience_ends_the_run_and_a_resume_does_not_go_on(tmp_path: Path) -> None:
    run = make(tmp_path)
    hopeless = ("train.epochs=50", "train.patience=2", "optim.lr=0.3")
    run(*hopeless)
    validated = [r for r in rows(tmp_path) if "val_loss" in r]
    best = min(range(len(validated)), key=lambda i: validated[i]["val_loss"])
    assert len(validated) == best + 3 < 50
    last = rows(tmp_path)[-1]["step"]
    run(*hopeless, resume=tmp_path / "runs/head")
    assert rows(tmp_path)[-1]["step"] == last
    run("train.epochs=50", "train.patience=0", "optim.lr=0.3", resume=tmp_path / "runs/head")  # but without it
    assert rows(tmp_path)[-1]["step"] > last


def test_other_labels_are_refused_by_a_resume(tmp_path: Path) -> None:
    run = make(tmp_path)
    run("train.epochs=1")
    with pytest.raises(UserError, match="begun with another task or other labels"):
        run("finetune.labels=[late,early]", resume=tmp_path / "runs/head")


def test_bad_lines_are_named_or_skipped_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "", "label": "early"}\n{"txt": "a", "label": "early"}\n')
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": "early"}\n{"text": "a", "label": "erly"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:61: text: is empty"):
        run()
    said: list[str] = []
    recipe = load_recipe(str(tmp_path / "head.yaml"), ["data.skip_bad=true", "train.epochs=0.1"], stage="finetune")
    console = RunConsole(quiet=True)
    console.say = said.append  # type: ignore[method-assign]
    run_stage(recipe, Runtime(), console)
    listed = "\n".join(said)
    assert "skipped 3 bad examples" in listed
    assert "train.jsonl:62: no column 'text'; did you mean 'txt'" in listed
    assert "dev.jsonl:2: unknown label 'erly'; did you mean 'early'" in listed


def test_long_rows_are_counted_or_refused(tmp_path: Path) -> None:
    run = make(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "long " * 20, "label": "early"}) + "\n")
    with pytest.raises(UserError, match=r"train\.jsonl:61: a row of 102 tokens is longer than the context of 32"):
        run("finetune.truncate=false")
    said: list[str] = []
    recipe = load_recipe(str(tmp_path / "head.yaml"), ["train.epochs=0.1"], stage="finetune")
    console = RunConsole(quiet=True)
    console.say = said.append  # type: ignore[method-assign]
    run_stage(recipe, Runtime(), console)
    assert "1 of 61 training examples exceed 32 tokens: their parts were cut" in said


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    for name, nproc in (("one", 1), ("two", 2)):
        make(tmp_path / name, "similarity")
        done = gpt(
            "finetune", "-r", tmp_path / name / "head.yaml", "--nproc", str(nproc), "-q",
            "-s", "finetune.scores=true", "-s", "train.epochs=1",
        )  # fmt: skip
        assert done.code == 0, done.err
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"val_pearson", "val_spearman"}:  # of scores that hardly differ yet
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


# ---- the head at work ---------------------------------------------------------------------------------------------


def test_classify_and_eval_use_the_head(tmp_path: Path) -> None:
    make(tmp_path)("train.epochs=5", "finetune.lm_coef=0")
    run = tmp_path / "runs/head"
    lines = gpt("classify", "-c", run, "-q", stdin=b"aaaa\nhhhhh\n").out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["early", "late"]
    assert all(0.5 <= float(line.split("\t")[1]) <= 1 for line in lines)
    assert gpt("classify", "-c", run, "-q", "--only", "late", stdin=b"aaaa\nhhhhh\n").out == "hhhhh\n"
    bad = gpt("classify", "-c", run, "-q", "--batch-size", "1", stdin=b"aaaa\n\nhhhhh\n")
    assert bad.code == 2
    assert bad.out.startswith("early\t")  # nothing already written is lost
    assert "<stdin>:2: text: is empty" in bad.err
    out = tmp_path / "predictions.jsonl"
    done = gpt(
        "eval", "-c", run, "--task", "finetune", "--data", tmp_path / "dev.jsonl", "-o", out, "--json", "-q"
    ).json()
    assert done["n"] == done["labelled"] == 20
    assert done["accuracy"] == pytest.approx(rows(tmp_path)[-1]["val_accuracy"])
    assert done["confusion"] == rows(tmp_path)[-1]["val_confusion"]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    right = sum(row["prediction"] == row["label"] for row in written)
    assert right / 20 == pytest.approx(done["accuracy"])
    assert sum(written[0]["probabilities"].values()) == pytest.approx(1, abs=1e-6)


def test_predictions_in_batches_are_those_alone(tmp_path: Path) -> None:
    make(tmp_path, "multiple_choice")("train.epochs=1")
    loaded = LoadedModel.open(tmp_path / "runs/head", device="cpu")
    model = TaskModel.of_checkpoint(loaded.path, loaded.model, loaded.tokenizer, loaded.dtype)
    draw = random.Random(1)
    examples = [model.task.parse(example("multiple_choice", draw)) for _ in range(10)]
    for one, found in zip(examples, model.predict(examples), strict=True):
        assert found.probabilities == pytest.approx(model.predict([one])[0].probabilities, abs=1e-5)
        assert len(found.probabilities) == len(one.rows)


def test_a_model_without_a_head_says_so(tmp_path: Path) -> None:
    from tests.conftest import make_tiny

    tiny = make_tiny(tmp_path, steps=1)
    tiny.train()
    done = gpt("classify", "-c", tiny.run_dir, "-q", stdin=b"a\n")
    assert done.code == 2
    assert "has no task head (task.json); make one with `gpt finetune`" in done.err
