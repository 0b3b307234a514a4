"""The command line as its users meet it: help, pipes, JSON, exit statuses, one line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Tiny, gpt

VERBS = (
    "tokenize",
    "pretrain",
    "sft",
    "finetune",
    "classify",
    "rlhf-label",
    "rlhf-reward",
    "rlhf-ppo",
    "rlhf-dpo",
    "rlhf-grpo",
    "generate",
    "chat",
    "serve",
    "eval",
    "score",
    "compare",
    "report",
    "doctor",
    "data",
    "plan",
    "recipes",
    "inspect",
    "import",
    "export",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ./runs/tiny in it."""
    from tests.conftest import make_tiny

    tiny = make_tiny(tmp_path_factory.mktemp("trained"), steps=60)
    tiny.train()
    return tiny.folder


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['gpt', *{arguments!r}]\n"
        "from gptcli.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "heavy = {'torch', 'rich', 'tokenizers', 'datasets', 'numpy', 'yaml'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: gpt" in done.stdout


def test_a_checkpoint_is_used_without_torchs_compiler(trained: Path) -> None:
    """Importing it takes as long as all else together; one initialisation on the meta device is enough to do so."""
    code = (
        "import sys; sys.argv = ['gpt', 'generate', 'line', '-n', '3', '-q']\n"
        "from gptcli.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "heavy = {'torch._dynamo', 'sympy', 'matplotlib', 'transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=trained, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version_and_module() -> None:
    from gptcli import __version__

    assert gpt("--version").out == f"gpt {__version__}\n"


# ---- mistakes -----------------------------------------------------------------------------------------------


def complains(arguments: list, *words: str, code: int = 2, cwd: Path | None = None, stdin: bytes = b"") -> None:
    done = gpt(*arguments, cwd=cwd, stdin=stdin)
    assert done.code == code, done
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    for word in words:
        assert word in lines[0], done.err
    assert done.out == ""


def test_mistakes_in_recipes_are_one_line(tiny: Tiny) -> None:
    r = ["pretrain", "-r", tiny.recipe, "-q"]
    complains([*r, "-s", "optim.lrr=1"], "tiny.yaml", "optim.lrr", "did you mean 'lr'?")
    complains([*r, "-s", "train.max_steps=soon"], "train.max_steps", "a whole number", "'soon'")
    complains([*r, "-s", "model.n_head=3"], "model.n_head", "3 heads do not divide n_embd 16")
    complains([*r, "-s", "train.seq_len=99"], "train.seq_len", "99", "context_length 16")
    complains([*r, "-s", "model.n_layer=0"], "model.n_layer", "at least 1")
    complains(["pretrain", "-r", "gpt2-smal"], "gpt2-smal", "did you mean 'gpt2-small'?")
    complains(["pretrain"], "needs --recipe")
    complains(
        ["pretrain", "-r", "gpt3-13b.yaml", "-s", "model.n_embd=5140"],
        "40 heads do not divide n_embd 5140"[3:],
    )


def test_mistakes_in_data_are_one_line(tiny: Tiny, tmp_path: Path) -> None:
    r = ["pretrain", "-r", tiny.recipe, "-q"]
    complains([*r, "-s", "data.source=[missing.txt]"], "missing.txt", "no such file")
    (tmp_path / "empty.txt").write_text(" \n")
    complains([*r, "-s", f"data.source=[{tmp_path}/empty.txt]"], "the corpus is empty")
    (tmp_path / "short.txt").write_text("short")
    complains([*r, "-s", f"data.source=[{tmp_path}/short.txt]"], "the corpus has 4 tokens", "needs 17")
    (tmp_path / "bad.txt").write_bytes(b"fine\nnot \xff fine\n")
    complains([*r, "-s", f"data.source=[{tmp_path}/bad.txt]"], "bad.txt:2", "not UTF-8", "0xff")
    assert not tiny.run_dir.exists()


def test_what_cannot_fit_is_said_before_it_is_built() -> None:
    complains(
        ["pretrain", "-r", "gpt3-175b", "-q", "-s", "data.source=[python-stdlib]", "-s", "tokenizer=bytes"],
        "2,6",  # 16 bytes x 174.6e9
        "GiB",
        "gpt plan",
    )


def test_no_hub_is_one_line_that_says_what_to_do() -> None:
    done = gpt("pretrain", "-r", "gpt2-small", "-q", HF_HUB_OFFLINE="1")
    assert done.code == 2
    assert "python-stdlib" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_mistakes_with_checkpoints_are_one_line(trained: Path, tmp_path: Path) -> None:
    complains(["generate", "x"], "no checkpoint", "gpt pretrain", cwd=tmp_path)
    complains(["generate", "x", "-c", "nowhere"], "nowhere: no such checkpoint", cwd=tmp_path)
    complains(["generate", "x", "-c", tmp_path], "holds no checkpoint")
    complains(["generate", "x", "--top-p", "1.5", "-c", trained / "runs/tiny"], "top_p", "at most 1")
    complains(["generate", "-c", trained / "runs/tiny"], "<stdin>: not UTF-8", stdin=b"\xff")
    complains(["eval", "--task", "perplexit", "-c", trained / "runs/tiny"], "did you mean 'perplexity'?")
    complains(["eval", "--data", "nothing.txt", "-c", trained / "runs/tiny", "-q"], "nothing.txt: no such file")
    complains(["pretrain", "--resume", tmp_path], "not a run")


def test_a_swapped_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    import shutil

    from gptcli.tokenizer.build import train_bpe

    copy = tmp_path / "copy"
    shutil.copytree(trained / "runs/tiny/latest", copy)
    train_bpe(["aaa bbb"], 257).save(copy)
    complains(["generate", "x", "-c", copy], "tokenizer.json", "is not the one this checkpoint was trained with")
    train_bpe(["some longer text to learn merges from " * 9], 280).save(copy)
    complains(["generate", "x", "-c", copy], "280 tokens, but the model only 257")


def test_a_truncated_checkpoint_is_one_line(trained: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained / "runs/tiny/latest", copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    complains(["generate", "x", "-c", copy], "model.safetensors: damaged or cut short")


def test_unknown_option_exits_2() -> None:
    done = gpt("generate", "--top-q", "0.9")
    assert done.code == 2
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = gpt("pretrain", "-r", "nowhere.yaml", "--debug")
    assert "Traceback" in done.err
    assert done.code == 2


# ---- generate -------------------------------------------------------------------------------------------------


def test_generate_writes_text_alone_to_a_pipe(trained: Path) -> None:
    one = gpt("generate", "line 7", "--seed", "3", "-n", "40", cwd=trained)
    assert one.code == 0
    assert one.err == "gpt: using runs/tiny/step-000060\n"
    piped = gpt("generate", "--seed", "3", "-n", "40", "-q", cwd=trained, stdin=b"line 7\n")
    assert (piped.out, piped.err) == (one.out, "")
    rows = [
        json.loads(x)
        for x in gpt(
            "generate",
            "line 7",
            "--seed",
            "3",
            "-n",
            "40",
            "--json",
            "--samples",
            "2",
            "--logprobs",
            cwd=trained,
        ).out.splitlines()
    ]
    assert rows[0]["text"] + "\n" == one.out
    assert {"id", "prompt", "text", "tokens", "finish_reason", "logprobs"} <= rows[0].keys()
    assert len(rows[0]["logprobs"]) == rows[0]["tokens"] == 40
    assert rows[0]["text"] != rows[1]["text"]
    assert gpt("generate", "line 7", "-n", "40", "-q", "--echo", "--seed", "3", cwd=trained).out == "line 7" + one.out


def test_generate_searches_and_chooses(trained: Path) -> None:
    def rows(*options: str) -> list[dict]:
        done = gpt("generate", "line 7", "-n", "12", "--seed", "3", "-q", "--json", *options, cwd=trained)
        assert done.code == 0, done.err
        return [json.loads(x) for x in done.out.splitlines()]

    beams = rows("--num-beams", "4", "--num-return", "3", "--length-penalty", "0", "--early-stopping", "never")
    assert len({r["text"] for r in beams}) == 3
    assert [r["score"] for r in beams] == sorted((r["score"] for r in beams), reverse=True)
    best = rows("--best-of", "4", "--num-return", "4", "--best-of-score", "sum", "--logprobs", "--ignore-eos")
    assert [r["score"] for r in best] == sorted((sum(r["logprobs"]) for r in best), reverse=True)
    text = gpt("generate", "line 7", "-n", "12", "-q", "--num-beams", "4", "--num-return", "3", "--length-penalty", "0",
               "--early-stopping", "never", cwd=trained).out  # fmt: skip
    assert text == "\n---\n".join(r["text"] for r in beams) + "\n"


def test_generate_under_constraints(trained: Path) -> None:
    digits = [option for d in "0123456789" for option in ("--bad-words", d)]
    options = ("--logit-bias", "x=9", "--logit-bias", "122=9", "--min-new-tokens", "25", "--typical-p", "0.9",
               "--presence-penalty", "0.5", "--frequency-penalty", "0.5", "--no-repeat-ngram", "3")  # fmt: skip
    done = gpt("generate", "line 7", "-n", "30", "--seed", "3", "-q", *digits, *options, cwd=trained)
    assert done.code == 0, done.err
    assert len(done.out.strip("\n")) >= 25
    assert {"x", "z"} <= set(done.out)
    assert not set("0123456789") & set(done.out)


def test_generate_refuses_options_that_contradict_each_other(trained: Path) -> None:
    at = ["-c", trained / "runs/tiny"]
    complains(["generate", "x", *at, "--num-beams", "2", "--top-k", "5"], "top_k", "num_beams, which draws nothing")
    complains(["generate", "x", *at, "--num-beams", "2", "--samples", "2"], "--samples", "--num-return")
    complains(["generate", "x", *at, "--logprobs"], "--logprobs: are told in rows")
    complains(["generate", "x", *at, "--num-return", "2"], "num_return: 2 is more than num_beams 1")
    complains(
        ["generate", "x", *at, "--early-stopping", "maybe"], "early_stopping", "never or true or false", "'maybe'"
    )
    complains(["generate", "x", *at, "--logit-bias", "50256"], "--logit-bias 50256", "TOKEN=VALUE")
    complains(["generate", "x", *at, "--logit-bias", "a=b"], "logit_bias.a: expected a number, not 'b'")
    complains(["generate", "x", *at, "--logit-bias", "ab=1"], "logit_bias: 'ab' is 2 tokens")


@pytest.mark.parametrize("verb", ["generate", "score", "eval"])
def test_a_precision_that_is_none_is_refused(trained: Path, verb: str) -> None:
    done = gpt(verb, "--precision", "fp8", cwd=trained, stdin=b"a")
    assert (done.code, done.err.splitlines()[-1]) == (2, "gpt: precision: 'fp8' is none of auto, fp32, bf16")


def test_without_a_stdout_nothing_breaks(trained: Path) -> None:
    command = f"{sys.executable} -m gptcli generate a -n 2 -q >&-"
    done = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_generate_with_a_draft(trained: Path) -> None:
    """A draft that is the checkpoint before: the greedy text stays, a drawn one is the same for any --draft-tokens."""
    call = ["generate", "line 7", "-n", "30", "-q", "--seed", "3"]
    draft = ["--draft", "runs/tiny/step-000030"]
    greedy = [gpt(*call, "--temperature", "0", *options, cwd=trained).out for options in ([], draft)]
    assert greedy[0] == greedy[1]
    one, four = (gpt(*call, *draft, "--draft-tokens", k, cwd=trained) for k in "14")
    assert (one.code, one.out, one.err) == (0, four.out, "")
    row = json.loads(gpt(*call, *draft, "--json", cwd=trained).out)
    assert row["text"] + "\n" == one.out
    assert 0 < row["draft_accepted"] <= min(row["tokens"] + 1, row["draft_proposed"])


def test_generate_refuses_a_draft_that_does_not_fit(trained: Path, tmp_path: Path) -> None:
    from gptcli.modeldir import load_model, open_model_dir, save_model
    from gptcli.tokenizer.build import char_tokenizer

    at = ["generate", "x", "-c", trained / "runs/tiny", "--draft"]
    complains([*at, "nowhere"], "nowhere: no such checkpoint")
    complains([*at, trained / "runs/tiny", "--num-beams", "2"], "a draft speeds up one text", "num_beams and best_of")
    folder = open_model_dir((trained / "runs/tiny/latest").resolve())
    weights = load_model(folder).state_dict()
    save_model(tmp_path, folder.config, weights, char_tokenizer(["abc"]))
    complains([*at, tmp_path], f"{tmp_path}: its tokenizer is not that of", "a draft must share it")
    (tmp_path / "tokenizer.json").unlink()
    complains([*at, tmp_path], "has no tokenizer.json")


def test_generate_in_bf16(trained: Path) -> None:
    done = gpt("generate", "line 7", "--seed", "3", "-n", "10", "-q", "--precision", "bf16", cwd=trained)
    assert done.code == 0, done.err
    assert done.out.strip()


def test_a_closed_pipe_ends_quietly(trained: Path) -> None:
    command = f"echo 'line 1' | {sys.executable} -m gptcli generate -n 3000 --ignore-eos -q | head -c 20"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=trained,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout) == 20


def test_checkpoint_from_the_environment(trained: Path, tmp_path: Path) -> None:
    done = gpt("generate", "x", "-n", "3", "--seed", "1", cwd=tmp_path, GPT_CHECKPOINT=str(trained / "runs/tiny"))
    assert (done.code, done.err) == (0, "")


# ---- the other verbs ------------------------------------------------------------------------------------------


def test_eval_json_and_the_held_out_default(trained: Path) -> None:
    row = json.loads(gpt("eval", "--json", cwd=trained).out)
    assert row["task"] == "perplexity"
    assert row["tokens"] == row["bytes"]  # a byte tokenizer
    assert row["bits_per_byte"] == pytest.approx(row["nll"] / row["bytes"] / 0.6931471805599453)
    again = json.loads(gpt("eval", "--json", "--stride", "16", "-c", "runs/tiny", cwd=trained).out)
    assert again["perplexity"] != row["perplexity"]
    named = json.loads(gpt("eval", "--json", "--data", "text.txt", cwd=trained).out)
    assert named["bytes"] == (trained / "text.txt").stat().st_size


def test_eval_compression_names_three_figures(trained: Path) -> None:
    row = json.loads(gpt("eval", "--task", "compression", "--json", cwd=trained).out)
    assert 0 < row["xz_given_training_text"] < row["gzip"]
    shown = gpt("eval", "--task", "compression", cwd=trained).out
    assert all(name in shown for name in ("gzip -9", "xz -9e, given the training text", "this model"))


def test_plan_json_has_what_scripts_rely_on() -> None:
    row = json.loads(gpt("plan", "-r", "gpt3-175b.yaml", "--json").out)
    assert row["params"] == 174_604_259_328
    assert row["params_by_part"]["token_embedding"] == 617_558_016
    assert row["tokens"] == 300_000_000_000
    assert row["train_flops"] == 6 * row["params"] * row["tokens"]


def test_recipes_list_show_copy_schema(tmp_path: Path) -> None:
    listed = json.loads(gpt("recipes", "list", "--json").out)["recipes"]
    assert {"gpt1", "gpt2-xl", "gpt3-175b", "quickstart", "shakespeare-char"} <= {r["name"] for r in listed}
    assert all(r["title"] for r in listed)
    assert gpt("recipes", "copy", "gpt1", cwd=tmp_path).out == "gpt1.yaml\n"
    assert (tmp_path / "gpt1.yaml").read_text() == gpt("recipes", "show", "gpt1").out
    complains(["recipes", "copy", "gpt1"], "exists", cwd=tmp_path)
    assert "optim.lr: a number" in gpt("recipes", "schema").out
    assert json.loads(gpt("recipes", "schema", "--json", "--stage", "rlhf-ppo").out)["properties"]["ppo"]


def test_tokenize_and_filter_and_train_on_it(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 20)
    row = json.loads(gpt("tokenize", "*.txt", "-o", "tok", "-t", "bpe:300", "--json", cwd=tmp_path).out)
    assert row["documents"] == row["eot_tokens"] == 30
    assert 257 < row["vocab_size"] <= 300  # so little text has few pairs to merge
    ids = gpt("tokenize", "-t", "tok", cwd=tmp_path, stdin="document 7\nété <|endoftext|>\n".encode())
    assert len(ids.out.splitlines()) == 2
    back = gpt("tokenize", "-t", "tok", "--decode", cwd=tmp_path, stdin=ids.out.encode())
    assert [json.loads(x)["text"] for x in back.out.splitlines()] == ["document 7", "été <|endoftext|>"]
    (tmp_path / "r.yaml").write_text(
        "model: {n_layer: 1, n_head: 1, n_embd: 8, context_length: 8}\ndata: {path: tok}\n"
        "train: {max_steps: 2, global_batch_size: 2}\n"
    )
    assert gpt("pretrain", "-r", "r.yaml", "-q", cwd=tmp_path).out == "runs/r/step-000002\n"


def test_dry_run_writes_nothing(tiny: Tiny) -> None:
    before = sorted(p.name for p in tiny.folder.iterdir())
    cache = tiny.folder.parent / "dry-cache"
    done = gpt("pretrain", "-r", tiny.recipe, "--dry-run", "--json", cwd=tiny.folder, GPTCLI_CACHE=str(cache))
    assert json.loads(done.out)["step"] == 1
    assert sorted(p.name for p in tiny.folder.iterdir()) == before
    assert not cache.exists()


def test_a_dry_run_of_a_recipe_of_epochs(trained: Path, tmp_path: Path) -> None:
    rows = [{"text": "ab"[i % 2] * (i % 9 + 1), "label": "ab"[i % 2], "id": i} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ("-s", f"init_from={trained}/runs/tiny", "-s", "data.train=[t.jsonl]")
    done = gpt("finetune", "-r", "finetune-classification", *given, "--dry-run", cwd=tmp_path)
    assert (done.code, sorted(p.name for p in tmp_path.iterdir())) == (0, ["t.jsonl"]), done.err


def test_a_resume_from_elsewhere_says_what_its_paths_mean(tiny: Tiny, tmp_path: Path) -> None:
    tiny.train("train.max_steps=1")
    recipe = tiny.run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{tiny.folder}/text.txt", "text.txt"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = gpt("pretrain", "--resume", tiny.run_dir, "-s", "train.max_steps=2", "-q", cwd=elsewhere)
    assert (done.code, done.out) == (2, "")
    assert "text.txt: no such file" in done.err
    assert f"({tiny.run_dir}/recipe.yaml names it as seen from where the run began)" in done.err


def test_a_resume_keeps_what_makes_the_run_this_run(trained: Path) -> None:
    before = (trained / "runs/tiny/recipe.yaml").read_bytes()
    for change, words in (
        ("run.seed=5", "run.seed: was 1337, not 5"),
        ("optim.name=muon", "optim.name: was adamw, not muon"),
        ("model.n_layer=3", "model: is another"),
        ("run.name=other", "keeps the run's name and place; leave out -s run.name=other"),
    ):
        done = gpt("pretrain", "--resume", "runs/tiny", "-s", change, "-q", cwd=trained)
        assert (done.code, done.out) == (2, "")
        assert words in done.err
    assert "run.seed" in gpt("pretrain", "--resume", "runs/tiny", "--seed", "5", "-q", cwd=trained).err
    assert (trained / "runs/tiny/recipe.yaml").read_bytes() == before
    done = gpt("pretrain", "--resume", "runs/tiny", cwd=trained)
    assert "the run has had all of its" in done.err


def test_a_reader_that_has_gone_ends_no_training(tiny: Tiny) -> None:
    command = f"{sys.executable} -m gptcli pretrain -r {tiny.recipe} 2>&1 >/dev/null | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tiny.folder, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert (tiny.folder / "runs/tiny/latest/config.json").is_file()


def test_usage_errors_are_one_line() -> None:
    for arguments, words in (
        (("plan", "-r", "gpt2-small", "--gpus", "0"), "gpt: Invalid value for '--gpus': "),
        (("plan", "--nonsense"), "gpt: No such option: --nonsense"),
        (("nonsense",), "gpt: No such command 'nonsense'."),
    ):
        done = gpt(*arguments)
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert done.err.startswith(words)
        assert "--help`)" in done.err


def test_a_closed_stdin_and_a_stdout_that_is_not_utf_8(trained: Path) -> None:
    for arguments in (("score",), ("generate", "-i", "-"), ("tokenize", "--tokenizer", "bytes")):
        command = f"{sys.executable} -m gptcli {' '.join(arguments)} <&-"
        done = subprocess.run(["bash", "-c", command], cwd=trained, capture_output=True, text=True)
        assert "internal error" not in done.stderr
    done = gpt("generate", "hé", "--max-new-tokens", "1", "--json", cwd=trained, PYTHONIOENCODING="ascii")
    assert done.json()["prompt"] == "hé"


def test_layouts_that_are_not_there_leave_no_run(tiny: Tiny) -> None:
    for layout, named in (("fsdp", "fsdp"), ("{tp: 2}", "{dp: 1, fsdp: 1, tp: 2}")):
        done = gpt("pretrain", "-r", tiny.recipe, "--nproc", "2", "-s", f"parallel={layout}", cwd=tiny.folder)
        assert done.code == 2
        assert done.err.strip().endswith(f"parallel: {named}: 2 processes can be laid out as ddp alone in this version")
    assert not (tiny.folder / "runs").exists()


def test_stdin_for_several_processes_is_refused(tiny: Tiny) -> None:
    done = gpt(
        "pretrain", "-r", tiny.recipe, "-s", "data.source=[-]", "--nproc", "2", cwd=tiny.folder, stdin=b"a" * 999
    )
    assert (done.code, done.out) == (2, "")
    assert done.err.strip().endswith("data: - (stdin) goes to one process alone; write it to a file for several")


def test_shell_completion_is_offered() -> None:
    done = gpt("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "Traceback" not in done.err
