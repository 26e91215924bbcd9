"""A request that `generate` runs by itself, such as beam search; it is stopped when it is cancelled."""

import random
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from accel.models.decoding.step_observer import StepObserver
from accel.models.generation import AcceleratedModel
from accel.serve.protocol import FinishReason, Tokens
from accel.serve.scheduling.job import Job
from accel.serve.scheduling.token_selection import logprobs_of

# `generate` draws from torch's own generator, which the threads of all models share.
_random_numbers = threading.Lock()


def on_device(model: AcceleratedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs of `generate` on the model's device. Every token counts where no mask is given."""
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if model.main_input_name == "input_ids":
        placed.setdefault("attention_mask", torch.ones_like(placed["input_ids"]))
    return placed


def generate_alone(model: AcceleratedModel, job: Job, between: Callable[[], None]) -> None:
    """Run a request by `generate`, and report its tokens and its end.

    Tokens are reported as they are selected; those of beams and of speech, and with log probabilities, at the end.

    Args:
        model: The model.
        job: The request.
        between: Called behind each step.
    """
    request, sequence = job.request, job.sequence
    config = sequence.config
    text = model.main_input_name == "input_ids"
    streams = text and (config.num_beams or 1) == 1 and request.logprobs is None

    def observe(next_ids: Tensor) -> bool:
        if streams:
            report(job, next_ids[0].tolist())
        between()
        return job.finished or job.reason_to_end is not None

    options: dict[str, Any] = dict(request.generation)
    if request.logits_processor is not None:
        options["logits_processor"] = LogitsProcessorList([request.logits_processor])
    if request.logprobs is not None:
        options |= {"return_dict_in_generate": True, "output_logits": True}
    observer = StepObserver(observe, sequence.prompt_length)
    draws = bool(config.do_sample)
    with _random_numbers if draws else nullcontext():
        if draws:
            torch.manual_seed(random.getrandbits(63) if request.seed is None else request.seed)
        output = model.generate(
            **on_device(model, request.inputs), **options, stopping_criteria=StoppingCriteriaList([observer])
        )
    if job.finished:
        return
    reason = job.reason_to_end
    if reason is not None:
        job.finish(reason)
        return
    ids = getattr(output, "sequences", output)[0]
    new_ids = ids[sequence.prompt_length :].tolist() if text else ids.tolist()
    if request.logprobs is not None:
        for token, entry in zip(new_ids, logprobs_of(torch.cat(output.logits), new_ids, request.logprobs), strict=True):
            if job.add(token, (entry,)):
                return
    elif not streams:
        report(job, new_ids)
    job.finish(FinishReason.STOP if sequence.ended or not sequence.finished else FinishReason.LENGTH)


def report(job: Job, ids: list[int]) -> None:
    """Append tokens to a request's sequence, up to its end, and report them as one event."""
    new_ids: list[int] = []
    for token in ids:
        if job.sequence.finished:
            break
        job.sequence.append(token)
        new_ids.append(token)
    if new_ids:
        job.report(Tokens(tuple(new_ids)))
