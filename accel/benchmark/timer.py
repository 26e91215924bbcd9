"""Timing of one generation from outside, without changes to the model's code."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from types import TracebackType
from typing import Any, TypeAlias

import psutil
import torch
from torch import Tensor

from accel.config.engines import INDUCTOR
from accel.models.generation import AcceleratedModel, Generates

Method: TypeAlias = Callable[..., Any]

Patch: TypeAlias = "tuple[Any, str, Callable[[Method], Method]]"
"""An object, the name of one of its methods, and the wrapper that replaces the method meanwhile."""

Timestamp: TypeAlias = Any
"""Seconds of the host's clock as a float, or an event on a CUDA stream."""


@dataclass
class Timing:
    """One generation. All times are in seconds.

    On CUDA, `latencies` and `inside` are the device's: times between the moments when it reached the events that the
    host recorded around the calls. Where the host is the slower one, they include the device's waiting for it, inside
    the calls and between them.

    Attributes:
        total: Wall-clock time; the device is synchronized at both ends.
        inside: Part of `total` spent in the model's calls, with the selection of the next ids where the runtime does
            both at once. The rest is the decoding loop.
        latencies: One entry per generated token: the time from the end of the previous decoder call (for the first
            token from the start of the generation, encoder included) to the end of its own.
        tokens: Generated ids, per sequence.
        compiled: Whether PyTorch's compiler compiled the decoder.
        engine: What computed decode steps of one token: see `accel.runtime.protocol.Runtime`. None for PyTorch, unless
            it runs under accel's decoding loops.
    """

    total: float = 0.0
    inside: float = 0.0
    latencies: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    compiled: bool = False
    engine: str | None = None


class GenerationTimer:
    """Context that times the calls of a model's encoder and decoder.

    Of an accelerated model it wraps the methods of the runtime. PyTorch's decoder calls are not wrapped, because the
    wrapper would become part of the graph that `torch.compile` makes of them. Instead it wraps two methods that
    `generate` calls right before and right after each decoder call, and never compiles.

    Nothing synchronizes with the device during the generation: on CUDA a timestamp is an event, read at the end.

    Args:
        model: The model. Its methods are replaced within the context, and restored at the end.
    """

    def __init__(self, model: Generates) -> None:
        self.timing = Timing()
        self._device = torch.device(model.device)
        self._calls: list[tuple[Timestamp, Timestamp]] = []  # start and end of each call of the encoder or decoder
        self._decoder_ends: list[Timestamp] = []
        self._in_call = False
        if isinstance(model, AcceleratedModel):
            self._patches = self._runtime_patches(model)
            self.timing.engine = model.runtime.engine
            self.timing.compiled = model.runtime.engine == INDUCTOR
        else:
            self._patches = self._torch_patches(model)

    def _runtime_patches(self, model: AcceleratedModel) -> list[Patch]:
        """Return the patches of an accelerated model's runtime."""
        return [
            (model.runtime, "encode", self._time_call),
            (model.runtime, "prefill", self._time_decoder_call),
            (model.runtime, "decode", self._time_decoder_call),
            (model.runtime, "decode_and_select", self._time_decoder_call),
        ]

    def _torch_patches(self, model: Generates) -> list[Patch]:
        """Return the patches of a PyTorch model."""
        patches: list[Patch] = [
            (model, "prepare_inputs_for_generation", self._mark_decoder_start),
            (model, "_update_model_kwargs_for_generation", self._mark_decoder_end),
        ]
        if model.config.is_encoder_decoder:
            patches.append((model.get_encoder(), "forward", self._time_call))
        if hasattr(model, "get_compiled_call"):
            patches.append((model, "get_compiled_call", self._note_compilation))
        return patches

    def __enter__(self) -> Timing:
        for owner, name, wrapper in self._patches:
            setattr(owner, name, wrapper(getattr(owner, name)))
        self._synchronize()
        self._first = self._timestamp()
        self._start = time.perf_counter()
        return self.timing

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, _ in self._patches:
            delattr(owner, name)  # the instance attribute hid the class's own method
        if error is not None:
            return
        self._synchronize()
        self.timing.total = time.perf_counter() - self._start
        self.timing.inside = sum(_seconds(start, end) for start, end in self._calls)
        self.timing.latencies = [_seconds(start, end) for start, end in pairwise([self._first, *self._decoder_ends])]

    def _synchronize(self) -> None:
        """Wait until the device is idle."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _timestamp(self) -> Timestamp:
        """Return the time now; on CUDA, an event that the device records when it gets there."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _time_call(self, method: Method, ends: list[Timestamp] | None = None) -> Method:
        """Wrap a method so that its calls are timed, and add the end of each to `ends`.

        A call within another one, such as those for the chunks of a prompt, is part of that one.
        """

        @wraps(method)  # `generate` inspects the signature, here and below
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._in_call:
                return method(*args, **kwargs)
            self._in_call = True
            start = self._timestamp()
            try:
                result = method(*args, **kwargs)
            finally:
                self._in_call = False
            if result is None:  # the runtime has done nothing
                return None
            end = self._timestamp()
            self._calls.append((start, end))
            if ends is not None:
                ends.append(end)
            return result

        return timed

    def _time_decoder_call(self, method: Method) -> Method:
        """Wrap a method that computes one token, so that its calls are timed."""
        return self._time_call(method, self._decoder_ends)

    def _mark_decoder_start(self, prepare: Method) -> Method:
        """Wrap the method that `generate` calls right before a decoder call."""

        @wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            self._decoder_start = self._timestamp()
            return result

        return prepared

    def _mark_decoder_end(self, update: Method) -> Method:
        """Wrap the method that `generate` calls right after a decoder call."""

        @wraps(update)
        def updated(*args: Any, **kwargs: Any) -> Any:
            end = self._timestamp()
            self._calls.append((self._decoder_start, end))
            self._decoder_ends.append(end)
            return update(*args, **kwargs)

        return updated

    def _note_compilation(self, compiled_call: Method) -> Method:
        """Wrap the method that `generate` calls when it compiles the decoder."""

        @wraps(compiled_call)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.timing.compiled = True
            return compiled_call(*args, **kwargs)

        return noted


