"""Generation: prompts of any lengths go in, text or tokens come out row by row. The one engine of CLI, chat, server,
evaluation and rollouts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError
from gptcli.generate.decode import Decode
from gptcli.generate.graph import GraphDecode
from gptcli.generate.native import NativeDecode, suits
from gptcli.generate.pack import pack
from gptcli.generate.processors import Processors
from gptcli.generate.scheduler import DraftCounts, Request, Scheduler, Token, check_room
from gptcli.generate.speculative import SpeculativeScheduler
from gptcli.generate.text import TextStream
from gptcli.model import GPT
from gptcli.tokenizer import Tokenizer

MAX_ROWS = 64
Prompt = str | Sequence[int]  # text, or ids where special tokens have their say


@dataclass
class Completion:
    """A text and its tokens, without the eos that ended it. score: a beam's, or what best_of chose by. draft: how its
    tokens fared, where there is one."""

    prompt: str
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    eos_logprob: float | None = None
    finish_reason: str | None = None
    score: float | None = None
    draft: DraftCounts | None = None


class Engine:
    """One model and its tokenizer, generating.

    With a `draft`, a smaller model of the same vocabulary that proposes `draft_tokens` at a time (speculative.py), rows
    are continued one after the other.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        *,
        draft: GPT | None = None,
        draft_tokens: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if draft is not None and draft.vocab_size != model.vocab_size:
            raise UserError(
                f"the draft has {draft.vocab_size:,} tokens and the model {model.vocab_size:,}: "
                "a draft needs the model's vocabulary"
            )
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.draft, self.draft_tokens = draft, draft_tokens
        self.device = model.wte.weight.device
        self._processors: OrderedDict[str, Processors] = OrderedDict()
        self._decode: Decode | None = GraphDecode(model, dtype) if self.device.type == "cuda" else self._native()

    @property
    def native(self) -> NativeDecode | None:
        """The step in C, where it is that."""
        return self._decode if isinstance(self._decode, NativeDecode) else None

    def _native(self) -> NativeDecode | None:
        return NativeDecode(self.model, self.dtype) if suits(self.model, self.dtype) else None

    def scheduler(self, max_rows: int) -> Scheduler | SpeculativeScheduler:
        if self.draft is not None:
            return SpeculativeScheduler(self.model, self.draft, self.draft_tokens, dtype=self.dtype)
        return Scheduler(self.model, max_rows=max_rows, dtype=self.dtype, decode=self._decode)

    def pack(self, *, int8: bool = False, compile: bool = False) -> None:
        """Bring the models into the form that generates fastest, or that in int8, or compile the step. native.c reads
        fp32 weights as they are; where torch decodes on a CPU, they get a layout of their own (pack.py)."""
        if int8 or self.draft is not None or not (compile or self._decode):
            for model in (self.model, self.draft):
                if model is not None:
                    pack(model, int8=int8)
        if self.device.type == "cpu":
            self._decode = self._native()
        if compile:
            self.compile()

    def compile(self) -> None:
        """On a GPU, compile the step that gives each row a token (graph.py): it takes seconds, when first needed."""
        if self.device.type == "cuda":
            self._decode = GraphDecode(self.model, self.dtype, compiled=True)

    def session(self, max_rows: int = MAX_ROWS) -> Session:
        return Session(self, max_rows)

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams, streams: Sequence[int] | None = None
    ) -> Iterator[tuple[int, str, Completion | None]]:
        """(row, new text, its completion when done) as they come.

        `streams` numbers the rows' random streams (0, 1, ... by default): the same prompt, number and seed give
        the same text. Raises UserError for an empty prompt where nothing marks a beginning.
        Beams and best_of are in `generate/completions.py`.
        """
        session, numbers = self.session(), streams if streams is not None else range(len(prompts))
        for row, (prompt, stream) in enumerate(zip(prompts, numbers, strict=True)):
            session.add(row, prompt, params, stream)
        while session.busy:
            for piece in session.step():
                assert isinstance(piece.key, int)
                yield piece.key, piece.text, piece.completion

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[Completion]:
        """The same, all at once and in order."""
        out: list[Completion | None] = [None] * len(prompts)
        for row, _, completion in self.stream(prompts, params, streams):
            out[row] = completion or out[row]
        return [c for c in out if c is not None]

    def tokens(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        streams: Sequence[int] | None = None,
        *,
        logprobs: bool = True,
        max_rows: int = MAX_ROWS,
    ) -> Iterator[Token]:
        """New tokens of every row (Token.key), until each has met eos or max_new_tokens. Stop strings are text's."""
        scheduler, processors = self.scheduler(max_rows), self.processors(params)
        numbers = streams if streams is not None else range(len(prompts))
        for row, (ids, stream) in enumerate(zip(prompts, numbers, strict=True)):
            scheduler.add(Request(row, ids, params, stream, logprobs), processors)
        while scheduler.busy:
            yield from scheduler.step()

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """A prompt's ids, after bos where the tokenizer's files say so; an empty one begins a document, that is,
        follows bos or end-of-text. Ids are taken as they are. Raises UserError where nothing marks a beginning, and
        for an id that is none."""
        tokenizer = self.require_tokenizer()
        if not isinstance(prompt, str) and prompt:
            if not 0 <= min(prompt) <= max(prompt) < self.model.vocab_size:
                raise UserError(f"the prompt's ids must lie in 0 to {self.model.vocab_size - 1}")
            return list(prompt)
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else []
        if ids and not tokenizer.adds_bos:
            return ids
        if tokenizer.start_id is None:
            raise UserError("the prompt is empty, and this tokenizer names no token that begins a text")
        return [tokenizer.start_id, *ids]

    def processors(self, params: SamplingParams) -> Processors:
        """What `params` do to logits here. Requests whose params differ only in seed and ends share it, and so are
        chosen for together; the last few are kept."""
        shared = replace(params, seed=0, stop=[], max_new_tokens=0)
        key = repr(shared)
        if key not in self._processors:
            self._processors[key] = Processors(shared, self.model.vocab_size, self.tokenizer, self.device)
            if len(self._processors) > MAX_ROWS:
                self._processors.popitem(last=False)
        self._processors.move_to_end(key)
        return self._processors[key]

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raises the UserError that continuing `prompt` would."""
        ids, grammar = self.encode_prompt(prompt), self.processors(params).grammar
        check_room(len(ids), params, self.model.config.context_length)
        if grammar is not None:
            grammar.start(ids)

    def require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer, so it can neither read nor write text")
        return self.tokenizer


class Piece(NamedTuple):
    """A token, and the text that it has made certain, perhaps none; the completion comes with a request's last."""

    key: Hashable
    text: str
    completion: Completion | None
    token: Token


