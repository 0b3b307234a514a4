"""From logits to text: pure sampling functions and the engine that feeds them."""

from gptcli.generate.engine import Completion, Engine

__all__ = ["Completion", "Engine"]
