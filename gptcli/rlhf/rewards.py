"""What responses are worth: by a reward model, by a Python function, or by a weighted sum of both."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.schema import RewardBlock
from gptcli.dist.runtime import Runtime, autocast
from gptcli.errors import UserError
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.modeldir import load_model, open_model_dir, read_json
from gptcli.rlhf.sequences import last_index, pad_rows
from gptcli.tokenizer import Tokenizer
from gptcli.train.checkpoint import find_checkpoint

HEAD = "reward"
NORMALIZATION = "reward.json"  # beside a reward model's weights
SCORING_ROWS = 64


@dataclass(frozen=True)
class Sample:
    """A response to a prompt, as ids (with the end-of-text that ended it, if one did) and as text (without)."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    prompt: str
    response: str
    ended: bool


# ---- a reward model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalization:
    """Scores as the head gives them -> mean 0 and standard deviation 1 on the reference policy's samples."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, scores: Tensor) -> Normalization:
        std = scores.double().std(correction=0).item()
        return cls(scores.double().mean().item(), std if std > 1e-8 else 1.0)

    @classmethod
    def load(cls, folder: Path) -> Normalization:
        """The one stored with a reward model; one without was not normalised."""
        file = folder / NORMALIZATION
        if not file.is_file():
            return cls()
        tree = read_json(file, missing="")
        try:
            return cls(float(tree["mean"]), float(tree["std"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: damaged (expected numbers mean and std)") from error

    def save(self, folder: Path) -> None:
        tree = {"mean": self.mean, "std": self.std}
        (folder / NORMALIZATION).write_text(json.dumps(tree, indent=2) + "\n", "utf-8")

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std


def last_scores(model: Callable[..., Any], tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B,): the reward head at each row's last real token, wherever its padding is."""
    mask = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    scalars = model(tokens, attention_mask=attention_mask, last_only=True).scalars[HEAD][..., 0]
    return scalars.float().gather(1, last_index(mask)[:, None])[:, 0]


