"""GPT-1's claim in small: pretraining on WikiText-2 makes a better classifier of tweets than none does.

Positive against negative by the sign of the mean rating, split by a hash of the text. The pretrained model is kept in
the user's cache under the hash of all that makes it, so only the first run pays for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from statistics import mean

import pytest
from tokenizers import normalizers

from gptcli.tokenizer.build import train_bpe
from tests.conftest import gpt

pytestmark = pytest.mark.slow
HOURS = 4 * 3600
SEEDS = (1, 2, 3)
# 1M parameters: what two cores pretrain in a quarter of an hour
PRETRAIN = """\
run: {name: base, dir: runs}
model: {n_layer: 4, n_head: 2, n_embd: 128, context_length: 128, position: rope, norm: rmsnorm, activation: relu2,
  qk_norm: true, bias: false, residual_init: zero}
tokenizer: tokenizer
data: {train: [train.txt], val: [valid.txt]}
optim: {name: muon, muon_lr: 0.01, lr: 2.0e-2, schedule: linear, min_lr_ratio: 0.0, warmup_steps: 20, weight_decay: 0.0}
train: {max_steps: 1500, global_batch_size: 16, log_every: 50, eval_every: 500, eval_rows: 64, save_every: 0}
"""
FINETUNE = """\
stage: finetune
data: {train: [tweets-train.jsonl], val: [tweets-dev.jsonl]}
finetune: {task: classification, dropout: 0.1}
optim: {lr: 1.0e-3, schedule: linear, warmup_ratio: 0.05, min_lr_ratio: 0.0, betas: [0.9, 0.999], weight_decay: 0.01}
train: {epochs: 3, global_batch_size: 32, log_every: 50, save_every: 0}
"""


def as_prose(text: str) -> str:
    """WikiText's lines in lower case, as GPT-1 read its books, and without the marks of its tokenizer."""
    text = text.lower().replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").replace("<unk>", "")
    text = re.sub(r" ([,.;:!?)\]%])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r" ('(?:s|re|ve|ll|d|m)\b|n't)", r"\1", text)
    lines = (re.sub(" +", " ", line).strip() for line in text.split("\n") if not line.startswith(" ="))
    return "\n".join(line for line in lines if line)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pretrained model in runs/base."""
    shared = Path(__file__).resolve().parents[3] / "shared" / "data" / "text" / "wikitext2"
    if not shared.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    texts = {name: as_prose((shared / f"{name}.txt").read_text("utf-8")) for name in ("train", "valid")}
    made_of = PRETRAIN + "".join(texts.values())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "gptcli" / "tests" / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    if not (folder / "runs/base/latest").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / f"{name}.txt").write_text(text, "utf-8")
        tokenizer = train_bpe(texts["train"].split("\n"), 6144)
        tokenizer.backend.normalizer = normalizers.Lowercase()
        (folder / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(folder / "tokenizer")
        (folder / "base.yaml").write_text(PRETRAIN)
        done = gpt("pretrain", "-r", "base.yaml", "-q", cwd=folder, timeout=HOURS, OMP_NUM_THREADS="2")
        assert done.code == 0, done.err
    return folder


def write_tweets(source: Path, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """train, dev and test: 80, 10 and 10 percent by a hash of the text."""
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "dev": [], "test": []}
    for line in source.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["score"]:
            place = hashlib.sha256(row["text"].encode()).digest()[0] % 10
            part = "train" if place < 8 else "dev" if place == 8 else "test"
            parts[part].append((row["text"], "positive" if row["score"] > 0 else "negative"))
    for name, examples in parts.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in examples]
        (folder / f"tweets-{name}.jsonl").write_text("\n".join(lines) + "\n")
    return parts


def baseline(parts: dict[str, list[tuple[str, str]]]) -> float:
    """TF-IDF and logistic regression, its strength chosen on dev."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    fitted = []
    for strength in (0.1, 1, 10, 100):
        model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=strength, max_iter=1000))
        fitted.append(model.fit(*zip(*parts["train"], strict=True)))
    best = max(fitted, key=lambda model: model.score(*zip(*parts["dev"], strict=True)))
    return best.score(*zip(*parts["test"], strict=True))


def accuracy(folder: Path, name: str, seed: int, *overrides: str) -> float:
    """On the test part, of the checkpoint that dev chose."""
    sets = [part for override in overrides for part in ("-s", override)]
    done = gpt(
        "finetune", "-r", "tweets.yaml", "-q", "--seed", str(seed), "-s", f"run.name={name}-{seed}", *sets,
        cwd=folder, timeout=HOURS, OMP_NUM_THREADS="2",
    )  # fmt: skip
    assert done.code == 0, done.err
    best = folder / f"runs/{name}-{seed}/best"
    row = gpt("eval", "-c", best, "--task", "finetune", "--data", "tweets-test.jsonl", "--json", "-q", cwd=folder)
    return row.json()["accuracy"]


def test_pretraining_helps_to_tell_good_tweets_from_bad(base: Path, shared_data: Path, tmp_path: Path) -> None:
    parts = write_tweets(shared_data / "cls/vader_tweets.jsonl", tmp_path)
    (tmp_path / "tweets.yaml").write_text(FINETUNE)
    shape = json.loads((base / "runs/base/latest/config.json").read_text())
    kept = ("n_layer", "n_head", "n_embd", "context_length", "position", "norm", "activation", "qk_norm", "bias")
    scratch = [f"model.{key}={json.dumps(shape[key])}" for key in (*kept, "residual_init")]
    starts = {
        "pretrained": [f"init_from={base}/runs/base"],
        "scratch": [f"tokenizer={base}/tokenizer", *scratch],
    }
    found = {
        f"{start}, lm_coef {lm_coef}": mean(
            accuracy(tmp_path, f"{start}-{lm_coef}", seed, f"finetune.lm_coef={lm_coef}", *overrides) for seed in SEEDS
        )
        for start, overrides in starts.items()
        for lm_coef in (0.0, 0.5)
    }
    found["TF-IDF and logistic regression"] = baseline(parts)
    print(json.dumps(found, indent=2))
    for lm_coef in (0.0, 0.5):
        assert found[f"pretrained, lm_coef {lm_coef}"] > found[f"scratch, lm_coef {lm_coef}"] + 0.02
