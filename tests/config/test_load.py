"""Reading recipes: strict, with one line for whatever does not fit."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.load import apply_overrides, build_recipe, dump_recipe, load_recipe
from gptcli.config.schema import STAGES, ParallelSizes
from gptcli.config.shipped import shipped_recipes
from gptcli.errors import UserError

MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 8, "context_length": 16}
BASE = {"model": MODEL, "tokenizer": "bytes", "train": {"max_steps": 10, "global_batch_size": 4}}
# What the stages require beyond that.
TRAINED = {"model": None, "tokenizer": None, "init_from": "runs/base"}
REQUIRED = {
    "sft": TRAINED,
    "finetune": {"finetune": {"task": "similarity"}},
    "rlhf-reward": TRAINED,
    "rlhf-ppo": TRAINED | {"ppo": {"minibatch_size": 4, "rollout_batch_size": 8}, "reward": {"function": "r.py:f"}},
    "rlhf-dpo": TRAINED,
    "rlhf-grpo": TRAINED | {"grpo": {"rollout_batch_size": 8}, "reward": {"function": "r.py:f"}},
}


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(BASE))
    return file


def refusal(name, *overrides, stage=None):
    with pytest.raises(UserError) as caught:
        load_recipe(str(name), overrides, stage=stage)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_minimal_recipe_gets_defaults_and_a_name(recipe_file):
    recipe = load_recipe(str(recipe_file))
    assert recipe.stage == "pretrain"
    assert recipe.run.name == "mine"
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.train.micro_batch_size == "auto"


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("optim.warmup_step=5", "'warmup_steps'"),
        ("model.n_layers=5", "'n_layer'"),
        ("trian.max_steps=5", "'train'"),
        ("lr=1", "'optim.lr'"),
        ("optim.max_steps=5", "'train.max_steps'"),
        ("parallel.ddp=2", "'dp'"),
    ],
)
def test_unknown_key_names_the_nearest(recipe_file, override, suggested):
    message = refusal(recipe_file, override)
    key = "trian" if override.startswith("trian") else override.partition("=")[0]
    assert message == f"mine.yaml: {key}: unknown key; did you mean {suggested}?"


def test_unknown_key_without_a_near_one_lists_the_known(recipe_file):
    assert "known here: dp, fsdp, tp" in refusal(recipe_file, "parallel." + 40 * "q" + "=2")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.max_steps=many", "train.max_steps: expected a whole number, not 'many'"),
        ("train.max_steps=1.5", "train.max_steps: expected a whole number, not 1.5"),
        ("train.max_steps=true", "train.max_steps: expected a whole number, not True"),
        ("train.max_steps=.inf", "train.max_steps: expected a whole number"),
        ("optim.lr=[1]", "optim.lr: expected a number, not a list"),
        ("optim.lr=null", "optim.lr: expected a number, not nothing"),
        ("optim.betas=[0.9]", "optim.betas: expected [a number, a number]"),
        ("optim.betas=[0.9, x]", "optim.betas[1]: expected a number, not 'x'"),
        ("model.bias=maybe", "model.bias: expected true or false, not 'maybe'"),
        ("model.bias=1", "model.bias: expected true or false"),
        ("model.scalar_heads={value: x}", "model.scalar_heads.value: expected a whole number"),
        ("model.norm_position=middle", "model.norm_position: 'middle' is none of pre, post"),
        ("optim=3", "optim: expected a block of keys, not 3"),
        ("train.micro_batch_size=big", "train.micro_batch_size: expected auto or a whole number, not 'big'"),
        ("parallel=dpp", "parallel: expected none | ddp | fsdp | tp or a block of keys, not 'dpp'"),
        ("stage=[sft]", "stage"),
    ],
)
def test_wrong_type_is_refused(recipe_file, override, complaint):
    assert complaint in refusal(recipe_file, override)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.n_layer=0", "model.n_layer: must be at least 1, not 0"),
        ("model.dropout=1", "model.dropout: must be less than 1"),
        ("model.dropout=-0.1", "model.dropout: must be at least 0"),
        ("optim.lr=0", "optim.lr: must be more than 0"),
        ("optim.lr=.nan", "optim.lr: expected a number, not nan"),
        ("optim.min_lr_ratio=1.01", "optim.min_lr_ratio: must be at most 1"),
        ("train.micro_batch_size=0", "train.micro_batch_size: must be at least 1"),
        ("run.seed=-1", "run.seed: must be at least 0"),
        ("sampling.top_p=0", "sampling.top_p: must be more than 0"),
        ("sampling.typical_p=1.1", "sampling.typical_p: must be at most 1"),
        ("sampling.presence_penalty=2.5", "sampling.presence_penalty: must be at most 2"),
        ("sampling.no_repeat_ngram=-1", "sampling.no_repeat_ngram: must be at least 0"),
        ("sampling.num_beams=0", "sampling.num_beams: must be at least 1"),
        ("parallel.dp=0", "parallel.dp: must be at least 1"),
    ],
)
def test_out_of_bounds_is_refused(recipe_file, override, complaint):
    assert complaint in refusal(recipe_file, override)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["init_from=runs/base"], "model, init_from: give exactly one of them"),
        (["model=null"], "model, init_from: give exactly one of them"),
        (["tokenizer=null", "data.source=[a.txt]"], "tokenizer: missing"),
        (["sampling.min_new_tokens=201"], "sampling.min_new_tokens: 201 is more than max_new_tokens 200"),
        (["sampling.num_beams=2", "sampling.best_of=2"], "sampling.best_of: draws, and num_beams does not"),
        (
            ["sampling.num_beams=2", "sampling.temperature=.7"],
            "sampling.temperature: 0.7 has no meaning with num_beams",
        ),
        (["sampling.num_beams=2", "sampling.typical_p=.7"], "sampling.typical_p: has no meaning with num_beams"),
        (["sampling.length_penalty=.6"], "sampling.length_penalty: has no meaning without num_beams"),
        (["sampling.early_stopping=never"], "sampling.early_stopping: has no meaning without num_beams"),
        (
            ["sampling.best_of=2", "sampling.temperature=0"],
            "sampling.best_of: with temperature 0 each text is the same",
        ),
        (["sampling.best_of=2", "sampling.num_return=3"], "sampling.num_return: 3 is more than best_of 2"),
        (["sampling.num_beams=2", "sampling.num_return=3"], "sampling.num_return: 3 is more than num_beams 2"),
        (["model.n_head=3"], "model.n_head: 3 heads do not divide n_embd 8"),
        (["model.attention_pattern=banded"], "model.band_width: required"),
        (["model.attention_pattern=alternating"], "model.band_width: required"),
        (["model.band_width=4"], "model.band_width: has no meaning"),
        (["model.position=rope", "model.n_embd=6"], "model.position: rope needs an even head width, not 3"),
        (["model.n_head=4", "model.n_kv_head=3"], "model.n_kv_head: 3 does not divide n_head 4"),
        (["model.rope_scaling={factor: 2}"], "model.rope_scaling: has no meaning with position: learned"),
        (["model.position=sinusoidal", "model.n_embd=9", "model.n_head=3"], "model.position: sinusoidal needs an even"),
        (["context_length=32"], "context_length: belongs to init_from"),
        (["model.scalar_heads={value: 0}"], "model.scalar_heads: each width"),
        (["data.path=x", "data.source=[a]"], "data.path, data.source: give one of"),
        (["data.source=[a]", "data.train=[b]"], "data.source, data.train: give one of"),
        (["data.train=[b]", "data.mixture=[{path: x, weight: 1}]"], "data.train, data.mixture: give one of"),
        (["data.val=[b]"], "data.val: needs data.train"),
        (["data.mixture=[{weight: 1}]"], "data.mixture[0]: give a path or a source"),
        (["data.mixture=[{path: x, source: [y], weight: 1}]"], "data.mixture[0]: give a path or a source"),
        (["lora={rank: 4}"], "lora: updates a trained model; name one with init_from"),
        (
            ["train.max_tokens=5", "train.max_steps=5"],
            "train.max_steps, train.max_tokens, train.epochs: give exactly one",
        ),
        (["train.max_steps=null"], "train.max_steps, train.max_tokens, train.epochs: give exactly one"),
        (["train.seq_len=17"], "train.seq_len: 17 is more than model.context_length 16"),
        (["train.batch_ramp={start: 8, tokens: 9}"], "train.batch_ramp.start: 8 is more than"),
        (["train.micro_batch_size=8"], "train.micro_batch_size: 8 is more than global_batch_size 4"),
        (["optim.warmup_steps=1", "optim.warmup_tokens=1"], "optim.warmup_steps, optim.warmup_tokens"),
        (["optim.decay_steps=1", "optim.decay_tokens=1"], "optim.decay_steps, optim.decay_tokens"),
        (["optim.betas=[0.9, 1]"], "optim.betas: [0.9, 1.0] must lie in [0, 1)"),
        (["optim.schedule=wsd"], "optim.decay_steps: required with schedule: wsd"),
        (["optim.schedule=wsd", "optim.decay_tokens=9"], "optim.decay_tokens: wsd decays at the end of the run"),
        (
            ["optim.schedule=wsd", "optim.decay_steps=9", "train.max_tokens=99"],
            "optim.decay_steps: wsd decays at the end of the run",
        ),
    ],
)
def test_contradiction_is_refused(recipe_file, overrides, complaint):
    assert refusal(recipe_file, *overrides).startswith(f"mine.yaml: {complaint}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.attention_pattern=alternating", "model.band_width=4"],
        ["train.seq_len=16"],
        ["train.batch_ramp={start: 4, tokens: 9}"],
        ["train.micro_batch_size=4"],
        ["optim.schedule=wsd", "optim.decay_steps=3"],
        ["train.max_steps=null", "train.max_tokens=5"],
        ["train.max_tokens=5"],  # takes the place of the recipe's max_steps
        ["optim.schedule=wsd", "optim.decay_tokens=3", "train.max_tokens=5"],
        ["tokenizer=null", "data.path=tokens"],
    ],
)
def test_the_nearest_legal_value_is_accepted(recipe_file, overrides):
    load_recipe(str(recipe_file), overrides)


def test_numbers_that_yaml_reads_as_text(recipe_file):
    text = recipe_file.read_text().replace("max_steps: 10", "max_tokens: 300e9") + "optim: {lr: 6e-4, eps: 1e-8}\n"
    assert yaml.safe_load(text)["optim"]["lr"] == "6e-4"
    recipe_file.write_text(text)
    recipe = load_recipe(str(recipe_file))
    assert recipe.train.max_tokens == 300_000_000_000
    assert isinstance(recipe.train.max_tokens, int)
    assert (recipe.optim.lr, recipe.optim.eps) == (6e-4, 1e-8)


@given(st.floats(1e-30, 1e30), st.integers(1, 10**15))
def test_any_spelling_of_a_number_is_that_number(lr, tokens):
    for spelled_lr in (lr, repr(lr), f"{lr:.17e}"):
        for spelled_tokens in (tokens, str(tokens), float(tokens), f"{tokens:.15e}"):
            tree = BASE | {
                "optim": {"lr": spelled_lr},
                "train": {"max_tokens": spelled_tokens, "global_batch_size": 4},
            }
            recipe = build_recipe(tree, where="r")
            assert (recipe.optim.lr, recipe.train.max_tokens) == (lr, tokens)


def test_set_reads_values_as_yaml(recipe_file):
    overrides = [
        "data.source=[python-stdlib]",
        "optim.lr=6e-4",
        "model.bias=false",
        "tokenizer=bpe:300",
        "train.sample_prompt=",
        "sampling.stop=['a=b', \"\\n\"]",
        "parallel={dp: 2}",
    ]
    recipe = load_recipe(str(recipe_file), overrides)
    assert recipe.data.source == ["python-stdlib"]
    assert recipe.optim.lr == 6e-4
    assert recipe.model.bias is False
    assert recipe.tokenizer == "bpe:300"
    assert recipe.train.sample_prompt == ""
    assert recipe.sampling.stop == ["a=b", "\n"]
    assert recipe.parallel == ParallelSizes(dp=2)


def test_later_set_wins_and_the_rest_of_the_block_stays(recipe_file):
    recipe = load_recipe(str(recipe_file), ["train.max_steps=3", "train.max_steps=4"])
    assert (recipe.train.max_steps, recipe.train.global_batch_size) == (4, 4)


@pytest.mark.parametrize("name", ["007", "12:30", "2024-01-01", "1_000", "0x10"])
def test_a_name_is_what_was_written(recipe_file, name):
    assert load_recipe(str(recipe_file), [f"run.name={name}"]).run.name == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/tmp/x", ".hidden", "a/b"])
def test_a_run_is_a_folder_in_its_dir(recipe_file, name):
    assert "is no name of a folder" in refusal(recipe_file, f"run.name={name}")


def test_a_reward_model_takes_the_functions_place():
    tree = BASE | REQUIRED["rlhf-ppo"]
    apply_overrides(tree, ["reward.checkpoint=runs/rm"])
    assert tree["reward"] == {"checkpoint": "runs/rm"}
    apply_overrides(tree, ["reward.checkpoint=runs/rm", "reward.function=r.py:f"])
    assert tree["reward"] == {"checkpoint": "runs/rm", "function": "r.py:f"}


def test_what_is_set_to_nothing_stays_nothing(recipe_file):
    """An empty list where the default is not empty goes into the run's recipe.yaml, and so to a resume."""
    recipe = load_recipe(str(recipe_file), ["model=null", "tokenizer=null", "init_from=x", "lora.targets=[]"])
    assert recipe.lora.targets == []
    assert build_recipe(yaml.safe_load(dump_recipe(recipe)), where="again") == recipe


