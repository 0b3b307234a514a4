"""`gptcli.load(path)`: a model in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.load import build
from gptcli.config.schema import ModelConfig, SamplingParams
from gptcli.config.validate import check_sampling
from gptcli.dist.runtime import pick_device, pick_precision
from gptcli.errors import UserError
from gptcli.eval.perplexity import join_documents, stream_logprobs
from gptcli.generate import Completion, Engine, complete
from gptcli.generate.completions import Scorer
from gptcli.model import Output
from gptcli.modeldir import ModelDir, load_model, open_model_dir
from gptcli.tokenizer import StreamDecoder, Tokenizer
from gptcli.train.checkpoint import find_checkpoint


@dataclass(frozen=True)
class TokenScore:
    text: str
    id: int
    logprob: float


class LoadedModel:
    """A model with its tokenizer: `generate`, `score` and `forward`.

    >>> model = gptcli.load("runs/quickstart")
    >>> print(model.generate("def main", max_new_tokens=40, top_p=0.9))
    """

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path, self.engine, self.model, self.dtype = path, engine, engine.model, engine.dtype

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        draft: str | Path | None = None,
        draft_tokens: int = 4,
        device: str = "auto",
        precision: str = "auto",
    ) -> LoadedModel:
        """Raises UserError for anything that is not a complete checkpoint, and for a `draft` of another vocabulary."""
        place = pick_device(device)
        dtype = pick_precision(precision, place)
        folder = open_model_dir(find_checkpoint(path))
        small = None if draft is None else load_model(_open_draft(draft, folder), device=place, dtype=dtype)
        model = load_model(folder, device=place, dtype=dtype)
        engine = Engine(model, folder.tokenizer, draft=small, draft_tokens=draft_tokens, dtype=dtype)
        return cls(folder.path, engine)

    def packed(self, *, int8: bool = False, compile: bool = False) -> LoadedModel:
        """The same model in the form that generates fastest (generate/pack.py); int8 weights or a compiled step
        (generate/graph.py) on request."""
        self.engine.pack(int8=int8, compile=compile)
        return self

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.require_tokenizer()

    def generate(self, prompt: str = "", **sampling: Any) -> str:
        """The text that follows `prompt`. Keywords are those of SamplingParams: max_new_tokens, top_p, seed, ..."""
        return self.complete([prompt], **sampling)[0].text

    def complete(self, prompts: list[str], *, scorer: Scorer | None = None, **sampling: Any) -> list[Completion]:
        """Several prompts as one batch, with tokens, log-probabilities and finish reasons; num_return of each.

        With best_of=n, `scorer(prompts, texts)` may give the numbers by which the best of n are chosen.
        """
        params = build(SamplingParams, sampling, where="complete")
        check_sampling(params, "complete")
        return complete(self.engine, prompts, params, scorer=scorer)

    def score(self, text: str, *, stride: int | None = None) -> list[TokenScore]:
        """Each token's log-probability (nats) given all before it, the first given bos or end-of-text. A text beyond
        the context is read in windows that move on by `stride`, by default half the context, as `gpt eval` does."""
        ids = join_documents([text], self.tokenizer).ids
        (logprobs,) = stream_logprobs(self.model, [ids], stride=stride, dtype=self.dtype)
        stream = StreamDecoder(self.tokenizer, context=ids[:1])
        texts = [stream.push(i) for i in ids[1:]]
        if texts:
            texts[-1] += stream.flush()
        return [TokenScore(t, i, p) for t, i, p in zip(texts, ids[1:], logprobs.tolist(), strict=True)]

    def forward(self, tokens: Tensor, **inputs: Any) -> Output:
        """The model's forward; see `gptcli.model.GPT.forward`."""
        with torch.inference_mode():
            return self.model(tokens, **inputs)


def _open_draft(path: str | Path, target: ModelDir) -> ModelDir:
    """Raises UserError unless the draft's ids mean what the target's do."""
    draft = open_model_dir(find_checkpoint(path))
    if not draft.require_tokenizer().same_ids(target.require_tokenizer()):
        raise UserError(f"{draft.path}: its tokenizer is not that of {target.path}; a draft must share it")
    return draft
