"""What follows from a recipe: the plan of a run, and the schema in words and as JSON Schema."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from gptcli.config.describe import json_schema, key_lines
from gptcli.config.load import build_recipe, dotted_keys, dump_recipe, field_types, load_recipe
from gptcli.config.plan import TrainPlan, make_plan
from gptcli.config.schema import STAGES, BatchRamp, OptimBlock
from gptcli.config.shipped import shipped_recipes
from gptcli.errors import UserError


def plan(**changes):
    given = {
        "max_steps": None,
        "max_tokens": 10**9,
        "seq_len": 8,
        "global_batch_size": 32,
        "micro_batch_size": 2,
        "dp_size": 1,
        "batch_ramp": None,
        "optim": OptimBlock(),
    }
    return TrainPlan(**given | changes)


def test_a_ratio_of_warmup_is_of_the_runs_length_in_its_unit():
    for length, field, expected in (
        ({"max_steps": 200}, "warmup_steps", 20),
        ({"max_tokens": 9000}, "warmup_tokens", 900),
    ):
        given = dataclasses.replace(recipe(**{"max_steps": None, **length}), optim=OptimBlock(warmup_ratio=0.1))
        made = make_plan(given, context_length=16, dp_size=1, micro_batch_size=1)
        assert getattr(made.optim, field) == expected


def recipe(**train):
    tree = {
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 16},
        "tokenizer": "bytes",
        "train": {"max_steps": 10, "global_batch_size": 32} | train,
    }
    return build_recipe(tree, where="r")


# ---- batches -------------------------------------------------------------------------------------


@given(
    st.integers(1, 64),
    st.integers(0, 500),
    st.integers(1, 10**6),
    st.lists(st.integers(0, 2 * 10**6), min_size=2),
)
def test_ramp_grows_in_multiples_of_its_start(start, more, tokens, seen):
    size = start + more
    p = plan(global_batch_size=size, batch_ramp=BatchRamp(start=start, tokens=tokens))
    rows = [p.rows_at(n) for n in sorted(seen)]
    assert rows == sorted(rows)
    assert all(start <= r <= size for r in rows)
    assert all(r % start == 0 for n, r in zip(sorted(seen), rows, strict=True) if n < tokens)
    assert p.rows_at(0) == start
    assert p.rows_at(tokens) == size


def test_ramp_is_linear_in_tokens():
    p = plan(global_batch_size=100, batch_ramp=BatchRamp(start=10, tokens=900))
    assert [p.rows_at(n) for n in (0, 99, 100, 450, 899, 900, 901)] == [10, 10, 20, 50, 90, 100, 100]
    assert plan(global_batch_size=100).rows_at(0) == 100


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_micro_batches_make_up_the_step(dp, micro, accum):
    made = make_plan(
        recipe(global_batch_size=dp * micro * accum), context_length=16, dp_size=dp, micro_batch_size=micro
    )
    assert made.grad_accum_steps == accum
    assert made.grad_accum_steps * made.dp_size * made.micro_batch_size == made.global_batch_size


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_what_does_not_divide_is_refused(rows, dp, micro):
    assume(rows % dp or rows // dp % micro)
    with pytest.raises(UserError, match=r"cannot be shared by|does not divide") as caught:
        make_plan(recipe(global_batch_size=rows), context_length=16, dp_size=dp, micro_batch_size=micro)
    assert str(rows) in str(caught.value)


def test_a_ramp_that_processes_cannot_share_is_refused():
    ramped = recipe(batch_ramp={"start": 2, "tokens": 100})
    with pytest.raises(UserError, match=r"train\.batch_ramp\.start: 2 rows cannot be shared by 4 processes"):
        make_plan(ramped, context_length=16, dp_size=4, micro_batch_size=1)
    assert make_plan(ramped, context_length=16, dp_size=2, micro_batch_size=1).batch_ramp.start == 2


def test_a_cpu_gets_its_own_batch_and_no_ramp():
    both = recipe(global_batch_size_cpu=4, batch_ramp={"start": 8, "tokens": 100})
    on_cpu = make_plan(both, context_length=16, dp_size=1, micro_batch_size=2, on_cpu=True)
    assert (on_cpu.global_batch_size, on_cpu.batch_ramp) == (4, None)
    elsewhere = make_plan(both, context_length=16, dp_size=1, micro_batch_size=2)
    assert (elsewhere.global_batch_size, elsewhere.batch_ramp.start) == (32, 8)


def test_rows_are_as_long_as_the_context_unless_said():
    sizes = {"dp_size": 1, "micro_batch_size": 1}
    assert make_plan(recipe(), context_length=16, **sizes).seq_len == 16
    assert make_plan(recipe(seq_len=5), context_length=16, **sizes).seq_len == 5


def test_the_end_is_in_steps_or_in_tokens():
    by_steps, by_tokens = plan(max_steps=4, max_tokens=None), plan(max_tokens=100)
    assert [by_steps.is_done(s, 10**12) for s in (3, 4, 5)] == [False, True, True]
    assert [by_tokens.is_done(10**12, n) for n in (99, 100, 101)] == [False, True, True]
    assert [by_steps.progress(s, 0) for s in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert [by_tokens.progress(0, n) for n in (0, 25, 100, 900)] == [0, 0.25, 1, 1]


# ---- the schema ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_has_a_line_with_its_meaning(stage):
    lines = key_lines(STAGES[stage])
    assert [line.partition(":")[0] for line in lines] == dotted_keys(STAGES[stage])
    for line in lines:
        assert line.partition("  # ")[2].strip(), line


def test_lines_tell_types_defaults_and_requirements():
    lines = {line.partition(":")[0]: line for line in key_lines(STAGES["pretrain"])}
    assert lines["model.n_layer"].startswith("model.n_layer: a whole number (required)  # ")
    assert lines["optim.lr"].startswith("optim.lr: a number = 0.0003  # ")
    assert lines["optim.name"].startswith("optim.name: adamw | muon = adamw  # ")
    assert lines["train.seq_len"].startswith("train.seq_len: a whole number  # ")


def accepts(schema, value):
    """JSON Schema, as far as recipes use it."""
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    unknown = set(schema) - {
        *("type", "anyOf", "enum", "properties", "required", "additionalProperties", "items", "prefixItems"),
        *("minItems", "maxItems", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"),
        *("description", "default", "title", "$schema"),
    }
    assert not unknown
    if "anyOf" in schema and not any(accepts(arm, value) for arm in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    names = schema.get("type", [])
    names = names if isinstance(names, list) else [names]
    if names and not any(
        isinstance(value, kinds[n]) and (n == "boolean" or not isinstance(value, bool)) for n in names
    ):
        return False
    if isinstance(value, dict):
        return _accepts_object(schema, value)
    if isinstance(value, list):
        parts = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        low, high = schema.get("minItems", 0), schema.get("maxItems", len(value))
        return low <= len(value) <= high and all(map(accepts, parts, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and value > schema.get("exclusiveMinimum", float("-inf"))
            and value < schema.get("exclusiveMaximum", float("inf"))
        )
    return True


def _accepts_object(schema, value):
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not set(schema.get("required", [])) <= set(value):
        return False
    for name, inner in value.items():
        if name not in known and others is False:
            return False
        rule = known.get(name, others if isinstance(others, dict) else {})
        if not accepts(rule, inner):
            return False
    return True


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_json_schema_accepts_shipped_recipes(path):
    tree = yaml.safe_load(path.read_text("utf-8"))
    schema = json_schema(STAGES[tree.get("stage", "pretrain")])
    assert accepts(schema, tree)
    assert accepts(schema, yaml.safe_load(dump_recipe(load_recipe(str(path)))))


@pytest.mark.parametrize("stage", STAGES)
def test_json_schema_describes_every_key(stage):
    def walk(schema, prefix=""):
        for name, rule in schema["properties"].items():
            assert rule["description"]
            yield prefix + name
            for arm in (rule, *rule.get("anyOf", [])):
                if "properties" in arm:
                    yield from walk(arm, f"{prefix}{name}.")

    schema = json_schema(STAGES[stage])
    assert list(walk(schema)) == dotted_keys(STAGES[stage])
    needed = [f.name for f in dataclasses.fields(STAGES[stage]) if f.default is f.default_factory]
    assert schema["required"] == needed  # no default of either kind


@pytest.mark.parametrize(
    ("block", "key", "value"),
    [
        ("model", "n_layers", 3),
        ("model", "n_layer", 0),
        ("model", "n_layer", [3]),
        ("model", "dropout", 1),
        ("model", "bias", "yes"),
        ("optim", "name", "sgd"),
        ("optim", "betas", [0.9]),
        ("optim", "betas", [0.9, 0.95, 0.99]),
        ("optim", "lr", 0),
        ("optim", "grad_clip", None),
        ("train", "micro_batch_size", 0),
        ("train", "batch_ramp", {"start": 3}),
        ("data", "split", "head"),
        ("data", "mixture", [{"path": "x", "weight": 0}]),
    ],
)
def test_schema_and_loader_refuse_the_same(block, key, value):
    tree = yaml.safe_load(dump_recipe(recipe()))
    schema = json_schema(STAGES["pretrain"])
    assert accepts(schema, tree)
    tree.setdefault(block, {})[key] = value
    assert not accepts(schema, tree)
    with pytest.raises(UserError, match=rf"r: {block}\.{key}"):
        build_recipe(tree, where="r")


def test_schema_and_loader_accept_the_same():
    tree = yaml.safe_load(dump_recipe(recipe()))
    tree["optim"] = {"lr": "6e-4", "warmup_tokens": None}
    tree["data"] = {"source": "one.txt"}
    tree["train"]["micro_batch_size"] = 4
    tree["parallel"] = {"dp": 2}
    assert accepts(json_schema(STAGES["pretrain"]), tree)
    assert build_recipe(tree, where="r").data.source == ["one.txt"]


def test_optional_keys_default_to_nothing():
    """Dumping leaves out None, so None must be what leaving a key out means."""
    blocks = [STAGES[stage] for stage in STAGES]
    for block in blocks:
        for field in dataclasses.fields(block):
            hint = field_types(block)[field.name]
            blocks += [a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a) and a not in blocks]
            if type(None) in typing.get_args(hint):
                assert field.default is None, field.name
    assert len(blocks) > 15
