"""Every key a recipe may hold, with its type, default and meaning.

One frozen dataclass per block and one per stage. `load.py` builds them from YAML, `gpt recipes schema` prints
them, and nothing ever changes them: what follows from a recipe is computed in `plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptcli.config.keys import key
from gptcli.config.tuning import DPOBlock, FinetuneBlock, GRPOBlock, LoraBlock, PPOBlock, RewardBlock, SFTBlock


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary angles of a model whose context was stretched after, or late in, its training."""

    kind: Literal["linear", "llama3"] = key(
        "linear", "linear: every position is divided by factor; llama3: only slow frequencies are"
    )
    factor: float = key(..., "how many times longer the context became", ge=1)
    low_freq_factor: float = key(1.0, "llama3: waves longer than original_context_length / this are divided", gt=0)
    high_freq_factor: float = key(4.0, "llama3: waves shorter than original_context_length / this stay", gt=0)
    original_context_length: int = key(8192, "llama3: the context before stretching", ge=1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer. GPT-1, 2 and 3, GPT-Neo and Llama differ only in these values."""

    n_layer: int = key(..., "transformer blocks", ge=1)
    n_head: int = key(..., "attention heads; must divide n_embd", ge=1)
    n_kv_head: int | None = key(None, "heads of keys and values, shared by groups of n_head; left out: n_head", ge=1)
    n_embd: int = key(..., "width of the residual stream", ge=1)
    context_length: int = key(..., "most tokens the model can look at", ge=1)
    vocab_size: int | None = key(None, "tokens in the vocabulary; left out: the tokenizer's", ge=1)
    n_inner: int | None = key(None, "width of the MLP; left out: 4 x n_embd (swiglu: 8/3 x, up to a 64)", ge=1)
    dropout: float = key(0.0, "dropout on embeddings, attention and residuals", ge=0, lt=1)
    norm_position: Literal["pre", "post"] = key("pre", "pre: GPT-2 and 3, with a final norm; post: GPT-1, without")
    norm: Literal["layernorm", "rmsnorm"] = key("layernorm", "kind of normalisation")
    norm_eps: float = key(1e-5, "added to the variance before its root", gt=0)
    activation: Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu"] = key(
        "gelu_tanh", "the MLP's nonlinearity; GPT-1 to 3 use the tanh form of GELU; swiglu is gated, as in Llama"
    )
    position: Literal["learned", "sinusoidal", "rope", "alibi", "none"] = key(
        "learned", "how positions enter the model"
    )
    rope_theta: float = key(10000.0, "base of the rotary frequencies (position: rope)", gt=0)
    rope_scaling: RopeScaling | None = key(None, "stretching of the rotary angles (position: rope)")
    attention_pattern: Literal["dense", "banded", "alternating"] = key(
        "dense",
        "banded: each token sees the last band_width; alternating: dense, banded, dense, ... as GPT-3",
    )
    band_width: int | None = key(None, "tokens a banded layer looks back at, itself included", ge=1)
    scale_attention: bool = key(True, "divide attention scores by sqrt(head width); GPT-Neo does not")
    qk_norm: bool = key(False, "normalise queries and keys to unit RMS before attention")
    bias: bool = key(True, "biases in linear and norm layers")
    qkv_bias: bool | None = key(None, "biases of queries, keys and values; left out: as bias; GPT-Neo has none")
    tie_embeddings: bool = key(True, "the output head is the token embedding")
    init: Literal["normal", "uniform"] = key("normal", "shape of the initial weights' distribution")
    init_std: float = key(0.02, "standard deviation of the initial weights", gt=0)
    wpe_init_std: float | None = key(None, "the same for learned positions; left out: init_std", gt=0)
    residual_init: Literal["scaled", "plain", "zero"] = key(
        "scaled", "of the projections: init_std / sqrt(2 n_layer) as GPT-2's paper says; init_std; or zeros"
    )
    n_segment: int = key(0, "rows of a segment embedding added to the tokens; 0: none", ge=0)
    scalar_heads: dict[str, int] = key({}, "name -> width of linear heads on the final hidden state (value, reward)")
    vocab_pad_multiple: int = key(64, "embedding rows are padded to a multiple of this, for speed", ge=1)

    @property
    def inner(self) -> int:
        """Width of the MLP. A gated one has three matrices instead of two, so two thirds give the same size."""
        if self.activation == "swiglu":
            return self.n_inner or -(-8 * self.n_embd // (3 * 64)) * 64
        return self.n_inner or 4 * self.n_embd

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        """Rows of the token embedding: vocab_size rounded up to vocab_pad_multiple."""
        assert self.vocab_size is not None, "vocab_size is filled in from the tokenizer before a model is built"
        return -(-self.vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple

    def is_banded(self, layer: int) -> bool:
        """Whether this layer (from 0) sees only its last `band_width` tokens."""
        return self.attention_pattern == "banded" or (self.attention_pattern == "alternating" and layer % 2 == 1)


@dataclass(frozen=True, kw_only=True)
class RunBlock:
    name: str | None = key(None, "the run's directory is DIR/NAME; left out: the recipe's file name")
    dir: str = key("runs", "where runs live")
    seed: int = key(1337, "everything random is derived from this", ge=0, lt=2**63)


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    path: str | None = key(None, "a directory made by `gpt tokenize -o`")
    source: list[str] = key([], "instead: files, folders, ... as data.source; tokenized once")
    weight: float = key(..., "this part's share of the rows, relative to the others", gt=0)


@dataclass(frozen=True, kw_only=True)
class DataBlock:
    """One of: path; source; train (and val); mixture."""

    path: str | None = key(None, "a directory made by `gpt tokenize -o`")
    source: list[str] = key([], "files, folders, globs, -, python-stdlib, hf:NAME[:CONFIG][:SPLIT]; tokenized once")
    train: list[str] = key([], "sources of the training part alone")
    val: list[str] = key([], "sources of the validation part alone")
    mixture: list[MixturePart] = key([], "tokenized directories or sources, and their weights")
    val_fraction: float = key(0.05, "share of the documents held out", ge=0, lt=1)
    split: Literal["hash", "tail"] = key(
        "hash", "hash: by document, so that adding documents moves none; tail: the end"
    )
    text_key: str = key("text", "the column that holds the text in JSONL and Parquet")
    columns: dict[str, str] = key({}, "of examples, where a file's columns have other names: ours -> the file's")
    skip_bad: bool = key(False, "leave out bad lines and files, and count them, instead of stopping")


@dataclass(frozen=True, kw_only=True)
class OptimBlock:
    name: Literal["adamw", "muon"] = key("adamw", "muon: Muon on the hidden matrices, AdamW on all else")
    lr: float = key(3e-4, "AdamW's peak learning rate", gt=0)
    muon_lr: float = key(0.02, "Muon's peak learning rate", gt=0)
    muon_momentum: float = key(0.95, "Muon's Nesterov momentum", ge=0, lt=1)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = key(
        "cosine", "shape after the warmup; wsd: constant, then linear over the last decay_steps"
    )
    min_lr_ratio: float = key(0.1, "the last learning rate over the peak", ge=0, le=1)
    warmup_steps: int = key(0, "linear warmup, in steps", ge=0)
    warmup_tokens: int | None = key(None, "linear warmup, in tokens instead", ge=0)
    warmup_ratio: float | None = key(None, "linear warmup, as a share of all steps instead", ge=0, le=1)
    decay_steps: int | None = key(None, "step at which the decay ends (wsd: its length); left out: max_steps", ge=1)
    decay_tokens: int | None = key(None, "the same in tokens instead", ge=1)
    betas: tuple[float, float] = key((0.9, 0.95), "AdamW's moment decay rates")
    eps: float = key(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = key(0.1, "decoupled, on weight matrices only", ge=0)
    decay_embeddings: bool = key(True, "also decay the embeddings")
    grad_clip: float = key(1.0, "largest global gradient norm; 0: no clipping", ge=0)


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    start: int = key(..., "rows per step at the beginning; later sizes are multiples of it", ge=1)
    tokens: int = key(..., "tokens over which the batch grows linearly to global_batch_size", ge=1)


@dataclass(frozen=True, kw_only=True)
class TrainBlock:
    max_steps: int | None = key(None, "optimizer steps", ge=1)
    max_tokens: int | None = key(None, "tokens instead", ge=1)
    epochs: float | None = key(
        None, "passes over the examples instead (sft: packed rows); each ends with a validation", gt=0
    )
    patience: int = key(0, "stop after so many validations in a row without a better one; 0: never", ge=0)
    global_batch_size: int = key(..., "rows per optimizer step, over all processes", ge=1)
    global_batch_size_cpu: int | None = key(
        None, "the same where there is no GPU, so that any recipe can be tried", ge=1
    )
    micro_batch_size: Literal["auto"] | int = key(
        "auto", "rows per forward and process; auto: what fits and is fast", ge=1
    )
    batch_ramp: BatchRamp | None = key(None, "grow the batch at the start, as GPT-3 did")
    seq_len: int | None = key(None, "tokens per row; left out: the model's context_length", ge=1)
    log_every: int = key(10, "steps between rows of metrics.jsonl; 0: never", ge=0)
    eval_every: int = key(250, "steps between validations; 0: never", ge=0)
    eval_rows: int = key(256, "at most this many rows of held-out text per validation", ge=1)
    save_every: int = key(1000, "steps between checkpoints that are kept; 0: only the best and the last", ge=0)
    keep_last: int = key(0, "of those keep only the newest so many (best and latest always stay); 0: all", ge=0)
    sample_every: int = key(0, "steps between samples of text; 0: never", ge=0)
    sample_prompt: str = key("", "what those samples continue")
    precision: Literal["auto", "fp32", "bf16"] = key("auto", "auto: bf16 where the hardware has it, else fp32")
    compile: Literal["auto"] | bool = key(
        False,
        "torch.compile the model (rlhf-ppo, rlhf-grpo: the step by which a GPU writes); auto: on a GPU only",
    )
    loggers: list[Literal["tensorboard"]] = key([], "extra metric writers beside metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    dp: int = key(1, "replicas", ge=1)
    fsdp: int = key(1, "shards", ge=1)
    tp: int = key(1, "tensor-parallel ranks", ge=1)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How text is drawn or searched for; semantics in `generate/`: processors, constrain, beam."""

    max_new_tokens: int = key(200, "stop after this many", ge=1)
    min_new_tokens: int = key(0, "no end-of-text before this many", ge=0)
    stop: list[str] = key([], "strings that end the text; they are cut off")
    on_overflow: Literal["slide", "refuse"] = key(
        "slide", "where prompt and new tokens exceed the context: slide the view by half a context, or refuse"
    )
    ignore_eos: bool = key(False, "go on after end-of-text")
    seed: int = key(0, "the same seed gives the same text, whatever else is in the batch", ge=0, lt=2**63)

    temperature: float = key(1.0, "divides the logits; 0: greedy", ge=0)
    top_k: int | None = key(None, "keep the k likeliest tokens (ties kept)", ge=1)
    top_p: float | None = key(None, "keep the likeliest tokens up to this mass", gt=0, le=1)
    top_p_mode: Literal["hf", "openai"] = key(
        "hf", "the token that crosses top_p: hf keeps it, openai (GPT-2's released code) drops it"
    )
    min_p: float | None = key(None, "drop tokens below this share of the likeliest one's probability", ge=0, le=1)
    typical_p: float | None = key(
        None, "keep this mass of the tokens whose surprise is nearest to the expected one", gt=0, le=1
    )

    repetition_penalty: float = key(1.0, "CTRL's penalty on every token seen, the prompt included", gt=0)
    presence_penalty: float = key(0.0, "taken off the logit of every token generated before", ge=-2, le=2)
    frequency_penalty: float = key(0.0, "the same, times how often it was generated", ge=-2, le=2)
    no_repeat_ngram: int = key(0, "no run of so many tokens twice, the prompt included; 0: off", ge=0)
    bad_words: list[str] = key([], "texts whose tokens never come in a row, with a space before them or not")
    logit_bias: dict[str, float] = key({}, "token id, or the text of one token -> added to its logit")

    regex: str | None = key(None, "the text matches this regular expression (Rust's syntax) as a whole")
    choices: list[str] = key([], "the text is one of these")
    json_schema: str | None = key(None, "the text is JSON that this schema (a file, or JSON itself) accepts")

    num_beams: int = key(1, "beam search of this width, which draws nothing; 1: off", ge=1)
    length_penalty: float = key(1.0, "a beam's score is its log-probability / tokens ** this", ge=-10, le=10)
    early_stopping: Literal["never"] | bool = key(
        False, "of beams, once num_beams ended: true: at once; false: by a guess; never: when nothing can be better"
    )
    best_of: int | None = key(None, "draw this many, return the best", ge=1)
    best_of_score: Literal["mean", "sum"] = key("mean", "best by log-probability per token, or in all")
    num_return: int = key(1, "of the beams or of best_of, return this many", ge=1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every stage's recipe holds. Exactly one of `model` and `init_from` says where the weights come from."""

    stage: str = key("pretrain", "the verb that this recipe is for")
    run: RunBlock = key(RunBlock(), "name, place and seed")
    init_from: str | None = key(None, "a checkpoint whose weights to start from, instead of model")
    context_length: int | None = key(
        None, "with init_from: stretch its context to this many tokens (model/extend.py says how)", ge=1
    )
    model: ModelConfig | None = key(None, "the shape of a new model")
    tokenizer: str | None = key(None, "gpt1 | gpt2 | bytes | char | bpe:SIZE | PATH; with init_from: the checkpoint's")
    data: DataBlock = key(DataBlock(), "what to train on")
    optim: OptimBlock = key(OptimBlock(), "how to step")
    train: TrainBlock = key(..., "how long, how large, how often")
    parallel: Literal["none", "ddp", "fsdp", "tp"] | ParallelSizes = key("ddp", "layout over several processes")
    lora: LoraBlock | None = key(None, "with init_from: train low-rank updates instead of all weights")
    sampling: SamplingParams = key(SamplingParams(), "how samples and rollouts are drawn")


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    pass


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(Recipe):
    sft: SFTBlock = key(SFTBlock(), "how conversations become rows")


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    finetune: FinetuneBlock = key(..., "the task head")


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(Recipe):
    reward: RewardBlock = key(RewardBlock(), "the reward model")


HELD_OUT_REWARD = (
    "another reward, not trained on, that scores the responses to data.val at validations: `best` and train.patience "
    "go by it, and the run warns when it falls while the trained one rises; left out: they go by the trained one"
)


@dataclass(frozen=True, kw_only=True)
class PPORecipe(Recipe):
    ppo: PPOBlock = key(..., "proximal policy optimization")
    reward: RewardBlock = key(..., "where scores come from")
    held_out_reward: RewardBlock | None = key(None, HELD_OUT_REWARD)


@dataclass(frozen=True, kw_only=True)
class DPORecipe(Recipe):
    dpo: DPOBlock = key(DPOBlock(), "direct preference optimization")


@dataclass(frozen=True, kw_only=True)
class GRPORecipe(Recipe):
    grpo: GRPOBlock = key(..., "group-relative policy optimization")
    reward: RewardBlock = key(..., "where scores come from")
    held_out_reward: RewardBlock | None = key(None, HELD_OUT_REWARD)


STAGES: dict[str, type[Recipe]] = {
    "pretrain": PretrainRecipe,
    "sft": SFTRecipe,
    "finetune": FinetuneRecipe,
    "rlhf-reward": RewardRecipe,
    "rlhf-ppo": PPORecipe,
    "rlhf-dpo": DPORecipe,
    "rlhf-grpo": GRPORecipe,
}