def test_a_batch_ramp_is_refused_where_batches_have_one_size():
    tree = BASE | REQUIRED["finetune"] | {"train": BASE["train"] | {"batch_ramp": {"start": 2, "tokens": 9}}}
    with pytest.raises(UserError, match=r"train\.batch_ramp: is for pretrain and sft"):
        build_recipe(tree, where="r", stage="finetune")


def test_setting_the_batch_holds_on_a_cpu_too(recipe_file):
    recipe = load_recipe(str(recipe_file), ["train.global_batch_size_cpu=1", "train.global_batch_size=8"])
    assert (recipe.train.global_batch_size, recipe.train.global_batch_size_cpu) == (8, None)


@pytest.mark.parametrize("override", ["train.max_steps", "=3", "data.source=[a", ""])
def test_malformed_set_is_refused(recipe_file, override):
    assert refusal(recipe_file, override).startswith(f"--set {override}")


def test_one_value_stands_for_a_list_of_one(recipe_file):
    recipe = load_recipe(str(recipe_file), ["data.source=a.txt", "sampling.stop=7"])
    assert (recipe.data.source, recipe.sampling.stop) == (["a.txt"], ["7"])


def test_a_dash_is_stdin(recipe_file):
    assert load_recipe(str(recipe_file), ["data.source=-"]).data.source == ["-"]


