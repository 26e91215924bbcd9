"""Figures that reports take from timed generations."""

import statistics
from collections.abc import Sequence

from accel.benchmark.timer import Timing

Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def token_times(
    generations: Sequence[Timing], first_tokens: Sequence[Timing], new_tokens: int
) -> dict[str, Spread | None]:
    """Compute time to first token and time per output token, in ms.

    They are defined as for servers (https://docs.nvidia.com/nim/benchmarking/llm/latest/metrics.html), with a call of
    `generate` in place of a request. A batch counts as one: with each output token, every sequence gets one.

    Args:
        generations: Timings of generations of `new_tokens` tokens per sequence.
        first_tokens: Timings of generations of one token per sequence.
        new_tokens: Tokens per sequence.

    Returns:
        `time_to_first_token_ms` (TTFT): time of a generation of one token, encoder and prefill included.
        `time_per_output_token_ms` (TPOT, also inter-token latency): the time that a generation takes beyond the median
        TTFT, over the number of tokens after the first. None if the first token is the only one.
    """
    first = spread([1000 * timing.total for timing in first_tokens])
    rest = [1000 * timing.total - first["median"] for timing in generations]
    return {
        "time_to_first_token_ms": first,
        "time_per_output_token_ms": spread([time / (new_tokens - 1) for time in rest]) if new_tokens > 1 else None,
    }
