"""What the fields of a recipe say about each other."""

from __future__ import annotations

from gptcli.config.schema import DataBlock, ModelConfig, OptimBlock, Recipe, TrainBlock
from gptcli.errors import UserError


def validate(recipe: Recipe, where: str) -> None:
    """Raises UserError, one line, for the first contradiction found."""
    if (recipe.model is None) == (recipe.init_from is None):
        raise UserError(f"{where}: model, init_from: give exactly one of them")
    if recipe.tokenizer is None and recipe.model is not None and recipe.data.path is None and not recipe.data.mixture:
        raise UserError(f"{where}: tokenizer: missing (gpt1 | gpt2 | bytes | char | bpe:SIZE | a path)")
    for problem in (
        _model_problem(recipe.model),
        _data_problem(recipe.data),
        _train_problem(recipe.train, recipe.model),
        _optim_problem(recipe.optim),
    ):
        if problem:
            raise UserError(f"{where}: {problem}")


def check_model(config: ModelConfig, where: str) -> None:
    """The same for a model's config alone (a checkpoint's config.json)."""
    if problem := _model_problem(config):
        raise UserError(f"{where}: {problem.removeprefix('model.')}")


def _model_problem(m: ModelConfig | None) -> str | None:
    if m is None:
        return None
    if m.n_embd % m.n_head:
        return f"model.n_head: {m.n_head} heads do not divide n_embd {m.n_embd}"
    if m.attention_pattern != "dense" and m.band_width is None:
        return f"model.band_width: required with attention_pattern: {m.attention_pattern} (GPT-3's is unpublished)"
    if m.attention_pattern == "dense" and m.band_width is not None:
        return "model.band_width: has no meaning with attention_pattern: dense"
    if m.position == "rope" and m.head_dim % 2:
        return f"model.position: rope needs an even head width, not {m.head_dim}"
    if m.norm == "rmsnorm" and m.norm_position == "post":
        return "model.norm: post-norm blocks are GPT-1's and use layernorm"
    if any(width < 1 for width in m.scalar_heads.values()):
        return "model.scalar_heads: each width must be at least 1"
    return None


def _data_problem(d: DataBlock) -> str | None:
    given = [k for k in ("path", "source", "train", "mixture") if getattr(d, k)]
    if len(given) > 1:
        return f"data.{given[0]}, data.{given[1]}: give one of path, source, train + val, mixture"
    if d.val and not d.train:
        return "data.val: needs data.train beside it"
    return None


def _train_problem(t: TrainBlock, model: ModelConfig | None) -> str | None:
    if (t.max_steps is None) == (t.max_tokens is None):
        return "train.max_steps, train.max_tokens: give exactly one of them"
    if model is not None and t.seq_len is not None and t.seq_len > model.context_length:
        return f"train.seq_len: {t.seq_len} is more than model.context_length {model.context_length}"
    if t.batch_ramp is not None and t.batch_ramp.start > t.global_batch_size:
        return f"train.batch_ramp.start: {t.batch_ramp.start} is more than global_batch_size {t.global_batch_size}"
    if isinstance(t.micro_batch_size, int) and t.micro_batch_size > t.global_batch_size:
        return f"train.micro_batch_size: {t.micro_batch_size} is more than global_batch_size {t.global_batch_size}"
    return None


def _optim_problem(o: OptimBlock) -> str | None:
    if o.warmup_steps and o.warmup_tokens:
        return "optim.warmup_steps, optim.warmup_tokens: give one of them"
    if o.decay_steps and o.decay_tokens:
        return "optim.decay_steps, optim.decay_tokens: give one of them"
    if not all(0 <= b < 1 for b in o.betas):
        return f"optim.betas: {list(o.betas)} must lie in [0, 1)"
    if o.schedule == "wsd" and o.decay_steps is None and o.decay_tokens is None:
        return "optim.decay_steps: required with schedule: wsd; it is the length of the final decay"
    return None
