"""Where a model comes from, and the model card that says it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from gptcli import __version__
from gptcli.config.flops import count_params
from gptcli.config.load import to_tree
from gptcli.modeldir import ModelDir, read_json, write_json

LINEAGE = "lineage.json"


@dataclass(frozen=True)
class Lineage:
    """Written beside imported weights."""

    source: str
    format: str
    gptcli: str = __version__


def write_lineage(folder: Path, lineage: Lineage) -> None:
    write_json(folder / LINEAGE, asdict(lineage))


def read_lineage(checkpoint: Path) -> list[tuple[str, str]]:
    """What is known of how these weights came to be, as (what, value) lines in order."""
    out: list[tuple[str, str]] = []
    if (checkpoint / LINEAGE).is_file():
        tree = read_json(checkpoint / LINEAGE, missing="")
        out.append(("Imported from", f"{tree.get('source')} ({tree.get('format')})"))
    state_file, recipe_file = checkpoint / "training" / "state.json", checkpoint.parent / "recipe.yaml"
    if not state_file.is_file():
        return out
    state = read_json(state_file, missing="")
    recipe: dict[str, Any] = yaml.safe_load(recipe_file.read_text("utf-8")) if recipe_file.is_file() else {}
    out.append(("Stage", str(recipe.get("stage", "pretrain"))))
    if state.get("parent"):
        out.append(("Started from", str(state["parent"])))
    out.append(("Trained for", f"{state['step']:,} steps, {state['tokens_seen']:,} tokens"))
    if (best := state.get("best_val_loss")) is not None:
        unit = " nats per token" if recipe.get("stage", "pretrain") in ("pretrain", "sft") else ""
        name, value = "Validation loss", f"{best:.4f}{unit}"
        if recipe.get("stage") in ("rlhf-ppo", "rlhf-grpo"):  # there it is a reward with its sign turned
            name, value = "Held-out reward", f"{-best:.4f}"
        out.append((name, f"{value} (step {state['best_step']:,})"))
    data = recipe.get("data", {})
    if sources := data.get("source") or data.get("train") or data.get("path"):
        out.append(("Data", ", ".join(sources) if isinstance(sources, list) else str(sources)))
    if optim := recipe.get("optim"):
        out.append(("Optimizer", f"{optim.get('name')}, learning rate {optim.get('lr')}, {optim.get('schedule')}"))
    out.append(("Seed", str(recipe.get("run", {}).get("seed", ""))))
    out.append(("Made with", f"gptcli {state.get('gptcli')}, torch {state.get('torch')}"))
    return out


def model_card(source: ModelDir, lineage: list[tuple[str, str]], model_type: str) -> str:
    """README.md of an exported directory: front matter, lineage, shape, and how to load it."""
    config = source.config
    shape = {name: value for name, value in to_tree(config).items() if name not in ("vocab_pad_multiple", "dropout")}
    history = lineage or [("Origin", "not recorded in this checkpoint")]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gptcli, " + model_type + "]\n---",
        f"# {source.path.parent.name if source.path.name.startswith('step-') else source.path.name}",
        f"A {model_type} language model of {count_params(config):,} parameters, exported by gptcli {__version__}.",
        "## Lineage",
        "| | |\n|---|---|\n" + "\n".join(f"| {what} | {value} |" for what, value in history),
        "## Shape",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in shape.items()),
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n'
        'print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"))[0]))\n```',
    ]
    return "\n\n".join(parts) + "\n"
