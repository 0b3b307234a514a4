"""The blocks of the stages that come after pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptcli.config.keys import key


@dataclass(frozen=True, kw_only=True)
class LoraBlock:
    rank: int = key(8, "rank of the update", ge=1)
    alpha: float = key(16.0, "the update is scaled by alpha / rank", gt=0)
    dropout: float = key(0.0, "on the adapter's input", ge=0, lt=1)
    targets: list[str] = key(["c_attn", "c_proj", "c_fc"], "names of the linear layers that get one")


@dataclass(frozen=True, kw_only=True)
class SFTBlock:
    template: str = key(
        "auto",
        "auto: the checkpoint's chat template, chatml where it has none; chatml; none: prompt and response as they "
        "are; or a Jinja file",
    )
    train_on: Literal["assistant", "last_assistant", "all"] = key(
        "assistant", "whose tokens count: every answer's, the last answer's, or all; an answer's end counts with it"
    )
    stop_token: str | None = key(
        None, "the token that ends an answer, and so generation; left out: <|im_end|> of chatml, else end-of-text"
    )
    packing: bool = key(True, "several conversations in a row, none of which sees another")
    truncation: Literal["refuse", "skip", "left"] = key(
        "refuse", "of a conversation longer than a row: stop; leave it out; or cut its beginning, never its last answer"
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneBlock:
    task: Literal["classification", "entailment", "similarity", "multiple_choice"] = key(..., "GPT-1's input transform")
    lm_coef: float = key(0.5, "weight of the auxiliary language-model loss", ge=0)
    n_classes: int | None = key(None, "left out: counted in the data; of scores: the levels, left out: 6", ge=2)
    labels: list[str] = key([], "names of the classes; left out: those of the training data, sorted")
    scores: bool = key(False, "labels are numbers, learnt as soft labels over n_classes levels (GPT-1's STS-B)")
    segment_embedding: bool = key(False, "tell the model which side of the delimiter a token is on")
    dropout: float | None = key(None, "everywhere in the model; left out: as the model has it", ge=0, lt=1)
    truncate: bool = key(True, "cut each part of a long row to its share of the context, as GPT-1; false: refuse it")


@dataclass(frozen=True, kw_only=True)
class RewardBlock:
    checkpoint: str | None = key(None, "a reward model, made by `gpt rlhf-reward`; its tokenizer may be another")
    function: str | None = key(None, "FILE.py:NAME, called with lists of prompts and responses, returns scores")
    weight: float = key(1.0, "of the checkpoint's score, where both are given")
    margins: bool = key(True, "rlhf-reward: a pair's margin is asked of the scores' difference")
    normalize: bool = key(True, "rlhf-reward: scores get mean 0 and std 1 on the samples of init_from")
    normalize_samples: int = key(256, "rlhf-reward: so many of them", ge=2)


@dataclass(frozen=True, kw_only=True)
class RolloutBlock:
    """What PPO and GRPO have in common."""

    rollout_batch_size: int = key(..., "responses per rollout, over all processes", ge=1)
    minibatch_size: int | None = key(None, "responses per optimizer step; it is train.global_batch_size", ge=1)
    clip_range: float = key(0.2, "of the probability ratio", gt=0)
    missing_eos_penalty: float = key(0.0, "taken off the score of a response that does not end", ge=0)
    stop_token: str | None = key(None, "text of a token that ends a response, beside end-of-text")
    stop_after: int = key(0, "only from so many tokens on", ge=0)
    best_of: int = key(
        16,
        "at the first validation the reference answers each prompt of data.val so often: the baseline best-of-n",
        ge=1,
    )


@dataclass(frozen=True, kw_only=True)
class PPOBlock(RolloutBlock):
    kl_coef: float = key(0.05, "price of a nat of KL against the reference, token by token in the reward (k1)", ge=0)
    kl_target: float | None = key(None, "adapt kl_coef towards this KL (nats per response)", gt=0)
    kl_horizon: int = key(10_000, "the larger, the slower kl_coef adapts", ge=1)
    gamma: float = key(1.0, "discount", ge=0, le=1)
    gae_lambda: float = key(0.95, "GAE's lambda", ge=0, le=1)
    value_clip: float = key(0.2, "of the value's change", gt=0)
    value_coef: float = key(0.1, "weight of the value loss", ge=0)
    ppo_epochs: int = key(4, "passes over each rollout", ge=1)
    whiten: bool = key(True, "advantages to mean 0 and variance 1")
    whiten_rewards: bool = key(False, "rewards to variance 1; their mean stays")


@dataclass(frozen=True, kw_only=True)
class DPOBlock:
    beta: float = key(0.1, "strength of the pull to the reference", gt=0)
    loss: Literal["sigmoid", "ipo", "conservative"] = key("sigmoid", "the preference loss")
    label_smoothing: float = key(0.0, "share of wrong labels assumed (loss: conservative)", ge=0, lt=0.5)
    per_token: bool = key(False, "log-probabilities averaged over a response's tokens, as TRL's ipo; off: summed")
    reference_free: bool = key(False, "leave the reference out")


@dataclass(frozen=True, kw_only=True)
class GRPOBlock(RolloutBlock):
    group_size: int = key(8, "responses per prompt", ge=2)
    epochs: int = key(1, "passes over each rollout", ge=1)
    baseline: Literal["mean", "leave_one_out"] = key("mean", "of the group, or of the others in it (RLOO)")
    scale: Literal["none", "group", "batch"] = key("group", "divide advantages by this standard deviation")
    ratio: Literal["token", "sequence"] = key("token", "a probability ratio for each token, or for a response (RLOO)")
    normalization: Literal["token", "sequence", "constant"] = key(
        "token", "what token losses are averaged over: all tokens; each response's own; max_new_tokens (Dr. GRPO)"
    )
    kl_coef: float = key(0.0, "price of a nat of KL against the reference", ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = key(
        "k1",
        "k1: in the reward, the right gradient; k2: in the loss, right but for later tokens; k3: in the loss, as "
        "published, the gradient of KL(reference || policy), which ends at another policy",
    )