def _seconds(start: Timestamp, end: Timestamp) -> float:
    """Return the seconds between two timestamps."""
    seconds: float = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
    return seconds


class BackgroundLoad:
    """Context that measures how busy all processes but this one and its children keep the processor.

    Threads that wait by spinning, as PyTorch's and ONNX Runtime's do, take many times longer when they lack a core.

    Attributes:
        share: Share of the processor time of all cores, 0 to 1.
    """

    def __enter__(self) -> "BackgroundLoad":
        self.share = 0.0
        self._before = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        total_before, others_before = self._before
        total_after, others_after = self._read()
        total = total_after - total_before
        self.share = min(1.0, max(0.0, (others_after - others_before) / total)) if total else 0.0

    @staticmethod
    def _read() -> tuple[float, float]:
        """Return seconds of all cores since boot: in total, and those spent in other processes."""
        times, own = psutil.cpu_times(), 0.0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with suppress(psutil.Error):  # the child may have ended meanwhile
                own += sum(process.cpu_times()[:4])  # user and system, its own and those of children that ended
        total = sum(times[:8])  # user to steal; the further fields are already counted in user and nice
        return total, total - times.idle - getattr(times, "iowait", 0.0) - own


def fixed_length_options(new_tokens: int, num_beams: int, *, use_cache: bool) -> dict[str, Any]:
    """Return options of `generate` for exactly `new_tokens` tokens: no end-of-sequence token may come earlier."""
    return {
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "num_beams": num_beams,
        "do_sample": False,
        "use_cache": use_cache,
    }


def time_generation(model: Generates, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Timing:
    """Time one generation.

    Args:
        model: The model.
        inputs: Inputs of `generate`, [batch, source], on the model's device.
        options: Options of `generate`.
    """
    with GenerationTimer(model) as timing:
        ids = model.generate(**inputs, **options)
    timing.tokens = ids.tolist()
    return timing
