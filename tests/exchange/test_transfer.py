"""Import and export: the same logits, the same text, the same bits, and nothing half-written."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptcli
from gptcli.config.schema import ModelConfig
from gptcli.errors import GptError, UserError
from gptcli.exchange import check
from gptcli.exchange.transfer import export_hugging_face, import_model
from gptcli.model import GPT
from gptcli.modeldir import open_model_dir, save_model
from tests.exchange import hugging_face

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", hugging_face.MODELS)
def test_hugging_face_in_and_out(name: str, tmp_path: Path) -> None:
    theirs = hugging_face.save(name, tmp_path / "hf")
    done = import_model(str(tmp_path / "hf"), tmp_path / "ours")
    assert done.proof is not None
    assert done.proof.against.startswith("transformers")
    assert done.proof.largest_difference < 1e-4
    model = gptcli.load(tmp_path / "ours")
    assert done.params == sum(p.numel() for p in theirs.parameters())

    export_hugging_face(tmp_path / "ours", tmp_path / "out", dtype=None)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = "line 7: the"
    for source in (theirs, back):
        ids = words(prompt, return_tensors="pt").input_ids
        made = source.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=319)
        expected = words.decode(made[0, ids.shape[1] :])
        assert model.generate(prompt, max_new_tokens=40, temperature=0.0, ignore_eos=True) == expected

    import_model(str(tmp_path / "out"), tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    configs = [open_model_dir(tmp_path / folder).config for folder in ("ours", "again")]
    assert len({repr(replace(c, n_inner=c.inner)) for c in configs}) == 1


@pytest.mark.parametrize("pickled", [False, True])
def test_shards_and_pickled_tensors_are_read(tmp_path: Path, pickled: bool) -> None:
    hugging_face.save("llama", tmp_path / "whole")
    folder = tmp_path / "shards"
    hugging_face.save("llama", folder, max_shard_size="40KB")
    if pickled:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for file in folder.glob("model-*.safetensors"):
            torch.save(load_file(file), folder / file.with_suffix(".bin").name)
            file.unlink()
        index["weight_map"] = {k: v.replace(".safetensors", ".bin") for k, v in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    # this transformers does not read pickled shards, so that one is compared with the tensors as read
    import_model(str(folder), tmp_path / "a", check_logits=not pickled)
    import_model(str(tmp_path / "whole"), tmp_path / "b")
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert len(list(folder.glob("*0000*"))) > 1
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_half_precision_stays_half(tmp_path: Path) -> None:
    model = hugging_face.build("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    import_model(str(tmp_path / "hf"), tmp_path / "ours")
    assert {t.dtype for t in load_file(tmp_path / "ours" / "model.safetensors").values()} == {torch.bfloat16}
    export_hugging_face(tmp_path / "ours", tmp_path / "out", dtype="fp16")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


def test_chat_template_and_roles_come_along(tmp_path: Path) -> None:
    hugging_face.save("llama", tmp_path / "hf")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "hf" / "chat_template.jinja").write_text(template)
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    import_model(str(tmp_path / "hf"), tmp_path / "ours")
    tokenizer = gptcli.load(tmp_path / "ours").tokenizer
    assert tokenizer.chat_template == template
    assert tokenizer.eos_id == 319  # from config.json alone
    export_hugging_face(tmp_path / "ours", tmp_path / "out", dtype=None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "user: hi\n"
    assert theirs.eos_token_id == 319
    assert theirs.model_max_length == 64


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    hugging_face.build("gpt2").save_pretrained(tmp_path / "hf")
    done = import_model(str(tmp_path / "hf"), tmp_path / "ours")
    assert "no tokenizer" in done.notes[0]
    with pytest.raises(UserError, match="no tokenizer"):
        gptcli.load(tmp_path / "ours").generate("x")


# ---- our own shapes out ---------------------------------------------------------------------------------------

OURS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_length": 64, "init_std": 0.2}
SHAPES = {
    "gpt1": ({"norm_position": "post"}, "openai-gpt"),
    "gpt2": ({}, "gpt2"),
    "gpt2 without biases": ({"bias": False}, "gpt2"),
    "llama": (
        {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2,
         "tie_embeddings": False},
        "llama",
    ),
    "neo": (
        {"attention_pattern": "alternating", "band_width": 5, "qkv_bias": False, "scale_attention": False},
        "gpt_neo",
    ),
}  # fmt: skip


def make_dir(folder: Path, **shape: object) -> Path:
    tokenizer = hugging_face.tokenizer()
    config = ModelConfig(**{**OURS, "vocab_size": tokenizer.vocab_size, **shape})  # type: ignore[arg-type]
    model = GPT(config)
    model.init_weights(0)
    folder.mkdir(parents=True)
    save_model(folder, config, dict(model.named_parameters()), tokenizer)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_our_shapes_export(name: str, tmp_path: Path) -> None:
    shape, family = SHAPES[name]
    done = export_hugging_face(make_dir(tmp_path / "ours", **shape), tmp_path / "out", dtype=None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    assert done.proof is not None
    assert done.proof.largest_difference < 1e-4
    # vocabulary padding is ours alone
    assert 320 in {s for t in load_file(tmp_path / "out" / "model.safetensors").values() for s in t.shape}


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"attention_pattern": "alternating", "band_width": 8}, ["gpt2", "pattern: alternating (there: dense)"]),
        ({"attention_pattern": "banded", "band_width": 8, "qkv_bias": False}, ["gpt_neo", "scale_attention: true"]),
        ({"position": "alibi"}, ["position: alibi (there: learned)"]),
        ({"position": "rope", "norm": "rmsnorm", "bias": False, "activation": "relu2"}, ["llama", "relu2"]),
        ({"scalar_heads": {"value": 1}}, ["scalar_heads"]),
    ],
)  # fmt: skip
def test_a_shape_without_counterpart_is_refused(shape: dict[str, object], words: list[str], tmp_path: Path) -> None:
    folder = make_dir(tmp_path / "ours", **shape)
    with pytest.raises(UserError) as caught:
        export_hugging_face(folder, tmp_path / "out", dtype=None)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_card_tells_the_lineage(tiny, tmp_path: Path) -> None:
    tiny.train("model.n_head=4")
    checkpoint = (tiny.run_dir / "latest").resolve()
    export_hugging_face(checkpoint, tmp_path / "out", dtype=None)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("library_name: transformers", "30 steps", "Validation loss", "text.txt", "adamw", "| n_head | 4 |"):
        assert part in card


# ---- what goes wrong ------------------------------------------------------------------------------------------


def test_differing_logits_fail_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face.save("gpt2", tmp_path / "hf")
    wrong = check.transformers_logits

    def shifted(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, str]:
        logits, name = wrong(folder, ids)
        return logits + 0.01, name

    monkeypatch.setattr(check, "transformers_logits", shifted)
    with pytest.raises(GptError, match=r"logits differ by up to 0\.01") as caught:
        import_model(str(tmp_path / "hf"), tmp_path / "ours")
    assert caught.value.exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def edit_config(folder: Path, **changes: object) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def halve(tensors: dict[str, torch.Tensor]) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name] = tensors[name][:, :50].contiguous()


DAMAGES = {
    "wrong shape": (
        lambda d: edit_tensors(d, halve),
        r"h\.1\.mlp\.c_fc\.weight is \(32, 50\), its config says \(32, 128\)",
    ),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop("transformer.ln_f.bias")), r"no tensor 'ln_f\.bias'"),
    "extra tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"score.weight": torch.zeros(2)})),
        r"unexpected tensor 'score\.weight'",
    ),
    "untied after all": (
        lambda d: edit_tensors(d, lambda t: t.update({"lm_head.weight": torch.zeros(320, 32)})),
        r"lm_head\.weight differs from the embedding",
    ),
    "config says more layers": (lambda d: edit_config(d, n_layer=3), r"no tensor 'h\.2\."),
    "config says another width": (lambda d: edit_config(d, n_embd=64), r"its config says \(320, 64\)"),
    "unknown architecture": (lambda d: edit_config(d, model_type="bloom"), r"'bloom' cannot be imported; known"),
    "unknown activation": (lambda d: edit_config(d, activation_function="mish"), r"activation_function: 'mish' is not"),
    "unsupported option": (
        lambda d: edit_config(d, scale_attn_by_inverse_layer_idx=True),
        r"scale_attn_by_inverse_layer_idx: True is not supported",
    ),
    "text for a number": (lambda d: edit_config(d, n_head="many"), r"n_head: expected a whole number"),
    "cut short": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]),
        r"model\.safetensors: damaged or cut short",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"holds no model\.safetensors"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_directories_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    do, words = DAMAGES[damage]
    hugging_face.save("gpt2", tmp_path / "hf")
    do(tmp_path / "hf")
    with pytest.raises(UserError, match=words) as caught:
        import_model(str(tmp_path / "hf"), tmp_path / "ours")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    hugging_face.save("llama", tmp_path / "hf", max_shard_size="40KB")
    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: missing"):
        import_model(str(tmp_path / "hf"), tmp_path / "ours")


class Evil:
    """Would create a file if anything unpickled it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("form", ["torch", "plain pickle", "nanogpt"])
