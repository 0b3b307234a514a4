"""Small random Hugging Face models in directories, as users bring them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptcli.tokenizer import Tokenizer
from gptcli.tokenizer.build import train_bpe

TEXT = [f"line {i}: the square of {i} is {i * i}; naïve café\n" for i in range(200)]
SIZES = {"vocab_size": 320, "initializer_range": 0.2}

# name -> (transformers' config class, its model class, arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}),
    "gpt2-untied-relu": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "n_inner": 48, "tie_word_embeddings": False,
            "activation_function": "relu", "scale_attn_weights": False,
        },
    ),
    "openai-gpt": (
        "OpenAIGPTConfig",
        "OpenAIGPTLMHeadModel",
        {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64},
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "num_layers": 4, "num_heads": 2, "hidden_size": 32, "max_position_embeddings": 64, "window_size": 7,
            "attention_types": [[["global", "local"], 2]],
        },
    ),
    "gpt_neo-global": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "num_layers": 2, "num_heads": 2, "hidden_size": 32, "max_position_embeddings": 64, "window_size": 7,
            "attention_types": [[["global"], 2]], "intermediate_size": 40,
        },
    ),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
            "intermediate_size": 56, "max_position_embeddings": 64,
        },
    ),
    "llama-tied-stretched": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32,
            "intermediate_size": 56, "max_position_embeddings": 64, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
    ),
}  # fmt: skip


def tokenizer() -> Tokenizer:
    return train_bpe(TEXT, SIZES["vocab_size"])


def build(name: str) -> Any:
    """A random model, biases and norms included."""
    import transformers

    config_class, model_class, arguments = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SIZES, bos_token_id=319, eos_token_id=319, **arguments)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def save(name: str, folder: Path, **options: Any) -> Any:
    """Write the model and a tokenizer as save_pretrained does."""
    model = build(name)
    model.save_pretrained(folder, **options)
    tokenizer().save(folder)
    return model
