"""gpt plan"""

from __future__ import annotations

import json as jsonlib
from typing import Any

from gptcli.cli import options
from gptcli.errors import UserError


def plan(
    recipe: options.RecipeName = None,
    set_: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Count parameters and arithmetic before anything is paid.

    gpt plan -r gpt3-175b.yaml
    """
    from gptcli.config.load import load_recipe

    if recipe is None:
        raise UserError("gpt plan: needs --recipe NAME|PATH; `gpt recipes` lists them")
    row = plan_row(load_recipe(recipe, set_ or []))
    if json:
        print(jsonlib.dumps(row))
    else:
        print("\n".join(_table(row)))


def plan_row(recipe: Any) -> dict[str, Any]:
    """The figures of a recipe, by formula. Raises UserError where the recipe leaves its shape open."""
    import dataclasses

    from gptcli.config import flops
    from gptcli.tokenizer.resolve import known_vocab_size

    model = recipe.model
    if model is None:
        raise UserError("gpt plan: this recipe starts from other weights (init_from), which say its shape")
    if model.vocab_size is None:
        size = known_vocab_size(recipe.tokenizer)
        if size is None:
            raise UserError(f"model.vocab_size: tokenizer {recipe.tokenizer} does not say it; -s model.vocab_size=N")
        model = dataclasses.replace(model, vocab_size=size)
    seq_len = recipe.train.seq_len or model.context_length
    train = recipe.train
    tokens = train.max_tokens or train.max_steps * train.global_batch_size * seq_len
    per_token = flops.flops_per_token(model)
    return {
        "recipe": recipe.run.name,
        "params": flops.count_params(model),
        "params_non_embedding": flops.count_non_embedding(model),
        "params_by_part": flops.params_by_part(model),
        "flops_per_token": per_token,
        "flops_per_token_with_attention": flops.flops_per_token_with_attention(model, seq_len),
        "tokens": tokens,
        "train_flops": per_token * tokens,
        "pf_days": per_token * tokens / flops.PF_DAY,
    }


def _table(row: dict[str, Any]) -> list[str]:
    width = max(len(name) for name in row["params_by_part"]) + 2
    lines = [f"{row['recipe']}: {row['params']:,} parameters"]
    lines += [f"  {name:<{width}}{n:>20,}  {n / row['params']:6.1%}" for name, n in row["params_by_part"].items()]
    lines += [
        f"{'FLOPs per token':<{width + 2}}{row['flops_per_token']:>20,}  (6 N)",
        f"{'with attention':<{width + 2}}{row['flops_per_token_with_attention']:>20,}",
        f"{'training tokens':<{width + 2}}{row['tokens']:>20,}",
        f"{'training FLOPs':<{width + 2}}{row['train_flops']:>20.3e}",
        f"{'PF-days':<{width + 2}}{row['pf_days']:>20,.4g}",
    ]
    return lines
