"""What the model thinks of a text's own tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptcli.errors import UserError
from gptcli.generate.engine import Engine
from gptcli.generate.sampling import largest
from gptcli.generate.scheduler import Token


@torch.inference_mode()
def score_prompt(engine: Engine, ids: Sequence[int], top_logprobs: int = 0) -> list[Token]:
    """Each token with its log-probability given those before it; the first has none. Raises UserError for more ids
    than the context holds; the last is not read."""
    limit = engine.model.config.context_length
    if len(ids) - 1 > limit:
        raise UserError(f"the text's {len(ids)} tokens exceed the context of {limit}")
    if len(ids) < 2:
        return [Token("", i, None, None) for i in ids]
    row = torch.tensor([ids], device=engine.device)
    logprobs = engine.model(row[:, :-1]).logits[0].float().log_softmax(-1)
    chosen = logprobs.gather(1, row[0, 1:, None])[:, 0].tolist()
    tops = largest(logprobs, top_logprobs)
    rest = [Token("", i, p, None, top) for i, p, top in zip(ids[1:], chosen, tops, strict=True)]
    return [Token("", ids[0], None, None), *rest]
