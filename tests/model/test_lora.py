"""LoRA: merged equals beside, peft reads ours and we read peft's, and the optimizer's memory falls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptcli.config.schema import LoraBlock, ModelConfig, OptimBlock
from gptcli.errors import UserError
from gptcli.exchange.transfer import export_hugging_face, import_model
from gptcli.model import GPT
from gptcli.model.extend import extend_vocab
from gptcli.model.lora import adapter_weights, add_lora, load_adapter
from gptcli.modeldir import load_model, model_of, open_model_dir, read_adapter, save_adapter, save_model
from gptcli.train.optim import make_optimizer

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 24, "vocab_size": 50, "vocab_pad_multiple": 8}
LLAMA = {"norm": "rmsnorm", "position": "rope", "bias": False, "activation": "swiglu", "n_kv_head": 2}
SHAPES = {
    "gpt2": ModelConfig(**SIZES),
    "gpt1": ModelConfig(**SIZES, norm_position="post"),
    "llama": ModelConfig(**SIZES, **LLAMA, tie_embeddings=False),
    "nobody's": ModelConfig(**SIZES, activation="relu2", qk_norm=True, position="alibi"),
}
LORA = LoraBlock(rank=3, alpha=7.0)
IDS = torch.arange(40).view(2, 20) * 7 % 50


def base_in(folder: Path, config: ModelConfig) -> GPT:
    model = GPT(config)
    model.init_weights(1)
    folder.mkdir()
    save_model(folder, config, dict(model.named_parameters()), None)
    return load_model(open_model_dir(folder))


def with_adapter(model: GPT, lora: LoraBlock = LORA, new_tokens: range = range(0)) -> GPT:
    """An adapter that does something, as after some training."""
    add_lora(model, lora, 5, new_tokens=new_tokens)
    generator = torch.Generator().manual_seed(2)
    for p in adapter_weights(model).values():
        p.data.normal_(0, 0.3, generator=generator)
    return model


def logits(model: GPT, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def saved(folder: Path, model: GPT, base: Path, lora: LoraBlock = LORA) -> Path:
    folder.mkdir()
    save_adapter(folder, model, lora, None, base=base)
    return folder


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["attn.c_proj"], ["c_attn"]])
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_on_load_equals_base_and_adapter(shape: str, targets: list[str], tmp_path: Path) -> None:
    model = base_in(tmp_path / "base", SHAPES[shape])
    before, lora = logits(model), LoraBlock(rank=3, alpha=7.0, targets=targets)
    add_lora(model, lora, 1)
    assert torch.equal(logits(model), before)  # B is zero
    with_adapter(base := load_model(open_model_dir(tmp_path / "base")), lora)
    beside = logits(base)
    assert (beside - before).abs().max() > 0.01
    loaded = load_model(open_model_dir(saved(tmp_path / "adapter", base, tmp_path / "base", lora)))
    assert (logits(loaded) - beside).abs().max() < 1e-5
    load_adapter(model, read_adapter(tmp_path / "adapter", base.config).weights)
    assert torch.equal(logits(model), beside)  # to the bit, for a resume


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_embeddings_of_new_tokens_are_trained_and_kept(shape: str, tmp_path: Path) -> None:
    base_in(tmp_path / "base", SHAPES[shape])
    folder = open_model_dir(tmp_path / "base")
    from gptcli.modeldir import read_weights

    config, weights = extend_vocab(folder.config, read_weights(folder.path, folder.config), 53)
    model = with_adapter(model_of(config, weights), new_tokens=range(50, 53))
    assert {n for n in adapter_weights(model) if "new_rows" in n} == (
        {"wte.new_rows"} if config.tie_embeddings else {"wte.new_rows", "lm_head.new_rows"}
    )
    ids = torch.tensor([[1, 50, 2, 51, 52]])
    loaded = load_model(open_model_dir(saved(tmp_path / "adapter", model, tmp_path / "base")))
    assert loaded.vocab_size == 53
    assert (logits(loaded, ids) - logits(model, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("shape", ["gpt2", "gpt1", "llama"])
def test_peft_reads_ours(shape: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = with_adapter(base_in(tmp_path / "base", SHAPES[shape]))
    saved(tmp_path / "adapter", model, tmp_path / "base")
    export_hugging_face(tmp_path / "base", tmp_path / "hf", dtype=None, check_logits=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with_theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (with_theirs(IDS).logits - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_peft_reads_our_new_tokens(shape: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base_in(tmp_path / "base", SHAPES[shape])
    folder = open_model_dir(tmp_path / "base")
    from gptcli.modeldir import read_weights

    config, weights = extend_vocab(folder.config, read_weights(folder.path, folder.config), 53)
    model = with_adapter(model_of(config, weights), new_tokens=range(50, 53))
    saved(tmp_path / "adapter", model, tmp_path / "base")
    export_hugging_face(tmp_path / "base", tmp_path / "hf", dtype=None, check_logits=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.resize_token_embeddings(53)
    with_theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids = torch.tensor([[1, 50, 2, 51, 52]])
    with torch.no_grad():
        assert (with_theirs(ids).logits - logits(model, ids)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("shape", "targets"),
    [("gpt2", ["c_attn", "mlp.c_proj"]), ("llama", ["q_proj", "v_proj", "up_proj"]), ("llama", ["k_proj", "o_proj"])],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_pefts(shape: str, targets: list[str], rslora: bool, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base_in(tmp_path / "base", SHAPES[shape])
    export_hugging_face(tmp_path / "base", tmp_path / "hf", dtype=None, check_logits=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, use_rslora=rslora, init_lora_weights=False, task_type="CAUSAL_LM",
        fan_in_fan_out=shape == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    import_model(str(tmp_path / "adapter"), tmp_path / "ours", tokenizer="none", check_logits=False)
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert (logits(load_model(open_model_dir(tmp_path / "ours"))) - expected).abs().max() < 1e-4


def test_the_optimizers_memory_falls() -> None:
    config = ModelConfig(**{**SIZES, "n_embd": 64})

    def state_bytes(lora: LoraBlock | None) -> int:
        model = GPT(config)
        model.init_weights(0)
        if lora is not None:
            add_lora(model, lora, 0)
        optimizer = make_optimizer(model, OptimBlock())
        model(IDS, targets=IDS).logprobs.sum().backward()
        optimizer.step()
        return sum(t.numel() * t.element_size() for name, t in optimizer.state_tensors().items() if "step/" not in name)

    full, low = state_bytes(None), state_bytes(LoraBlock(rank=2))
    params = sum(p.numel() for p in GPT(config).parameters())
    widths = [(64, 192), (64, 64), (64, 256), (256, 64)]  # in, out of a block's four matrices
    assert full == 2 * 4 * params
    assert low == 2 * 4 * 2 * sum(2 * (i + o) for i, o in widths)
    assert low < full / 10


def test_what_is_no_target_or_no_plain_adapter_is_refused(tmp_path: Path) -> None:
    model = base_in(tmp_path / "base", SHAPES["gpt2"])
    with pytest.raises(UserError, match=r"lora.targets: 'c_atn' names no linear layer of this model; did you mean"):
        add_lora(model, LoraBlock(targets=["c_atn"]), 0)
    folder = saved(tmp_path / "adapter", with_adapter(model), tmp_path / "base")
    file = folder / "adapter_config.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps({**tree, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora: True is not supported"):
        load_model(open_model_dir(folder))
    file.write_text(json.dumps({**tree, "base_model_name_or_path": "/nowhere"}))
    with pytest.raises(UserError, match="no checkpoint at /nowhere"):
        load_model(open_model_dir(folder))
