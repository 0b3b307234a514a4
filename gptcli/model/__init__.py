"""The transformer: one module for GPT-1, GPT-2 and GPT-3, its cache, and its chunked log-probabilities."""

from gptcli.model.gpt import GPT, Output
from gptcli.model.kv_cache import KVCache

__all__ = ["GPT", "KVCache", "Output"]
