"""What the fields of a recipe say about each other."""

from __future__ import annotations

import dataclasses

from gptcli.config.schema import (
    DataBlock,
    DPORecipe,
    FinetuneBlock,
    FinetuneRecipe,
    GRPORecipe,
    ModelConfig,
    OptimBlock,
    PPORecipe,
    Recipe,
    RewardRecipe,
    SamplingParams,
    SFTRecipe,
    TrainBlock,
)
from gptcli.config.tuning import RolloutBlock
from gptcli.errors import UserError

HAS_EXAMPLES = FinetuneRecipe | SFTRecipe | RewardRecipe | DPORecipe


def validate(recipe: Recipe, where: str) -> None:
    """Raises UserError, one line, for the first contradiction found."""
    if recipe.init_from is None and (recipe.stage == "sft" or recipe.stage.startswith("rlhf-")):
        raise UserError(f"{where}: init_from: missing; {recipe.stage} goes on from a trained model (-s init_from=RUN)")
    name = recipe.run.name
    if name is not None and (not name.strip(".") or "/" in name or name[:1] == "."):
        raise UserError(f"{where}: run.name: {name!r} is no name of a folder in run.dir")
    if (recipe.model is None) == (recipe.init_from is None):
        raise UserError(f"{where}: model, init_from: give exactly one of them")
    if recipe.context_length is not None and recipe.init_from is None:
        raise UserError(f"{where}: context_length: belongs to init_from; a new model's is model.context_length")
    if recipe.lora is not None and recipe.init_from is None:
        raise UserError(f"{where}: lora: updates a trained model; name one with init_from")
    if recipe.lora is not None and recipe.optim.name == "muon":
        raise UserError(f"{where}: optim.name: muon is for whole matrices, not for lora's; use adamw")
    if recipe.tokenizer is None and recipe.model is not None and _has_text(recipe.data):
        raise UserError(f"{where}: tokenizer: missing (gpt1 | gpt2 | bytes | char | bpe:SIZE | a path)")
    if recipe.train.epochs is not None and not isinstance(recipe, HAS_EXAMPLES):
        raise UserError(
            f"{where}: train.epochs: counts passes over examples; text and rollouts have none, give max_steps"
        )
    if recipe.train.batch_ramp is not None and recipe.stage not in ("pretrain", "sft"):
        raise UserError(f"{where}: train.batch_ramp: is for pretrain and sft; {recipe.stage} has batches of one size")
    for problem in (
        _finetune_problem(recipe.finetune) if isinstance(recipe, FinetuneRecipe) else None,
        _model_problem(recipe.model),
        _data_problem(recipe.data),
        _train_problem(recipe.train, recipe.model),
        _optim_problem(recipe.optim, recipe.train),
        _sampling_problem(recipe.sampling),
        _rlhf_problem(recipe),
    ):
        if problem:
            raise UserError(f"{where}: {problem}")


def _rlhf_problem(recipe: Recipe) -> str | None:
    if not recipe.stage.startswith("rlhf-"):
        return None
    if recipe.lora is not None:
        return "lora: adapters are not trained by the verbs of rlhf in this version; leave it out"
    if recipe.context_length is not None:
        return "context_length: the reference would keep its own; stretch it in the stage before"
    if recipe.tokenizer is not None:
        return "tokenizer: has no meaning here; it is the checkpoint's"
    if recipe.data.path or recipe.data.mixture:
        return "data.path, data.mixture: hold tokens; name .jsonl files in data.train or data.source"
    if recipe.train.compile and not isinstance(recipe, PPORecipe | GRPORecipe):
        return "train.compile: pairs differ in width, so that each step would be compiled anew; leave it out"
    if isinstance(recipe, DPORecipe) and (recipe.dpo.loss == "conservative") != (recipe.dpo.label_smoothing > 0):
        return "dpo.label_smoothing: belongs to dpo.loss: conservative, which is the plain loss without; give both"
    if isinstance(recipe, PPORecipe):
        return _rollout_problem("ppo", recipe.ppo, recipe) or _held_out_problem(recipe)
    if isinstance(recipe, GRPORecipe):
        if recipe.grpo.rollout_batch_size % recipe.grpo.group_size:
            return f"grpo.rollout_batch_size: {recipe.grpo.rollout_batch_size} is no multiple of grpo.group_size"
        return _rollout_problem("grpo", recipe.grpo, recipe) or _held_out_problem(recipe)
    return None