def test_a_key_of_another_stage_is_sent_there(recipe_file):
    assert "dpo: unknown key; it belongs to `gpt rlhf-dpo`" in refusal(recipe_file, "dpo.beta=1")


def test_null_leaves_a_list_out(recipe_file):
    assert load_recipe(str(recipe_file), ["data.source=null", "data.path=x"]).data.source == []


def test_stage_mismatch_names_both_verbs(recipe_file):
    assert refusal(recipe_file, "stage=sft", stage="pretrain") == (
        "mine.yaml: this recipe is for `gpt sft`, not `gpt pretrain`"
    )
    assert load_recipe(str(recipe_file), ["model=null", "init_from=x"], stage="sft").stage == "sft"
    assert "did you mean 'pretrain'?" in refusal(recipe_file, "stage=pretrian")


def test_unreadable_files(tmp_path):
    assert "no such file or shipped recipe" in refusal(tmp_path / "none.yaml")
    assert "did you mean 'shakespeare-char'?" in refusal("shakespear-char")
    assert "is a directory" in refusal(tmp_path)
    broken = tmp_path / "broken.yaml"
    broken.write_text("model:\n  n_layer: 1\n  n_head: [1\ntrain: 3\n")
    assert re.search(r"broken\.yaml: line 4: not YAML: ", refusal(broken))
    for bad, complaint in (("", "nothing"), ("- a\n", "a list"), ("word", "'word'")):
        broken.write_text(bad)
        assert f"a recipe is a mapping of keys, this is {complaint}" in refusal(broken)


