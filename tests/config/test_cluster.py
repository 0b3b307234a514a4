"""Jobs on many GPUs: layouts, what fits, time and cost."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.cluster import (
    NODE,
    Fit,
    Job,
    as_text,
    fit,
    layouts,
    nearest_fit,
    objections,
    parse_layout,
    replicas,
    shares_batch,
    smallest_cluster,
    world_size,
)
from gptcli.config.flops import flops_per_token_with_attention
from gptcli.config.gpus import GPUS, find_gpu, peak_flops_of
from gptcli.config.load import load_recipe
from gptcli.config.plan import make_plan
from gptcli.config.schema import ParallelSizes
from gptcli.errors import UserError


def job(name: str, gpu: str = "h100", **train: object) -> Job:
    recipe = load_recipe(name)
    assert recipe.model is not None
    return Job(
        recipe.model, dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **train)), find_gpu(gpu)
    )


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gpus", "sizes"),
    [
        ("none", 1, (1, 1, 1)),
        ("ddp", 8, (8, 1, 1)),
        ("fsdp", 8, (1, 8, 1)),
        ("tp", 4, (1, 1, 4)),
        ("dp=2,fsdp=4,tp=2", 16, (2, 4, 2)),
        ("tp=2, fsdp=3", 6, (1, 3, 2)),
    ],
)
def test_layouts_are_named_or_sized(text, gpus, sizes):
    layout = parse_layout(text, gpus)
    assert (layout.dp, layout.fsdp, layout.tp) == sizes
    assert parse_layout(as_text(layout), gpus) == layout


@pytest.mark.parametrize("text", ["zero", "dp", "dp=", "dp=two", "dp=0", "pp=2", "dp=2;tp=2", ""])
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(UserError, match="expected none, ddp, fsdp, tp, or sizes as in"):
        parse_layout(text, 2)


@pytest.mark.parametrize("text", ["none", "dp=2,fsdp=3"])
def test_sizes_must_make_the_gpus(text):
    with pytest.raises(UserError, match="not to --gpus 8"):
        parse_layout(text, 8)


@given(st.integers(1, 200))
def test_every_layout_uses_all_gpus_and_whole_heads(gpus):
    model = load_recipe("gpt2-small").model
    found = list(layouts(model, gpus))
    assert len({as_text(layout) for layout in found}) == len(found)
    assert all(world_size(layout) == gpus for layout in found)
    assert all(layout.tp <= NODE and model.n_head % layout.tp == 0 for layout in found)
    assert ParallelSizes(dp=gpus) in found


def test_tp_must_divide_the_heads():
    with pytest.raises(UserError, match="tp=2: does not divide 25 heads"):
        fit(job("gpt2-xl"), ParallelSizes(tp=2))


# ---- what fits -----------------------------------------------------------------------------------


def test_the_micro_batch_is_the_largest_that_fits():
    this = fit(job("gpt2-small"), ParallelSizes(dp=8))
    assert this.fits
    assert this.micro_batch_size * this.grad_accum_steps * 8 == 512
    larger = job("gpt2-small", micro_batch_size=2 * this.micro_batch_size)
    assert this.micro_batch_size == 64 or not fit(larger, ParallelSizes(dp=8)).fits


def test_a_recipes_own_micro_batch_is_kept():
    assert fit(job("gpt2-small", micro_batch_size=4), ParallelSizes(dp=8)).micro_batch_size == 4
    too_much = fit(job("gpt2-small", micro_batch_size=512), ParallelSizes())
    assert (too_much.micro_batch_size, too_much.fits) == (512, False)


def test_the_nearest_layout_changes_least():
    """6.7B parameters are 100 GiB of state: two shards of an 80 GB GPU hold half each."""
    near = nearest_fit(job("gpt3-6.7b"), ParallelSizes(dp=8))
    assert near.layout == ParallelSizes(dp=4, fsdp=2)
    assert near.fits


@given(st.sampled_from(["gpt2-xl", "gpt3-6.7b", "gpt3-13b", "gpt3-175b"]), st.integers(1, 64))
def test_the_nearest_layout_fits_and_is_no_larger_than_needed(name, gpus):
    this = job(name)
    near = nearest_fit(this, ParallelSizes(dp=gpus))
    assert near.fits
    possible = [layout for layout in layouts(this.model, gpus) if fit(this, layout).fits]
    assert (world_size(near.layout) == gpus) == bool(possible)
    if any(shares_batch(this, layout) for layout in possible):
        assert shares_batch(this, near.layout)


@pytest.mark.parametrize("name", ["gpt3-6.7b", "gpt3-13b", "gpt3-175b"])
def test_the_smallest_cluster_is_the_smallest(name):
    this = job(name)
    found = smallest_cluster(this, more_than=0)
    n = world_size(found.layout)
    assert found.fits
    assert n <= NODE or n % NODE == 0
    smaller = range(1, n) if n <= NODE else range(NODE, n, NODE)
    for fewer in smaller:
        fitting = [layout for layout in layouts(this.model, fewer) if layout.dp == 1 and fit(this, layout).fits]
        assert not any(shares_batch(this, layout) for layout in fitting)


def test_a_row_that_is_too_long_for_any_cluster():
    this = job("gpt3-13b")
    endless = dataclasses.replace(this, model=dataclasses.replace(this.model, context_length=10**7))
    assert nearest_fit(endless, ParallelSizes(fsdp=8)) is None


@given(st.integers(1, 64), st.integers(1, 64), st.none() | st.integers(1, 64))
def test_objections_are_what_a_run_would_refuse(rows, dp, ramp_start):
    recipe = load_recipe("gpt3-small")
    ramp = None if ramp_start is None else dataclasses.replace(recipe.train.batch_ramp, start=ramp_start)
    this = job("gpt3-small", global_batch_size=rows, batch_ramp=ramp)
    found = objections(this, ParallelSizes(dp=dp))
    try:
        make_plan(this.recipe, context_length=2048, dp_size=dp, micro_batch_size=1)
    except UserError:
        assert found
    else:
        assert not found


def test_tensor_parallel_ranks_share_their_rows():
    assert replicas(ParallelSizes(dp=2, fsdp=3, tp=4)) == 6
    alone, split = (fit(job("gpt2-small"), ParallelSizes(tp=tp)) for tp in (1, 4))
    assert split.micro_batch_size * split.grad_accum_steps == 512 == alone.micro_batch_size * alone.grad_accum_steps


def test_processes_on_a_cpu_share_its_memory():
    rooms = [fit(job("gpt2-small", "cpu"), ParallelSizes(dp=n)).room for n in (1, 4)]
    assert rooms[0] // 4 == rooms[1]
    assert fit(job("gpt2-small", "cpu"), ParallelSizes()).micro_batch_size <= 8


def test_memory_is_the_sum_of_its_parts():
    this = Fit(ParallelSizes(), 1, 1, {"weights": 3, "activations": 4}, room=6)
    assert (this.total, this.fits) == (7, False)
    assert dataclasses.replace(this, room=7).fits


# ---- time ----------------------------------------------------------------------------------------


def test_days_are_arithmetic_over_speed():
    this = job("gpt3-175b", "a100")
    seconds = flops_per_token_with_attention(this.model, 2048) * 300e9 / (1024 * 312e12 * 0.45)
    assert this.days(1024, 0.45) == pytest.approx(seconds / 86400)
    # Narayanan et al. 2021, section 5.1: 34 days for 300B tokens on 1,024 A100 at 140 TFLOP/s, activations made twice
    assert this.days(1024, 140 / 312) * 4 / 3 == pytest.approx(34, rel=0.1)
    assert this.days(2048, 0.45) == this.days(1024, 0.45) / 2
    assert job("gpt3-175b", "cpu").days(8, 0.4) is None


def test_gpus_by_the_names_their_drivers_give():
    named = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA A10G": "a10",
        "NVIDIA GeForce RTX 4090": "rtx4090",
    }
    assert {name: peak_flops_of(name) for name in named} == {name: GPUS[gpu].flops for name, gpu in named.items()}
    assert peak_flops_of("Tesla K80") is None


def test_an_unknown_gpu_is_named_with_its_nearest():
    with pytest.raises(UserError, match=r"--gpu h10: expected one of .*; did you mean 'h100'\?"):
        find_gpu("h10")