# Whatever else changed the draw would make it another policy's than the one whose probabilities are learned from.
ROLLOUT_SAMPLING = ("max_new_tokens", "temperature", "ignore_eos", "seed", "on_overflow")


def _rollout_problem(name: str, block: RolloutBlock, recipe: PPORecipe | GRPORecipe) -> str | None:
    reward, train, sampling = recipe.reward, recipe.train, recipe.sampling
    if not (reward.checkpoint or reward.function):
        return "reward: where do scores come from? set reward.checkpoint or reward.function"
    if block.minibatch_size not in (None, train.global_batch_size):
        return (
            f"{name}.minibatch_size: {block.minibatch_size} is not train.global_batch_size {train.global_batch_size}; "
            "they are the same thing"
        )
    for size in {train.global_batch_size, train.global_batch_size_cpu or train.global_batch_size}:
        if block.rollout_batch_size % size:
            return f"{name}.rollout_batch_size: {block.rollout_batch_size} is no multiple of the {size} rows of a step"
    if sampling.temperature == 0:
        return "sampling.temperature: with 0 all responses to a prompt are alike, and nothing is learned"
    for key in dataclasses.fields(SamplingParams):
        if key.name not in ROLLOUT_SAMPLING and getattr(sampling, key.name) != getattr(SamplingParams(), key.name):
            hint = f"; {name}.stop_token ends responses" if key.name == "stop" else ""
            return f"sampling.{key.name}: rollouts are drawn from the policy as it is{hint}"
    return None


def _held_out_problem(recipe: PPORecipe | GRPORecipe) -> str | None:
    reward = recipe.held_out_reward
    if reward is None:
        never = recipe.data.val and recipe.train.eval_every == 0
        return "data.val: is looked at every train.eval_every steps, and 0 is never; give a number" if never else None
    if not (reward.checkpoint or reward.function):
        return "held_out_reward: where do scores come from? set held_out_reward.checkpoint or held_out_reward.function"
    if not recipe.data.val:
        return "held_out_reward: scores responses to held-out prompts; name .jsonl files of them in data.val"
    if recipe.train.eval_every == 0:
        return "train.eval_every: 0 never looks at held_out_reward; give the steps between validations"
    return None


def check_model(config: ModelConfig, where: str) -> None:
    """The same for a model's config alone (a checkpoint's config.json)."""
    if problem := _model_problem(config):
        raise UserError(f"{where}: {problem.removeprefix('model.')}")


def check_sampling(params: SamplingParams, where: str) -> None:
    """The same for sampling alone (options of a command, keywords of a call)."""
    if problem := _sampling_problem(params):
        raise UserError(f"{where}: {problem.removeprefix('sampling.')}")


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
    if m.n_head % m.kv_heads:
        return f"model.n_kv_head: {m.kv_heads} does not divide n_head {m.n_head}"
    if m.rope_scaling is not None and m.position != "rope":
        return f"model.rope_scaling: has no meaning with position: {m.position}"
    if m.position == "sinusoidal" and m.n_embd % 2:
        return f"model.position: sinusoidal needs an even n_embd, not {m.n_embd}"
    if any(width < 1 for width in m.scalar_heads.values()):
        return "model.scalar_heads: each width must be at least 1"
    return None


def _has_text(d: DataBlock) -> bool:
    """Whether something is still to be tokenized."""
    return d.path is None and (not d.mixture or any(part.source for part in d.mixture))


def _data_problem(d: DataBlock) -> str | None:
    given = [k for k in ("path", "source", "train", "mixture") if getattr(d, k)]
    if len(given) > 1:
        return f"data.{given[0]}, data.{given[1]}: give one of path, source, train + val, mixture"
    for number, part in enumerate(d.mixture):
        if (part.path is None) == (not part.source):
            return f"data.mixture[{number}]: give a path or a source, one of them"
    if d.val and not d.train:
        return "data.val: needs data.train beside it"
    return None


