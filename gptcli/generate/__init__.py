"""From logits to text: pure sampling functions, the engine that feeds them, and the search for the best text."""

from gptcli.generate.completions import complete
from gptcli.generate.engine import Completion, Engine

__all__ = ["Completion", "Engine", "complete"]