@torch.no_grad()
def score_rows(model: GPT, rows: Sequence[Sequence[int]], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(len(rows),) scores of whole rows of ids, on the CPU. Padding stands behind, where nothing looks at it; rows of
    like length go together, so that there is little of it."""
    device, out = model.wte.weight.device, torch.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(rows), SCORING_ROWS):
        places = order[first : first + SCORING_ROWS]
        part = [rows[i] for i in places]
        tokens, mask = pad_rows(part).to(device), pad_rows([[1] * len(row) for row in part]).bool().to(device)
        with autocast(device, dtype):
            scalars = model(tokens, last_only=True).scalars[HEAD][..., 0]
        out[places] = scalars.float().gather(1, last_index(mask)[:, None])[:, 0].cpu()
    return out


class RewardModel:
    """A checkpoint with a reward head. Where its tokenizer has other ids, it reads the text anew."""

    def __init__(
        self, path: str, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype, key: str = "reward"
    ) -> None:
        """`key`: the recipe's, for what is wrong. Raises UserError for a checkpoint that is no reward model."""
        folder = open_model_dir(find_checkpoint(path))
        if HEAD not in folder.config.scalar_heads:
            raise UserError(f"{key}.checkpoint: {path}: has no reward head; `gpt rlhf-reward` trains one")
        self.name, self.model = f"{key}.checkpoint: {path}", load_model(folder, device=device).requires_grad_(False)
        self.tokenizer, self._dtype = folder.require_tokenizer(), dtype
        self._same_ids = self.tokenizer.same_ids(tokenizer) and self.tokenizer.eos_id == tokenizer.eos_id
        self._encode_prompt = Engine(self.model, self.tokenizer).encode_prompt  # as in its training
        self._normalize = Normalization.load(folder.path)

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        return self._normalize(score_rows(self.model, [self._row(s) for s in samples], dtype=self._dtype))

    def _row(self, sample: Sample) -> list[int]:
        """Ended by end-of-text as in the model's training, whatever token has ended the response."""
        eos = self.tokenizer.eos_id
        if self._same_ids:
            row = [*sample.prompt_ids, *sample.response_ids]
        else:
            row = [*self._encode_prompt(sample.prompt), *self.tokenizer.encode(sample.response)]
        if sample.ended and eos is not None and row[-1:] != [eos]:
            row.append(eos)
        limit = self.model.config.context_length
        if len(row) > limit:
            raise UserError(
                f"{self.name}: prompt and response are {len(row)} tokens, its context is {limit}; "
                "use a smaller sampling.max_new_tokens or shorter prompts"
            )
        return row


# ---- a function -----------------------------------------------------------------------------------------------


class RewardFunction:
    """FILE.py:NAME, called with two lists, prompts and responses, as text; it returns a number for each pair."""

    def __init__(self, spec: str, key: str = "reward") -> None:
        """Raises UserError where there is no such function."""
        file, colon, name = spec.rpartition(":")
        if not colon or not file.endswith(".py"):
            raise UserError(f"{key}.function: {spec}: write it as FILE.py:NAME")
        self.name = f"{key}.function: {spec}"
        self._function = _load_function(Path(file), name, f"{key}.function")

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        """Raises UserError for whatever the function does wrong."""
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for what the verb was asked for
                scores = self._function([s.prompt for s in samples], [s.response for s in samples])
        except (Exception, SystemExit) as error:
            line = f" (line {error.__traceback__.tb_next.tb_lineno})" if error.__traceback__.tb_next else ""  # type: ignore[union-attr]
            raise UserError(f"{self.name}{line} raised {type(error).__name__}: {error}") from error
        return self._checked(scores, samples)

    def _checked(self, scores: Any, samples: Sequence[Sample]) -> Tensor:
        try:
            if isinstance(scores, dict | set | str | bytes):
                raise TypeError("no sequence")
            numbers = [float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name} returned {str(scores)[:60]!r}, not a list of numbers") from error
        if len(numbers) != len(samples):
            raise UserError(f"{self.name} returned {len(numbers)} scores for {len(samples)} responses")
        bad = next((i for i, number in enumerate(numbers) if not math.isfinite(number)), None)
        if bad is not None:
            text = samples[bad].response
            raise UserError(f"{self.name} returned {numbers[bad]} for the response {text[:60]!r}")
        return torch.tensor(numbers)


def _load_function(file: Path, name: str, key: str) -> Callable[[list[str], list[str]], Any]:
    if not file.is_file():
        raise UserError(f"{key}: {file}: no such file")
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickles look for it
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {file}: cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{key}: {file}: has no function {name!r}")
    return function


# ---- all of it ------------------------------------------------------------------------------------------------


class Rewards:
    """weight * the checkpoint's score + the function's, whichever are given."""

    def __init__(
        self, block: RewardBlock, tokenizer: Tokenizer, runtime: Runtime, dtype: torch.dtype, key: str = "reward"
    ) -> None:
        model, function = block.checkpoint, block.function
        self._model = RewardModel(model, tokenizer, runtime.device, dtype, key) if model else None
        self._function = RewardFunction(function, key) if function else None
        self._weight = block.weight if self._model and self._function else 1.0
        self._runtime = runtime

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        """(len(samples),) on the CPU, of all processes' samples, which each of them has: the model's work is shared
        out, the function runs in the first alone, once a rollout, so that it may keep state. Raises UserError in
        all of them."""
        runtime, total, problem = self._runtime, torch.zeros(len(samples)), None
        try:
            if self._model is not None:
                mine = slice(runtime.dp_rank, None, runtime.dp_size)
                total[mine] = self._weight * self._model(samples[mine])
            if self._function is not None and runtime.is_main:
                total = total + self._function(samples)
        except UserError as error:
            problem = error
        if runtime.host_sum([float(problem is not None)])[0]:
            raise problem or UserError("reward: failed in another process")
        return runtime.all_sum(total.to(runtime.device)).cpu()