def test_a_malicious_pickle_is_not_run(form: str, tmp_path: Path) -> None:
    hugging_face.save("gpt2", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    file, trace = tmp_path / "hf" / "pytorch_model.bin", tmp_path / "executed"
    if form == "plain pickle":
        file.write_bytes(pickle.dumps({"wte.weight": Evil(trace)}))
    else:
        torch.save({"wte.weight": Evil(trace)}, file)
    source = file.rename(tmp_path / "ckpt.pt") if form == "nanogpt" else tmp_path / "hf"
    with pytest.raises(UserError, match=r"refused: .*nothing of it was run") as caught:
        import_model(str(source), tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    hugging_face.save("gpt2", tmp_path / "hf")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists; choose another -o"):
        import_model(str(tmp_path / "hf"), tmp_path / "ours")
    assert (tmp_path / "ours" / "mine.txt").read_text() == "mine"


def test_a_hub_id_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="nobody/nothing: no such file or directory, and the local cache"):
        import_model("nobody/nothing", tmp_path / "ours")
    with pytest.raises(UserError, match="nothing-here: no such file or directory"):
        import_model("nothing-here", tmp_path / "ours")


def test_a_gptcli_checkpoint_needs_no_import(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a gptcli checkpoint already"):
        import_model(str(make_dir(tmp_path / "ours")), tmp_path / "again")


def test_an_imported_model_can_be_trained_further(tiny, tmp_path: Path) -> None:
    hugging_face.save("gpt2", tmp_path / "hf")
    import_model(str(tmp_path / "hf"), tmp_path / "base")
    summary = tiny.train("model=null", f"init_from={tmp_path / 'base'}", "tokenizer=null", "train.max_steps=20")
    assert summary["val_loss"] < tiny.metrics()[0]["loss"]
    export_hugging_face((tiny.run_dir / "latest").resolve(), tmp_path / "out", dtype=None)
    assert f"| Started from | {tmp_path / 'base'} |" in (tmp_path / "out" / "README.md").read_text()