class Session:
    """Texts that are continued together; requests may come, be cancelled and end between any two steps."""

    def __init__(self, engine: Engine, max_rows: int) -> None:
        self.engine, self.scheduler = engine, engine.scheduler(max_rows)
        self._open: dict[Hashable, tuple[TextStream, Completion]] = {}

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def add(
        self,
        key: Hashable,
        prompt: Prompt,
        params: SamplingParams,
        stream: int = 0,
        *,
        top_logprobs: int = 0,
    ) -> None:
        """Raises UserError for a prompt that cannot be continued."""
        assert params.num_beams == 1, "complete() searches"
        assert params.best_of is None, "complete() chooses"
        ids = self.engine.encode_prompt(prompt)
        request = Request(key, ids, params, stream, top_logprobs=top_logprobs)
        self.scheduler.add(request, self.engine.processors(params))
        tokenizer = self.engine.require_tokenizer()
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        self._open[key] = TextStream(tokenizer, params.stop, context=ids), Completion(text)

    def cancel(self, key: Hashable) -> None:
        self.scheduler.cancel(key)
        self._open.pop(key, None)

    def step(self) -> list[Piece]:
        """One token more for each request under way, or several."""
        # a text that a stop string ended may have been continued already
        return [self._piece(token) for token in self.scheduler.step() if token.key in self._open]

    def _piece(self, token: Token) -> Piece:
        stream, completion = self._open[token.key]
        reason, chunk = token.finish_reason, ""
        if reason == "eos":
            completion.eos_logprob = token.logprob
        else:
            completion.ids.append(token.id)
            if token.logprob is not None:
                completion.logprobs.append(token.logprob)
            chunk = stream.push(token.id)
        if reason is not None:
            chunk += stream.flush()
        elif stream.stopped:
            self.scheduler.cancel(token.key)
        if stream.stopped:
            reason = "stop"
        if reason is None:
            return Piece(token.key, chunk, None, token)
        completion.text, completion.finish_reason, completion.draft = stream.text, reason, token.draft
        del self._open[token.key]
        return Piece(token.key, chunk, completion, token)
