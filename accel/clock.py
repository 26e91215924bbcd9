"""Times one generation from outside, without touching the model's code."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor

from accel.generation import AcceleratedModel, Generates


@dataclass
class Timing:
    """One generation, in seconds.

    `latencies` holds one entry a generated token: from the end of the decoder call before it (the start of the
    generation for the first, encoder included) to the end of its own. `inside` is the part of `total` spent in the
    model's calls; the rest is the decoding loop of transformers.
    """

    total: float = 0.0
    inside: float = 0.0
    latencies: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


class Clock:
    """Context that times the calls of a model's encoder and decoder."""

    def __init__(self, model: Generates) -> None:
        self.timing = Timing()
        self._synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
        encoder = (model.runtime, "encode") if isinstance(model, AcceleratedModel) else (model.get_encoder(), "forward")
        self._calls = (encoder, (model, "forward"))

    def __enter__(self) -> Timing:
        for number, (owner, name) in enumerate(self._calls):
            setattr(owner, name, self._timed(getattr(owner, name), decoder=number == 1))
        self._synchronize()
        self._last = self._start = time.perf_counter()
        return self.timing

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._synchronize()
        self.timing.total = time.perf_counter() - self._start
        for owner, name in self._calls:
            delattr(owner, name)  # the class's own method shows again

    def _timed(self, call: Callable[..., Any], *, decoder: bool) -> Callable[..., Any]:
        @wraps(call)  # `generate` reads the signature
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            self._synchronize()
            ended = time.perf_counter()
            self.timing.inside += ended - started
            if decoder:
                self.timing.latencies.append(ended - self._last)
                self._last = ended
            return result

        return timed


class OtherLoad:
    """Context that measures how busy everything but this process kept the processor: `share`, from 0 to 1.

    Threads that wait by spinning, as PyTorch's and ONNX Runtime's do, take many times longer when they lack a core.
    """

    def __enter__(self) -> "OtherLoad":
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
        """Seconds of all cores since the start of the system, and those not idle and not this process's."""
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        total = sum(times[:8])  # user to steal; what follows is counted in user already
        return total, total - times.idle - getattr(times, "iowait", 0.0) - own.user - own.system


def forced(new_tokens: int, num_beams: int, *, use_cache: bool) -> dict[str, Any]:
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
    with torch.inference_mode(), Clock(model) as timing:
        ids = model.generate(**inputs, **options)
    timing.tokens = ids.tolist()
    return timing
