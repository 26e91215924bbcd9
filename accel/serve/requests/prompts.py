"""Prompts: from the texts, token ids or messages of a body to the inputs of a model."""

import inspect
from collections.abc import Sequence
from typing import Any

import jinja2

from accel.config.serve import ServeConfig
from accel.serve.requests.bodies import ChatBody, CompletionBody, Message
from accel.serve.requests.errors import ApiError, invalid, too_long
from accel.serve.requests.served_model import ServedModel

MAX_TOKEN_LENGTH = 256  # characters: a longer text than this for every token that is allowed isn't even tokenized
Ids = list[int]


def of_completion(body: CompletionBody, served: ServedModel, limits: ServeConfig) -> list[Ids]:
    """Return the ids of each prompt of `/v1/completions`.

    Raises:
        ApiError: An id isn't in the vocabulary, or a prompt is empty or too long.
    """
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        return of_texts(prompt, served, limits, "prompt")
    return of_ids(prompt, served, limits, "prompt")


def of_ids(prompts: Sequence[Ids], served: ServedModel, limits: ServeConfig, param: str) -> list[Ids]:
    """Return prompts of token ids, once they are checked.

    Args:
        prompts: The ids of each prompt.
        served: The model.
        limits: Largest number of tokens.
        param: Field of the request that holds them.

    Raises:
        ApiError: A prompt is empty or too long, or an id isn't in the vocabulary.
    """
    vocabulary = len(served.tokenizer)
    for ids in prompts:
        if not ids:
            raise invalid(f"{param}: there are no ids, and the model needs a token to begin with", param)
        for token in (min(ids), max(ids)):
            if not 0 <= token < vocabulary:
                raise invalid(f"{param}: {token} is no id of the vocabulary, 0 to {vocabulary - 1}", param)
        _check_length(len(ids), limits, param)
    return list(prompts)


def of_texts(texts: Sequence[str], served: ServedModel, limits: ServeConfig, param: str) -> list[Ids]:
    """Return the ids of texts. Special tokens are added as the tokenizer does.

    Args:
        texts: The texts.
        served: The model.
        limits: Largest number of tokens.
        param: Field of the body that holds them.

    Raises:
        ApiError: A text has no tokens or too many.
    """
    return [_encode(text, served, limits, param, add_special_tokens=True) for text in texts]


def of_chat(body: ChatBody, served: ServedModel, limits: ServeConfig) -> Ids:
    """Return the ids of a conversation, put into the tokenizer's chat template.

    Transformers compiles the template in jinja's `ImmutableSandboxedEnvironment`.

    Raises:
        ApiError: There is no chat template, it refuses the messages, or the prompt is too long.
    """
    if not served.has_chat_template:
        raise invalid(f"the model {served.name} has no chat template: use /v1/completions", "model")
    variables = body.chat_template_kwargs or {}
    reserved = set(inspect.signature(served.tokenizer.apply_chat_template).parameters) & set(variables)
    if reserved:
        raise invalid(f"chat_template_kwargs: {sorted(reserved)[0]} is no variable of a template")
    messages = [_message(message) for message in body.messages]
    length = sum(len(str(message)) for message in messages)
    _check_characters(length, limits, "messages")
    tools: Any = None if body.tool_choice == "none" else body.tools
    try:
        text = served.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise invalid(f"messages: the chat template refuses them: {error}", "messages") from error
    return _encode(str(text), served, limits, "messages", add_special_tokens=False)  # the template writes them


def _message(message: Message) -> dict[str, Any]:
    """Return a message as templates take it: with a text as content."""
    values = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        for part in message.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise invalid(f"messages: content of type {part.get('type')!r} isn't supported, text is", "messages")
        values["content"] = "".join(part["text"] for part in message.content)
    return values


def _encode(text: str, served: ServedModel, limits: ServeConfig, param: str, *, add_special_tokens: bool) -> Ids:
    """Return the ids of a text. Raises `ApiError` if there are none or too many."""
    _check_characters(len(text), limits, param)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 can't
        raise invalid(f"{param}: the text is no valid Unicode: {error.reason}", param) from error
    with served.tokenizing:
        ids: Ids = served.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    if not ids:
        raise invalid(f"{param}: the text is empty, and the model needs a token to begin with", param)
    _check_length(len(ids), limits, param)
    return ids


def _check_characters(length: int, limits: ServeConfig, param: str) -> None:
    """Raise `ApiError` on a text that has too many tokens for certain, before it is tokenized."""
    if length > limits.max_prompt_tokens * MAX_TOKEN_LENGTH:
        raise _too_long(f"{length} characters", limits, param)


def _check_length(length: int, limits: ServeConfig, param: str) -> None:
    """Raise `ApiError` on too many tokens."""
    if length > limits.max_prompt_tokens:
        raise _too_long(f"{length} tokens", limits, param)


def _too_long(length: str, limits: ServeConfig, param: str) -> ApiError:
    """Return the error for a prompt that is too long."""
    return too_long(f"{param}: {length}: this server allows {limits.max_prompt_tokens} tokens", param)
