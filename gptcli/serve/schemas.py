"""What requests may hold, in OpenAI's names, and what it means in ours. Fields not listed here are ignored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from gptcli.config.schema import SamplingParams
from gptcli.errors import UserError

MAX_CHOICES = 128  # texts that one request may ask for
LEAST_TEMPERATURE = 1e-4  # below it a draw is greedy in all but rounding, and dividing by it overflows

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Stop = str | Annotated[list[str], Field(max_length=16)]


class Request(BaseModel, ABC):
    """What both kinds of request share."""

    # strict: "5" is no number, as with OpenAI
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")
    default_max_tokens: ClassVar[int | None] = None  # None: to the context's end

    model: str | None = Field(None, description="A name that /v1/models lists; left out: the one there is.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="The same seed gives the same text; left out: another each time."
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="Not OpenAI's; -1 and 0: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Not OpenAI's.")
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = Field(None, description="Not OpenAI's.")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    @abstractmethod
    def top_logprobs_wanted(self) -> int | None:
        """Likeliest tokens to tell of at each place; None: no log-probabilities at all."""

    @abstractmethod
    def refuse(self) -> None:
        """Raises UserError for what no model here can do."""

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def limit(self, prompt_tokens: int, context_length: int) -> int:
        """New tokens that the answer may have. Raises ContextError where prompt and answer exceed the context."""
        room, wanted = context_length - prompt_tokens, self.wanted_tokens
        if wanted is None:
            wanted = max(1, room if self.default_max_tokens is None else min(room, self.default_max_tokens))
        if wanted > room:
            raise ContextError(
                f"this model's context is {context_length} tokens; the prompt has {prompt_tokens} and max_tokens is "
                f"{wanted}: shorten one of them"
            )
        return wanted

    def sampling(self, max_new_tokens: int, seed: int, stop: list[str]) -> SamplingParams:
        temperature = 1.0 if self.temperature is None else self.temperature
        given = {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_p": self.min_p,
            "top_k": self.top_k if self.top_k is not None and self.top_k > 0 else None,
            # 0 keeps the likeliest token alone, as any mass does that it reaches by itself
            "top_p": self.top_p if self.top_p != 0 else 1e-9,
            "logit_bias": self.logit_bias,
        }
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
            seed=(self.seed if self.seed is not None else seed) & (2**63 - 1),
            stop=[*stop, *([self.stop] if isinstance(self.stop, str) else self.stop or [])],
            on_overflow="refuse",
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )


class ContextError(UserError):
    """Prompt and answer do not fit into the context."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = False


class CompletionRequest(Request):
    default_max_tokens: ClassVar[int | None] = 16  # OpenAI's

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    ) = Field("", description="A text, token ids, or several of either.")
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: str | None = Field(None, description="Refused: these models only write forwards.")

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    def refuse(self) -> None:
        if self.suffix:
            raise UserError("suffix: this server only continues a prompt")
        drawn, wanted = self.best_of or self.n or 1, self.n or 1
        if drawn < wanted:
            raise UserError(f"best_of: {drawn} is less than n {wanted}")
        if drawn > wanted and self.stream:
            raise UserError("best_of: the best text is known at the end only; leave out stream")
        if len(self.prompts) * drawn > MAX_CHOICES:
            raise UserError(f"n: {len(self.prompts)} prompts times {drawn} is more than {MAX_CHOICES} texts")


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """As templates know messages: one text, and no role `developer`, which is OpenAI's new name of `system`."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message | ({"name": self.name} if self.name is not None else {})


class ChatRequest(Request):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = Field(None, description="Refused unless empty.")
    functions: list[Any] | None = Field(None, description="Refused unless empty.")
    response_format: dict[str, Any] | None = Field(None, description='Refused unless {"type": "text"}.')

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def refuse(self) -> None:
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise UserError(f"{name}: models here do not call functions; leave it out")
        if self.response_format and self.response_format.get("type") != "text":
            raise UserError("response_format: only text can be promised")
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs: needs logprobs: true")


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    """What both kinds of choice share."""

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Answer(BaseModel):
    """What both kinds of answer share."""

    id: str
    created: int
    model: str
    usage: Usage


class CompletionChoice(Choice):
    text: str


class CompletionResponse(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(Choice):
    message: AnswerMessage


class ChatResponse(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]
    running: int
    waiting: int