@pytest.mark.parametrize("junk", [b"a: \xff\n", b"a: \x00\n", b"a: \t- b\n"])
def test_junk_is_refused_in_one_line(tmp_path, junk):
    (tmp_path / "junk.yaml").write_bytes(junk)
    assert "junk.yaml:" in refusal(tmp_path / "junk.yaml")


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_shipped_recipe_survives_dump_and_load(path, tmp_path):
    recipe = load_recipe(str(path))
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe(str(copy)) == recipe


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_survives_dump_and_load(stage):
    recipe = build_recipe({**BASE, "stage": stage, **REQUIRED.get(stage, {})}, where="r")
    assert type(recipe) is STAGES[stage]
    assert build_recipe(yaml.safe_load(dump_recipe(recipe)), where="r") == recipe


@given(
    st.text(),
    st.lists(st.text()),
    st.floats(1e-300, 1e300),
    st.tuples(*[st.floats(0, 0.999)] * 2),
    st.booleans(),
)
def test_any_value_survives_dump_and_load(prompt, stop, lr, betas, bias):
    tree = BASE | {
        "model": MODEL | {"bias": bias},
        "train": BASE["train"] | {"sample_prompt": prompt},
        "sampling": {"stop": stop},
        "optim": {"lr": lr, "betas": list(betas)},
    }
    recipe = build_recipe(tree, where="r")
    assert recipe.train.sample_prompt == prompt
    assert build_recipe(yaml.safe_load(dump_recipe(recipe)), where="r") == recipe
