"""Our forward against transformers' GPT-1 and GPT-2, and against a real trained GPT with published tensors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from gptcli.config.schema import ModelConfig
from gptcli.model import GPT
from tests.conftest import decode_tensor

transformers = pytest.importorskip("transformers")


def load_conv1d(model: GPT, state: dict[str, torch.Tensor], prefix: str, renames: dict[str, str]) -> None:
    """Fill `model` from a Hugging Face state dict, whose Conv1D weights are (in, out)."""
    ours = {}
    for name, p in model.named_parameters():
        theirs = name
        for a, b in renames.items():
            theirs = theirs.replace(a, b)
        value = state[prefix + theirs]
        ours[name] = value.T if p.ndim == 2 and name.startswith("h.") else value
    model.load_state_dict(ours)


def test_gpt2_equals_transformers() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=101, initializer_range=0.3
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = GPT(
        ModelConfig(n_layer=3, n_head=4, n_embd=32, context_length=24, vocab_size=101, vocab_pad_multiple=1)
    ).eval()
    load_conv1d(ours, theirs.state_dict(), "transformer.", {})
    x = torch.randint(0, 101, (3, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-4, rtol=1e-4)
        mask = torch.ones(3, 24, dtype=torch.long)
        mask[0, :5] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = theirs(x, attention_mask=mask, position_ids=positions).logits
        got = ours(x, attention_mask=mask.bool()).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def test_gpt1_equals_transformers() -> None:
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(
        n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=101, initializer_range=0.3
    )
    theirs = transformers.OpenAIGPTLMHeadModel(config).eval()
    ours = GPT(
        ModelConfig(
            n_layer=3,
            n_head=4,
            n_embd=32,
            context_length=24,
            vocab_size=101,
            vocab_pad_multiple=1,
            norm_position="post",
        )
    ).eval()
    load_conv1d(ours, theirs.state_dict(), "transformer.", {"wte": "tokens_embed", "wpe": "positions_embed"})
    x = torch.randint(0, 101, (3, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-4, rtol=1e-4)


# ---- gpt-nano-sort: a real trained model ------------------------------------------------------------------------


def test_real_weights_give_the_published_tensors(nano_sort: GPT, shared_data: Path) -> None:
    partials = json.loads((shared_data / "weights/gpt-nano-sort/gpt-nano-sort-t0-partials.json").read_text())
    tokens = decode_tensor(partials["idx"]).long()
    found: dict[str, torch.Tensor] = {}
    names = {
        "ln1": nano_sort.h[0].ln_1,
        "qkv": nano_sort.h[0].attn.c_attn,
        "yProj": nano_sort.h[0].attn.c_proj,
    }
    names |= {"ln2": nano_sort.h[0].ln_2, "fc": nano_sort.h[0].mlp.c_fc, "mlp": nano_sort.h[0].mlp.c_proj}
    names |= {f"block{i}": nano_sort.h[i] for i in range(3)} | {"ln_f": nano_sort.ln_f}
    for name, module in names.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out))
    with torch.no_grad():
        logits = nano_sort(tokens).logits
    found |= {"lm_head": logits, "probs": logits.softmax(-1)}
    for name, value in found.items():
        torch.testing.assert_close(
            value, decode_tensor(partials[name]), atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_real_weights_sort_all_inputs(nano_sort: GPT) -> None:
    inputs = torch.tensor(list(itertools.product(range(3), repeat=6)))
    ids = inputs
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, nano_sort(ids).logits[:, -1:].argmax(-1)], 1)
    right = (ids[:, 6:] == inputs.sort(1).values).all(1)
    assert int(right.sum()) == 729
