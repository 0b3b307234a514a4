"""Answers ranked by a Python function or a reward model, in a person's stead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch

from gptcli.generate import Engine
from gptcli.modeldir import open_model_dir
from gptcli.rlhf.label_file import LabelFile
from gptcli.rlhf.labels import Question, Queue, label_row, rank_by_number, ranking_row
from gptcli.rlhf.preferences import encode_asked
from gptcli.rlhf.rewards import RewardFunction, RewardModel, Sample
from gptcli.train.checkpoint import find_checkpoint

REWARD = "reward:"
QUESTIONS = 64  # ranked at a time, and then on the disk

Ranker = Callable[[Sequence[Sample]], torch.Tensor]


def open_ranker(
    spec: str, device: torch.device, dtype: torch.dtype
) -> tuple[Ranker, Callable[[Question, str], Sample]]:
    """What `spec` (FILE.py:NAME, or reward:CHECKPOINT) scores samples by, and what makes its samples of answers."""
    if not spec.startswith(REWARD):
        return RewardFunction(spec), lambda question, response: Sample([], [], question.prompt, response, ended=True)
    path = spec.removeprefix(REWARD)
    tokenizer = open_model_dir(find_checkpoint(path)).require_tokenizer()
    model = RewardModel(path, tokenizer, device, dtype)
    encode_prompt = Engine(model.model, tokenizer).encode_prompt

    def sample(question: Question, response: str) -> Sample:
        prompt_ids = encode_asked(question.prompt, question.messages, tokenizer, encode_prompt)
        return Sample(prompt_ids, tokenizer.encode(response), question.prompt, response, ended=True)

    return model, sample


def rank_questions(
    spec: str, queue: Queue, file: LabelFile, labeller: str, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Write a label for each question that is left. The numbers themselves are kept as `rewards`: margins on a scale of
    their own would mean nothing to a loss."""
    ranker, sample = open_ranker(spec, device, dtype)
    while part := list(islice(queue.pending, QUESTIONS)):
        numbers = iter(ranker([sample(q, response) for q in part for response in q.responses]).tolist())
        for question in part:
            rewards = list(islice(numbers, len(question.responses)))
            judgement = ranking_row(rank_by_number(rewards), range(len(rewards)))
            file.add(label_row(question, judgement, labeller, rewards=rewards))
            queue.label()
