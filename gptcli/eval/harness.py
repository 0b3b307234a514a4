"""EleutherAI's lm-evaluation-harness on our checkpoints (`pip install 'gptcli[harness]'`).

Importing this registers the model "gptcli", so that any program of theirs can name it:
simple_evaluate(model="gptcli", model_args="checkpoint=runs/mine", tasks=["hellaswag"]).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.eval.results import Aggregate, Result
from gptcli.eval.scorer import Prompt, Scorer, encode, start_token
from gptcli.generate import Engine

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError:
    raise UserError("--harness needs lm_eval: pip install 'gptcli[harness]'") from None

MAX_GEN_TOKENS = 256  # theirs
ALIASES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("gptcli")
class GptcliLM(TemplateLM):
    """Their interface over our scorer. Requests may be theirs in any order; the scorer sorts."""

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        scorer: Scorer | None = None,
        device: str | None = None,
        precision: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """A model directory by path, or a scorer at hand. Batches are counted in tokens, so theirs are not heeded."""
        super().__init__()
        if scorer is None:
            if checkpoint is None:
                raise UserError('model "gptcli": give model_args checkpoint=PATH')
            scorer = open_scorer(checkpoint, device or "auto", precision)
        self.scorer, self.tokenizer = scorer, scorer.tokenizer

    @property
    def eot_token_id(self) -> int:
        return start_token(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer.encode(string) if add_special_tokens is False else encode(self.tokenizer, string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found = self.scorer.loglikelihood([request.args for request in requests])
        return [(one.logprob, one.greedy) for one in found]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return [(one.logprob, one.greedy) for one in self.scorer.loglikelihood_tokens(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return [one.logprob for one in self.scorer.loglikelihood_rolling([text for (text,) in map(_args, requests)])]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Requests with the same settings go together."""
        out = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for key, places in kinds.items():
            until, new, params = read_kwargs(json.loads(key))
            prompts = [Prompt(requests[i].args[0], until, new) for i in places]
            for i, text in zip(places, self.scorer.generate_until(prompts, params), strict=True):
                out[i] = text
        return out


def _args(request: Instance) -> tuple[str, ...]:
    return request.args


def read_kwargs(given: dict[str, Any]) -> tuple[tuple[str, ...], int, SamplingParams]:
    """Their generation_kwargs: stops, how many new tokens, and how to draw. Raises UserError for one of no meaning
    here."""
    left = dict(given)
    until = left.pop("until", None) or []
    lengths = [left.pop(name) for name in ALIASES if name in left]
    draws = left.pop("do_sample", float(left.get("temperature", 0.0)) > 0)
    temperature = float(left.pop("temperature", 1.0))
    known = {name: left.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in left}
    if left:
        raise UserError(f"generation_kwargs: {next(iter(left))} has no meaning for gptcli")
    params = SamplingParams(temperature=temperature if draws else 0.0, **known)
    return tuple([until] if isinstance(until, str) else until), lengths[0] if lengths else MAX_GEN_TOKENS, params


def open_scorer(checkpoint: str, device: str, precision: str) -> Scorer:
    from gptcli.dist.runtime import pick_device, pick_precision
    from gptcli.modeldir import load_model, open_model_dir
    from gptcli.train.checkpoint import find_checkpoint

    place = pick_device(device)
    dtype = pick_precision(precision, place)
    folder = open_model_dir(find_checkpoint(checkpoint))
    return Scorer(Engine(load_model(folder, device=place, dtype=dtype), folder.tokenizer, dtype=dtype))


def run_harness(
    scorer: Scorer,
    tasks: Sequence[str],
    *,
    checkpoint: str,
    include: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> list[Result]:
    """Their tasks, from their own definitions or `include`, a folder of task YAMLs; a Result for each."""
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UserError(f"--harness --task {unknown[0]}: lm_eval has no such task")
    try:
        found = simple_evaluate(
            model=GptcliLM(scorer=scorer), tasks=list(tasks), num_fewshot=num_fewshot, limit=limit,
            task_manager=manager, fewshot_random_seed=seed, bootstrap_iters=0,
        )  # fmt: skip
    except (ConnectionError, OSError) as error:  # a data set that cannot be fetched
        raise UserError(f"--harness: {' '.join(str(error).split())}") from error
    assert found is not None
    shared = {"harness": found.get("lm_eval_version"), "seed": seed, "limit": limit, **(settings or {})}
    return [
        _result(name, found, checkpoint, scorer.tokenizer.hash, shared)
        for name in found["results"]
        if name in found["samples"]
    ]


def _result(name: str, found: Any, checkpoint: str, tokenizer: str, settings: dict[str, Any]) -> Result:
    """Their table's row. Metrics are named METRIC, or METRIC,FILTER where there are several filters."""
    figures = {key: value for key, value in found["results"][name].items() if isinstance(value, (int, float))}
    metrics = {_short(key): float(value) for key, value in figures.items() if "," in key and "_stderr," not in key}
    samples = found["samples"][name]
    hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    items = [
        {"id": str(sample["doc_id"])}
        | {m: float(sample[m]) for m in metrics if isinstance(sample.get(m), (int, float))}
        for sample in samples
    ]
    means = {m: Aggregate(m) for m in metrics if all(m in item for item in items)}
    estimates = {m: how(items) for m, how in means.items()}
    agree = {m: e for m, e in estimates.items() if abs(e.value - metrics[m]) < 1e-9}  # the others are no means
    return Result(
        task=name,
        metrics=metrics,
        n=len(items),
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        prompt_hash=hashlib.sha256(hashes.encode()).hexdigest(),
        stderr={m: e.stderr for m, e in agree.items() if e.stderr is not None},
        aggregates={m: means[m] for m in agree},
        settings={**settings, "num_fewshot": found["n-shot"].get(name), "version": found["versions"].get(name)},
        items=items,
    )


def _short(key: str) -> str:
    metric, _, filtered = key.partition(",")
    return metric if filtered == "none" else key
