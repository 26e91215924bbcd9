"""Options of a generation: from OpenAI's fields to those of transformers' `GenerationConfig`, checked."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from accel.config.serve import ServeConfig
from accel.errors import AccelError, unknown
from accel.serve.requests.bodies import IGNORED, ChatBody, GenerationBody
from accel.serve.requests.errors import invalid
from accel.serve.requests.option_checker import FORBIDDEN
from accel.serve.requests.served_model import ServedModel


def from_openai(body: GenerationBody, served: ServedModel, limits: ServeConfig) -> dict[str, Any]:
    """Return the options that a body of OpenAI's routes asks for.

    Sampling is on where `temperature` (above 0) or `top_p` is given, off with `temperature=0`, and otherwise as the
    deployable's generation config has it.

    Raises:
        ApiError: A field can't be used.
    """
    options = {name: value for name, value in (body.model_extra or {}).items() if name not in IGNORED}
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(body, name):
            raise invalid(f"{name} isn't supported; transformers' repetition_penalty is (1: none)", name)
    if body.temperature == 0:
        options["do_sample"] = False
    elif body.temperature is not None or body.top_p is not None:
        options["do_sample"] = True
        options |= {} if body.temperature is None else {"temperature": body.temperature}
        options |= {} if body.top_p is None else {"top_p": body.top_p}
    if body.logit_bias:
        options["sequence_bias"] = _biases(body.logit_bias)
    limit = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        limit = body.max_completion_tokens
    if limit is not None:
        options["max_new_tokens"] = limit
    names = {"max_new_tokens": "max_completion_tokens" if isinstance(body, ChatBody) else "max_tokens"}
    return checked(options, served, limits, names, type(body).model_fields)


def _biases(logit_bias: Mapping[str, float]) -> list[list[Any]]:
    """Return OpenAI's `logit_bias`, token id -> bias, as transformers' `sequence_bias`."""
    for token, bias in logit_bias.items():
        if not token.isdecimal() or not -100 <= bias <= 100:
            raise invalid(f"logit_bias: {token!r}: {bias} is no token id with a bias from -100 to 100", "logit_bias")
    return [[[int(token)], float(bias)] for token, bias in logit_bias.items()]


def checked(
    options: Mapping[str, Any],
    served: ServedModel,
    limits: ServeConfig,
    names: Mapping[str, str] | None = None,
    other_fields: Iterable[str] = (),
) -> dict[str, Any]:
    """Check options.

    Args:
        options: By the names of `GenerationConfig`.
        served: The model.
        limits: Largest number of new tokens.
        names: Option -> the field that holds it in the body, where they differ.
        other_fields: Fields that the body may have beside options, for the message about one that is unknown.

    Returns:
        The options, without those that are null.

    Raises:
        ApiError: An option is unknown, is not for clients, or has a value that can't be used.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name in FORBIDDEN:
            raise invalid(f"{name} can't be set: {FORBIDDEN[name]}", name)
        if name not in served.option_names:
            raise invalid(str(unknown("field", name, {*served.option_names, *other_fields})), name)
    try:
        served.check_options(json.dumps(given, sort_keys=True))
    except AccelError as error:
        param = next((name for name in given if name in str(error)), None)
        raise invalid(str(error).replace("generate.", ""), param) from error
    if given.get("max_new_tokens", 0) > limits.max_new_tokens:
        name = (names or {}).get("max_new_tokens", "max_new_tokens")
        message = f"{name}={given['max_new_tokens']}: this server allows {limits.max_new_tokens} at most"
        raise invalid(message, name)
    return given
