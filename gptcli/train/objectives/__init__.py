"""Objectives: pure functions (model, batch) -> LossSum."""

from gptcli.train.objectives.next_token import next_token

__all__ = ["next_token"]
