"""From a checked request to its answer: prompts become ids, ids become jobs, events become text."""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gptcli.errors import UserError
from gptcli.generate import Completion, Engine
from gptcli.generate.completions import logprob_score
from gptcli.serve.errors import describe, error_body
from gptcli.serve.formats import ChatFormat, CompletionFormat, Format, reason_of, sse, usage_of
from gptcli.serve.logprobs import TokenView
from gptcli.serve.schemas import ChatRequest, CompletionRequest
from gptcli.serve.worker import Call, Event, Job, Worker
from gptcli.tokenizer.chat_template import chat_stop, encode_chat, special_in

T = TypeVar("T")


@dataclass
class Text:
    """A job's answer so far."""

    text: str = ""
    tokens: list[TokenView] = field(default_factory=list)
    completion: Completion = field(default_factory=lambda: Completion(""))

    def take(self, event: Event) -> None:
        self.text += event.text
        self.tokens += event.tokens
        self.completion = event.completion or self.completion


class Answers:
    """Answers completions and chats, whole or streamed."""

    def __init__(self, worker: Worker, name: str, timeout: float) -> None:
        self.worker, self.name, self.timeout = worker, name, timeout
        engine = worker.engine
        self.context_length = engine.model.config.context_length
        # Prompts are read in a thread of their own, by a tokenizer of its own: a long one holds up nobody's tokens.
        self._reader = Engine(engine.model, copy.deepcopy(engine.require_tokenizer()))
        self._pool = ThreadPoolExecutor(1, "gpt-serve-tokenizer")

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        body.refuse()
        drawn, wanted = max(body.best_of or 1, body.n or 1), body.n or 1
        jobs = await self._in_pool(lambda: self._completion_jobs(body, drawn))
        usage = bool(body.stream) and body.include_usage
        form = CompletionFormat(self.name, with_logprobs=body.logprobs is not None, with_usage=usage)
        prompt_tokens = sum(len(job.ids) for job in jobs[::drawn])
        if body.stream:
            return await self._streamed(request, jobs, form, prompt_tokens)
        return await self._whole(request, jobs, form, prompt_tokens, drawn, wanted)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        body.refuse()
        jobs = await self._in_pool(lambda: self._chat_jobs(body))
        usage = bool(body.stream) and body.include_usage
        form = ChatFormat(self.name, with_logprobs=bool(body.logprobs), with_usage=usage)
        if body.stream:
            return await self._streamed(request, jobs, form, len(jobs[0].ids))
        return await self._whole(request, jobs, form, len(jobs[0].ids), len(jobs), len(jobs))

    # ---- jobs ----------------------------------------------------------------------------------------------

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _completion_jobs(self, body: CompletionRequest, drawn: int) -> list[Job]:
        """drawn jobs of each prompt, prompt by prompt, their random streams numbered as `gpt generate` does."""
        jobs: list[Job] = []
        seed = secrets.randbits(63)
        for prompt in body.prompts:
            ids, echo = self._reader.encode_prompt(prompt), None
            if body.echo:
                echo = prompt if isinstance(prompt, str) else self._reader.require_tokenizer().decode(ids)
            params = body.sampling(body.limit(len(ids), self.context_length), seed, [])
            jobs += [Job(ids, params, len(jobs) + i, body.top_logprobs_wanted, echo) for i in range(drawn)]
        return jobs

    def _chat_jobs(self, body: ChatRequest) -> list[Job]:
        tokenizer = self._reader.require_tokenizer()
        messages = [message.plain() for message in body.messages]
        for number, message in enumerate(messages):
            if tokenizer.chat_template is not None and (token := special_in(tokenizer, message["content"])):
                raise UserError(f"messages[{number}].content: holds {token}, which would be read as that token")
        ids = encode_chat(tokenizer, messages)
        ids = self._reader.encode_prompt(ids)
        limit = body.limit(len(ids), self.context_length)
        params = body.sampling(limit, secrets.randbits(63), chat_stop(tokenizer))
        return [Job(ids, params, i, body.top_logprobs_wanted) for i in range(body.n or 1)]

    # ---- answers -------------------------------------------------------------------------------------------

    async def _whole(
        self, request: Request, jobs: list[Job], form: Format, prompt_tokens: int, drawn: int, wanted: int
    ) -> Response:
        """The best `wanted` of every `drawn` texts."""
        call = self.worker.submit(jobs, self.timeout)
        try:
            texts = await unless_disconnected(request, _collect(call))
        finally:
            self.worker.finish(call)
        kept = []
        for first in range(0, len(texts), drawn):
            of_prompt = texts[first : first + drawn]
            if drawn > wanted:
                of_prompt.sort(key=lambda t: -logprob_score(t.completion, "mean"))
            kept += of_prompt[:wanted]
        choices = [form.choice(i, t.text, t.tokens, reason_of(t.completion)) for i, t in enumerate(kept)]
        return JSONResponse(form.whole(choices, usage_of(prompt_tokens, [t.completion for t in texts])))

    async def _streamed(self, request: Request, jobs: list[Job], form: Format, prompt_tokens: int) -> Response:
        call = self.worker.submit(jobs, self.timeout)
        try:  # what is wrong with a request shows by its first event, while a status can still say so
            first = await unless_disconnected(request, call.next())
        except BaseException:
            self.worker.finish(call)
            raise
        return _EventStream(_chunks(call, first, form, prompt_tokens), on_end=lambda: self.worker.finish(call))


async def _chunks(call: Call, events: Sequence[Event], form: Format, prompt_tokens: int) -> AsyncIterator[str]:
    completions: list[Completion] = []
    opening = "".join(form.opening(index) for index in range(len(call.jobs)))
    try:
        while True:
            yield opening + "".join(_written(form, event) for event in events)
            opening = ""
            completions += [event.completion for event in events if event.completion is not None]
            if len(completions) == len(call.jobs):
                break
            events = await call.next()
    except Exception as error:  # the status is sent already: only an event can tell
        status, message, code = describe(error)
        yield sse(error_body(status, message, code=code))
    else:
        yield form.closing(usage_of(prompt_tokens, completions))


def _written(form: Format, event: Event) -> str:
    chunk = form.chunk(event.index, event.text, event.tokens) if event.text or event.tokens else ""
    return chunk + (form.end(event.index, reason_of(event.completion)) if event.completion else "")


async def _collect(call: Call) -> list[Text]:
    texts = [Text() for _ in call.jobs]
    while any(text.completion.finish_reason is None for text in texts):
        for event in await call.next():
            texts[event.index].take(event)
    return texts


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises ClientDisconnect as soon as nobody waits for it."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events. However the connection ends, and even if it never began, on_end is called."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(chunks, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