def _train_problem(t: TrainBlock, model: ModelConfig | None) -> str | None:
    if sum(length is not None for length in (t.max_steps, t.max_tokens, t.epochs)) != 1:
        return "train.max_steps, train.max_tokens, train.epochs: give exactly one of them; null leaves one out"
    if model is not None and t.seq_len is not None and t.seq_len > model.context_length:
        return f"train.seq_len: {t.seq_len} is more than model.context_length {model.context_length}"
    if t.batch_ramp is not None and t.batch_ramp.start > t.global_batch_size:
        return f"train.batch_ramp.start: {t.batch_ramp.start} is more than global_batch_size {t.global_batch_size}"
    if isinstance(t.micro_batch_size, int) and t.micro_batch_size > t.global_batch_size:
        return f"train.micro_batch_size: {t.micro_batch_size} is more than global_batch_size {t.global_batch_size}"
    return None


def _optim_problem(o: OptimBlock, t: TrainBlock) -> str | None:
    warmups = [name for name in ("warmup_steps", "warmup_tokens", "warmup_ratio") if getattr(o, name)]
    if len(warmups) > 1:
        return f"optim.{warmups[0]}, optim.{warmups[1]}: give one of them"
    if o.decay_steps and o.decay_tokens:
        return "optim.decay_steps, optim.decay_tokens: give one of them"
    if not all(0 <= b < 1 for b in o.betas):
        return f"optim.betas: {list(o.betas)} must lie in [0, 1)"
    if o.schedule == "wsd" and o.decay_steps is None and o.decay_tokens is None:
        return "optim.decay_steps: required with schedule: wsd; it is the length of the final decay"
    if o.schedule == "wsd" and o.decay_tokens and t.max_tokens is None:
        return "optim.decay_tokens: wsd decays at the end of the run, whose length is in steps; give decay_steps"
    if o.schedule == "wsd" and o.decay_steps and t.max_tokens is not None:
        return "optim.decay_steps: wsd decays at the end of the run, whose length is in tokens; give decay_tokens"
    return None


def _finetune_problem(f: FinetuneBlock) -> str | None:
    if f.task == "multiple_choice":
        for name in ("labels", "n_classes", "scores"):
            if getattr(f, name):
                return f"finetune.{name}: has no meaning with task: multiple_choice, whose labels number the choices"
    if f.scores and f.labels:
        return "finetune.scores, finetune.labels: give one of them"
    if len(set(f.labels)) < len(f.labels) or len(f.labels) == 1:
        return "finetune.labels: two different ones are needed, and none twice"
    if f.segment_embedding and f.task == "classification":
        return "finetune.segment_embedding: has no meaning with task: classification, which has one text"
    return None


def _sampling_problem(s: SamplingParams) -> str | None:
    if s.min_new_tokens > s.max_new_tokens:
        return f"sampling.min_new_tokens: {s.min_new_tokens} is more than max_new_tokens {s.max_new_tokens}"
    constraints = [name for name in ("regex", "choices", "json_schema") if getattr(s, name) not in (None, [])]
    if len(constraints) > 1:
        return f"sampling.{constraints[0]}, sampling.{constraints[1]}: give one of them"
    if s.num_beams > 1:
        if constraints:
            return f"sampling.{constraints[0]}: a search with num_beams cannot keep to it; draw, or use best_of"
        if s.best_of is not None:
            return "sampling.best_of: draws, and num_beams does not; give one of them"
        if s.temperature not in (0.0, 1.0):
            return f"sampling.temperature: {s.temperature} has no meaning with num_beams, which draws nothing"
        for name in ("top_k", "top_p", "min_p", "typical_p"):
            if getattr(s, name) is not None:
                return f"sampling.{name}: has no meaning with num_beams, which draws nothing"
    else:
        for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(s, name) != default:
                return f"sampling.{name}: has no meaning without num_beams"
    if s.best_of is not None and s.best_of > 1 and s.temperature == 0:
        return "sampling.best_of: with temperature 0 each text is the same; raise the temperature or use num_beams"
    most = s.best_of if s.best_of is not None else s.num_beams
    if s.num_return > most:
        of = "best_of" if s.best_of is not None else "num_beams"
        return f"sampling.num_return: {s.num_return} is more than {of} {most}"
    return None
