"""Measure a scheduler under load: a closed loop of clients with mixed lengths, beside one request at a time.

    python -m scripts.scheduler_load DEPLOYABLE [--clients 32] [--requests 256] [--new-tokens 8 40] [--rounds 3]

Each client submits a request, waits for its last token, and submits the next one. Direct calls of `generate`, one at a
time, and the scheduler take turns, so that both see the same machine. Prints the throughput of both and its ratio, the
latency of a lone client beside that of a direct call, and how many requests have the tokens of the direct call.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from accel import load
from accel.models import arguments
from accel.models.generation import AcceleratedModel
from accel.serve.protocol import Event, Finished, Request, Scheduler, Tokens
from accel.serve.scheduling.batch_scheduler import BatchScheduler
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.opening import open_scheduler

Item = TypeVar("Item")
Result = TypeVar("Result")

Work: TypeAlias = tuple[Tensor, dict[str, Any]]
"""A prompt [1, length] and options of GenerationConfig."""

Answer: TypeAlias = Callable[[Work], list[int]]
"""Function that answers a request with its new tokens."""


@dataclass(frozen=True)
class Load(Generic[Result]):
    """What one round measured.

    Attributes:
        seconds: Duration of the round.
        replies: What each request was answered with.
        latencies: Seconds of each request.
    """

    seconds: float
    replies: list[Result]
    latencies: list[float]

    @property
    def requests_per_second(self) -> float:
        """Throughput in requests."""
        return len(self.replies) / self.seconds


def run_clients(answer: Callable[[Item], Result], work: Sequence[Item], clients: int) -> Load[Result]:
    """Let clients answer all requests, each one after the other.

    Args:
        answer: Called in the threads of the clients.
        work: The requests.
        clients: Number of threads.
    """
    replies: dict[int, Result] = {}
    latencies = [0.0 for _ in work]
    errors: list[Exception] = []
    numbers = iter(range(len(work)))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None or errors:
                return
            start = time.perf_counter()
            try:
                replies[number] = answer(work[number])
            except Exception as error:  # raised again in the thread of the caller
                errors.append(error)
                return
            latencies[number] = time.perf_counter() - start

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    return Load(seconds, [replies[number] for number in range(len(work))], latencies)


def tokens_per_second(load: Load[list[int]]) -> float:
    """Return the throughput in new tokens."""
    return sum(map(len, load.replies)) / load.seconds


def through(scheduler: Scheduler) -> Answer:
    """Return a function that answers a request through a scheduler."""

    def answer(work: Work) -> list[int]:
        prompt, options = work
        done = threading.Event()
        ids: list[int] = []

        def listen(event: Event) -> None:
            if isinstance(event, Tokens):
                ids.extend(event.ids)
            elif isinstance(event, Finished):
                done.set()

        scheduler.submit(Request({"input_ids": prompt}, options), listen)
        done.wait()
        return ids

    return answer


def direct(model: AcceleratedModel) -> Answer:
    """Return a function that answers a request by `generate`."""

    def answer(work: Work) -> list[int]:
        prompt, options = work
        start = 1 if model.config.is_encoder_decoder else prompt.shape[1]
        ids: list[int] = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, start:].tolist()
        return ids

    return answer


def mixed_work(
    model: AcceleratedModel, count: int, prompts: tuple[int, int], new_tokens: tuple[int, int]
) -> list[Work]:
    """Return `count` random prompts and options, lengths and numbers of new tokens being uniform between the bounds."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(arguments.vocabulary_sizes(model.config))
    work = []
    for _ in range(count):
        length, new = (
            int(torch.randint(low, high + 1, (), generator=generator)) for low, high in (prompts, new_tokens)
        )
        prompt = torch.randint(3, vocabulary, (1, length), generator=generator)
        work.append((prompt, {"max_new_tokens": new}))
    return work


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deployable", type=Path)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256, help="a round")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(4, 24), help="fewest and most")
    parser.add_argument("--new-tokens", type=int, nargs=2, default=(8, 40), help="fewest and most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--padded", action="store_true", help="padded batches, where rows are possible as well")
    return parser.parse_args()


def main() -> None:
    """Run the rounds and print a table."""
    options = parse_arguments()
    with load(options.deployable, options.runtime, static=not options.padded) as model:
        limits = SchedulerLimits(rows=options.clients)
        scheduler = BatchScheduler(model, limits) if options.padded else open_scheduler(model, limits)
        scheduler.warm_up()
        work = mixed_work(model, options.requests, options.prompt_tokens, options.new_tokens)
        alone, served = direct(model), through(scheduler)
        run_clients(alone, work[:8], 1)
        run_clients(served, work, options.clients)
        ratios = []
        print(f"{type(scheduler).__name__}, {options.clients} clients")
        for number in range(options.rounds):
            one, many = run_clients(alone, work, 1), run_clients(served, work, options.clients)
            ratios.append(many.requests_per_second / one.requests_per_second)
            equal = sum(ours == right for ours, right in zip(many.replies, one.replies, strict=True))
            print(
                f"round {number + 1}: one at a time {one.requests_per_second:7.1f} requests/s, "
                f"{tokens_per_second(one):8.1f} tokens/s; served {many.requests_per_second:7.1f} and "
                f"{tokens_per_second(many):8.1f}, {ratios[-1]:.2f} times; {equal} of {len(work)} equal",
                flush=True,
            )
        latencies: dict[str, list[float]] = {"direct": [], "lone client": []}
        for each in work[: min(len(work), 64)]:
            latencies["direct"] += run_clients(alone, [each], 1).latencies
            latencies["lone client"] += run_clients(served, [each], 1).latencies
        medians = {name: statistics.median(values) * 1e3 for name, values in latencies.items()}
        print(
            f"throughput: {statistics.median(ratios):.2f} times one request at a time, median of {len(ratios)} rounds\n"
            f"p50 latency of a lone client {medians['lone client']:.2f} ms, of a direct call {medians['direct']:.2f} ms"
        )
        scheduler.close()


if __name__ == "__main__":
    main()
