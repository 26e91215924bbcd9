"""Bodies of requests, by OpenAI's names.

https://platform.openai.com/docs/api-reference/completions and .../chat, both as of their API version 1.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # strings, and characters of one
# OpenAI's fields about accounts, storage and billing, which mean nothing here.
IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
        *("prompt_cache_key", "prompt_cache_retention"),
    }
)
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Ids = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]


class Body(BaseModel):
    """Part of a body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    """How to stream.

    Attributes:
        include_usage: End with an event that has the numbers of tokens.
        include_obfuscation: Of no effect: events are never padded.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(BaseModel):
    """Schema that the output must follow."""

    name: str | None = None
    definition: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """Form of the output: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_given(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('type "json_schema" needs the field json_schema')
        return self


class GenerationBody(BaseModel):
    """Fields that completions and chat completions share.

    Further fields are options of transformers' `GenerationConfig`, which `accel.serve.requests.options` checks.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the output."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`.

    Attributes:
        prompt: Text, or token ids, or a list of either.
        logprobs: Number of most likely tokens to report at each position.
    """

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _best_of_all(self) -> "CompletionBody":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} must equal n={self.n}: outputs aren't ranked")
        return self


class Message(BaseModel):
    """Message of a conversation; further fields are passed to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`.

    Attributes:
        tools: Definitions, passed to the chat template. What the model answers is returned as text.
        chat_template_kwargs: Variables for the chat template, such as `enable_thinking`.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _logprobs_asked_for(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class GenerateBody(Body):
    """Body of `/v1/generate`.

    Attributes:
        inputs: Text, or a list of texts.
        parameters: Any options of transformers' `GenerationConfig`, by its names, and `seed`.
    """

    model: str
    inputs: str | Texts
    parameters: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False
