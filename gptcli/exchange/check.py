"""The proof at the end of every import and export: the same logits from both sides on a probe."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.schema import ModelConfig
from gptcli.errors import GptError
from gptcli.model import GPT
from gptcli.randomness import uniform
from gptcli.tokenizer import Tokenizer

PROBE = (
    "The old lighthouse keeper counted 17 ships before noon; by evening, the harbour was empty.\n"
    'def area(r): return 3.14159 * r ** 2  # "quoted", naïve café, 你好\n'
)
PROBE_TOKENS = 64
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Proof:
    """The largest difference of logits over the probe, and what they were compared with."""

    largest_difference: float
    largest_logit: float
    tokens: int
    against: str

    @property
    def limit(self) -> float:
        """fp32 sums in another order differ in proportion to their size."""
        return TOLERANCE * max(1.0, self.largest_logit)

    def require(self) -> Proof:
        """Raises GptError over the limit (and for NaN)."""
        if not self.largest_difference <= self.limit:
            raise GptError(
                f"the logits differ by up to {self.largest_difference:.3g} from {self.against}'s "
                f"(allowed: {self.limit:.3g}); nothing was written"
            )
        return self


def probe_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> Tensor:
    """(1, T) ids: the probe text as far as the context holds it, or fixed arbitrary ids without a tokenizer."""
    assert config.vocab_size is not None
    length = min(PROBE_TOKENS, config.context_length)
    ids: list[int] = []
    if tokenizer is not None:
        known = set(PROBE) if tokenizer.alphabet is None else tokenizer.alphabet
        ids = tokenizer.encode("".join(c for c in PROBE if c in known))[:length]
    if len(ids) < 2:
        ids = [int(uniform(0, "probe", 0, i) * config.vocab_size) for i in range(length)]
    return torch.tensor([ids])


@torch.inference_mode()
def logits_of(model: GPT, ids: Tensor) -> Tensor:
    logits = model(ids).logits
    assert logits is not None
    return logits.float()


def compare(ours: Tensor, theirs: Tensor, against: str) -> Proof:
    return Proof((ours - theirs).abs().max().item(), theirs.abs().max().item(), ours.shape[1], against)


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


@torch.inference_mode()
def transformers_logits(folder: Path, ids: Tensor) -> tuple[Tensor, str]:
    """What transformers computes from a directory, in fp32, and its name. Raises GptError for tensors that it
    finds missing or unexpected."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    finally:
        transformers.logging.set_verbosity(level)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise GptError(f"{folder}: transformers finds {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}")
    return model.eval()(ids).logits.float(), f"transformers {transformers.__version__}"
