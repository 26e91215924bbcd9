"""`/v1/audio/transcriptions`: the text of speech, by models that take sound.

https://platform.openai.com/docs/api-reference/audio/createTranscription
"""

import io
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Form, Response, UploadFile
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse

from accel.data import audio
from accel.errors import AccelError
from accel.models.option_check import option_names
from accel.serve.http.service import Service, record_of, unless_gone
from accel.serve.requests import options
from accel.serve.requests.errors import invalid, too_long
from accel.serve.requests.sequences import Delta, Plan, Sequences
from accel.serve.requests.served_model import ServedModel

FILE = "the file"  # name of an uploaded file in messages
Kind = Literal["json", "text"]


def routes(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/audio/transcriptions")
    async def transcriptions(
        http: HttpRequest,
        file: UploadFile,
        model: Annotated[str, Form()],
        response_format: Annotated[Kind, Form()] = "json",
        language: Annotated[str | None, Form()] = None,
        temperature: Annotated[float, Form(ge=0, le=1)] = 0,
    ) -> Response:
        served = service.model(model)
        given = {"language": language} | ({"temperature": temperature, "do_sample": True} if temperature else {})
        plan = await service.planned(_plan, service, served, await file.read(), given)
        record = record_of(http)
        sequences = Sequences(served, plan, record, service.limits.max_new_tokens + 1, service.limits, False)
        try:
            text = await unless_gone(http.receive, _text(sequences))
        finally:
            sequences.cancel()
        if text is None:
            return Response(status_code=499)
        return PlainTextResponse(f"{text}\n") if response_format == "text" else JSONResponse({"text": text})

    return router


async def _text(sequences: Sequences) -> str:
    """Return the whole text of one sequence."""
    parts: list[Delta] = []
    async for deltas in sequences.deltas():
        parts += deltas
    return Delta.joined(parts).text.strip()


def _plan(service: Service, served: ServedModel, content: bytes, given: dict[str, Any]) -> Plan:
    """Return what an uploaded file asks of the model."""
    if served.extractor is None:
        raise invalid(f"the model {served.name} takes text: use /v1/completions", "model")
    if given["language"] is not None and "language" not in option_names(served.model.config):
        raise invalid(f"language: {served.name} knows one language only", "language")
    generation = options.checked(given, served, service.limits)
    samples = _samples(content, served)
    inputs = audio.encode(served.extractor, [samples])
    requests = service.requests(served, [inputs], generation)
    return Plan(requests, param="file")


def _samples(content: bytes, served: ServedModel) -> np.ndarray[Any, Any]:
    """Return the samples of an uploaded file, [samples]. Raises `ApiError` if it isn't sound that the model takes."""
    file, rate, limit = io.BytesIO(content), served.extractor.sampling_rate, served.extractor.chunk_length
    try:
        seconds = audio.seconds(file, FILE)  # from the header: a small file can hold hours of silence
        if seconds > limit:
            message = f"file: the sound lasts {seconds:.1f} s, and {served.name} takes {limit} s at once: cut it"
            raise too_long(message, "file")
        return audio.read(file, rate, FILE)
    except AccelError as error:
        raise invalid(f"file: {error}", "file") from error
