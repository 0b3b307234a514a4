"""The options of verbs that generate: one for each key of SamplingParams, under its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.errors import UserError

if TYPE_CHECKING:
    from gptcli.config.schema import SamplingParams

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Stop after this many.")]
MinNewTokens = Annotated[int, typer.Option(metavar="N", show_default=False, help="No end-of-text before this many.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-text.")]
OnOverflow = Annotated[
    str, typer.Option(metavar="slide|refuse", help="Past the context: slide the view by half of it, or refuse.")
]
Temperature = Annotated[float, typer.Option(metavar="X", help="Divides the logits; 0: greedy.")]
TopK = Annotated[int | None, typer.Option(metavar="N", help="Keep the N likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(metavar="P", help="Keep the likeliest tokens up to mass P.")]
TopPMode = Annotated[
    str, typer.Option(metavar="hf|openai", help="Keep the token that crosses P, or drop it as GPT-2's code did.")
]
MinP = Annotated[
    float | None, typer.Option(metavar="P", help="Drop tokens below P times the likeliest one's probability.")
]
TypicalP = Annotated[
    float | None, typer.Option(metavar="P", help="Keep mass P of the tokens nearest to the expected surprise.")
]
RepetitionPenalty = Annotated[float, typer.Option(metavar="X", help="CTRL's penalty on tokens seen; 1: none.")]
PresencePenalty = Annotated[
    float, typer.Option(metavar="X", show_default=False, help="X off the logits of tokens generated before.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(metavar="X", show_default=False, help="The same, times how often they were.")
]
NoRepeatNgram = Annotated[int, typer.Option(metavar="N", show_default=False, help="No N tokens in a row twice.")]
BadWords = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Never write this. Repeatable.")]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKEN=X", help="Add X to the logit of a token, by id or text. Repeatable."),
]
Regex = Annotated[str | None, typer.Option(metavar="REGEX", help="The text matches it, as a whole.")]
Choices = Annotated[
    list[str] | None, typer.Option("--choice", metavar="TEXT", help="The text is one of these. Repeatable.")
]
JsonSchema = Annotated[str | None, typer.Option(metavar="FILE|JSON", help="The text is JSON that this schema accepts.")]
NumBeams = Annotated[
    int, typer.Option(metavar="N", show_default=False, help="Search for the likeliest text with N beams.")
]
LengthPenalty = Annotated[float, typer.Option(metavar="X", help="A beam's score is its log-probability / tokens ** X.")]
EarlyStopping = Annotated[
    str,
    typer.Option(
        metavar="true|false|never",
        help="Once N beams ended, end the search: at once; by a guess; when none can be better.",
    ),
]
BestOf = Annotated[int | None, typer.Option(metavar="N", help="Draw N texts, write the best.")]
BestOfScore = Annotated[str, typer.Option(metavar="mean|sum", help="Best by log-probability per token, or in all.")]
NumReturn = Annotated[int, typer.Option(metavar="N", show_default=False, help="Write N of the beams, or of --best-of.")]


def params_of(context: typer.Context) -> SamplingParams:
    """A verb's options that are keys of SamplingParams, checked as a recipe's are."""
    import dataclasses

    from gptcli.config.load import build
    from gptcli.config.schema import SamplingParams
    from gptcli.config.validate import check_sampling

    names = {field.name for field in dataclasses.fields(SamplingParams)}
    values = {name: value for name, value in context.params.items() if name in names and value is not None}
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}  # repeatable options
    values["seed"] = values.get("seed", fresh_seed())
    values["logit_bias"] = dict(map(_bias, values.get("logit_bias", [])))
    if (early := values.get("early_stopping")) is not None:
        values["early_stopping"] = {"true": True, "false": False}.get(early, early)
    params = build(SamplingParams, values, where=context.command_path)
    check_sampling(params, context.command_path)
    return params


def changed_params(params: SamplingParams, text: str) -> SamplingParams:
    """The same with the `key=value` pairs of a line changed, values in YAML as in a recipe."""
    import shlex

    import yaml

    from gptcli.config.load import build, to_tree
    from gptcli.config.schema import SamplingParams
    from gptcli.config.validate import check_sampling

    tree = to_tree(params)
    try:
        for pair in shlex.split(text):
            key, equals, value = pair.partition("=")
            if not equals:
                raise UserError(f"{pair}: write it as key=value, as in temperature=0.7")
            tree[key] = yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{text}: not read as key=value ({' '.join(str(error).split())})") from error
    changed = build(SamplingParams, tree, where="sampling")
    check_sampling(changed, "sampling")
    return changed


def params_text(params: SamplingParams) -> str:
    """As `changed_params` reads it."""
    import json
    import shlex

    from gptcli.config.load import to_tree

    return " ".join(
        shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}") for key, value in to_tree(params).items()
    )


def _bias(text: str) -> tuple[str, str]:
    token, equals, value = text.rpartition("=")
    if not equals or not token:
        raise UserError(f"--logit-bias {text}: write it as TOKEN=VALUE, as in 50256=-100")
    return token, value


def fresh_seed() -> int:
    """A new seed for each call: without --seed, text differs from run to run."""
    import secrets

    return secrets.randbits(31)
