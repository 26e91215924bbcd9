"""Times one generation from outside, without touching the model's code."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from types import TracebackType
from typing import Any, TypeAlias

import psutil
import torch
from torch import Tensor

from accel.models.generation import AcceleratedModel, Generates

Patch: TypeAlias = "tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]"
"""Whose method of which name, and what stands in for it meanwhile."""

Stamp: TypeAlias = Any
"""A moment: seconds of the host's clock as a float, or an event on a CUDA stream."""


@dataclass
class Timing:
    """One generation, in seconds.

    `total` is wall clock, the device done at both ends. `latencies` holds one entry a generated token: from the end
    of the decoder call before it (the start of the generation for the first, encoder included) to the end of its own.
    `inside` is the part of `total` spent in the model's calls; the rest is the decoding loop of transformers.
    `compiled`: transformers compiled the decoder.

    On CUDA, `latencies` and `inside` are of the device: the time between the moments when it got to the marks that the
    host had queued around the calls. While the host is the slower one, the device waits for it, inside and outside.
    """

    total: float = 0.0
    inside: float = 0.0
    latencies: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    compiled: bool = False


class GenerationTimer:
    """Context that times the calls of a model's encoder and decoder.

    Of a model of ours, the calls of its runtime. PyTorch's decoder calls are not wrapped, because wrapping would end up
    in the graph that `torch.compile` makes of them: `generate` calls two methods right before and right after each,
    which it never compiles, and those take the stamps.
    Nothing waits for the device in between: on CUDA a stamp is an event, read when all is done.
    """

    def __init__(self, model: Generates) -> None:
        self.timing = Timing()
        self._device = torch.device(model.device)
        self._calls: list[tuple[Stamp, Stamp]] = []  # start and end of each call of the model
        self._ends: list[Stamp] = []  # of decoder calls
        self._patches = self._of_ours(model) if isinstance(model, AcceleratedModel) else self._of_pytorchs(model)

    def _of_ours(self, model: AcceleratedModel) -> list[Patch]:
        decoder = [(model.runtime, name, self._ending) for name in ("prefill", "decode")]
        return [(model.runtime, "encode", self._timed), *decoder]

    def _of_pytorchs(self, model: Generates) -> list[Patch]:
        patches: list[Patch] = [
            (model, "prepare_inputs_for_generation", self._begins_after),
            (model, "_update_model_kwargs_for_generation", self._ended_before),
        ]
        if model.config.is_encoder_decoder:
            patches.append((model.get_encoder(), "forward", self._timed))
        if hasattr(model, "get_compiled_call"):
            patches.append((model, "get_compiled_call", self._noted))
        return patches

    def __enter__(self) -> Timing:
        for owner, name, patch in self._patches:
            setattr(owner, name, patch(getattr(owner, name)))
        self._synchronize()
        self._first = self._stamp()
        self._start = time.perf_counter()
        return self.timing

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, _ in self._patches:
            delattr(owner, name)  # the class's own method shows again
        if error is not None:
            return
        self._synchronize()
        self.timing.total = time.perf_counter() - self._start
        self.timing.inside = sum(_seconds(start, end) for start, end in self._calls)
        starts = [self._first, *self._ends]
        self.timing.latencies = [_seconds(start, end) for start, end in zip(starts, self._ends, strict=False)]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _stamp(self) -> Stamp:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)  # `generate` reads the signature, here and below
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._stamp()
            result = call(*args, **kwargs)
            self._calls.append((start, self._stamp()))
            return result

        return timed

    def _ending(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call that a token comes out of."""
        timed = self._timed(call)

        @wraps(call)
        def ended(*args: Any, **kwargs: Any) -> Any:
            result = timed(*args, **kwargs)
            self._ends.append(self._calls[-1][1])
            return result

        return ended

    def _begins_after(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            self._begun = self._stamp()
            return result

        return prepared

    def _ended_before(self, update: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(update)
        def updated(*args: Any, **kwargs: Any) -> Any:
            end = self._stamp()
            self._calls.append((self._begun, end))
            self._ends.append(end)
            return update(*args, **kwargs)

        return updated

    def _noted(self, compiled_call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(compiled_call)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.timing.compiled = True
            return compiled_call(*args, **kwargs)

        return noted


def _seconds(start: Stamp, end: Stamp) -> float:
    seconds: float = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
    return seconds


class BackgroundLoad:
    """Context that measures how busy everything but this process and its children kept the processor: `share`, 0 to 1.

    Threads that wait by spinning, as PyTorch's and ONNX Runtime's do, take many times longer when they lack a core.
    """

    def __enter__(self) -> "BackgroundLoad":
        self.share = 0.0
        self._before = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        total, others = (after - before for after, before in zip(self._read(), self._before, strict=True))
        self.share = min(1.0, max(0.0, others / total)) if total else 0.0

    @staticmethod
    def _read() -> tuple[float, float]:
        """Seconds of all cores since the start of the system, and those not idle and not ours."""
        times, own = psutil.cpu_times(), 0.0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with suppress(psutil.Error):  # it has ended meanwhile
                own += sum(process.cpu_times()[:4])  # its own, and those of children that ended
        total = sum(times[:8])  # user to steal; what follows is counted in user already
        return total, total - times.idle - getattr(times, "iowait", 0.0) - own


def fixed_length_options(new_tokens: int, num_beams: int, *, use_cache: bool) -> dict[str, Any]:
    """Options of `generate` for exactly `new_tokens` tokens: no end-of-sequence token may come before."""
    return {
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "num_beams": num_beams,
        "do_sample": False,
        "use_cache": use_cache,
    }


def time_generation(model: Generates, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Timing:
    """Generate once for `inputs` [batch, source], which must be on the model's device."""
    with GenerationTimer(model) as timing:
        ids = model.generate(**inputs, **options)
    timing.tokens = ids.tolist()
    return timing
