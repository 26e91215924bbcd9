"""Measure accel's server under load over HTTP, beside the offline rate of the same model object.

    python -m scripts.serve_load DEPLOYABLE [--clients 64] [--requests 1024] [--prompt-tokens 4 24] [--new-tokens 128]
    python -m scripts.serve_load DEPLOYABLE --devices 0,1

A process loads the deployable, times `generate` over one batch of as many sequences as there are clients (the offline
rate), and then serves this model object over HTTP; on a GPU, another process answers HTTP, as in `stage=serve`. Clients
in other processes send requests of random token ids: in a closed loop (each waits for its reply before it sends the
next request), with whole replies and with streamed ones, and in an open loop, at random times (a Poisson process) at
70% of the highest rate of the closed loops. No sequence ends before its number of new tokens, and each reply is checked
to have so many. Greedy.

With several devices there are such processes for each of them, one GPU each; the first is loaded alone, then all at
once with as many clients each.

Prints a table: new tokens a second, also as a multiple of the offline rate, and p50 and p99 of latency, time to first
token (TTFT) and time per output token without the first (TPOT), as clients see them.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from accel.benchmark.process import WorkerProcess
from accel.errors import AccelError
from scripts.serve_load import clients, server
from scripts.serve_load.clients import Timing
from scripts.serve_load.server import Opened
from scripts.serve_load.workload import Work, arrival_times, random_work

OPEN_LOOP = 0.7  # of the highest rate of a closed loop
OFFLINE_REPEATS = 3
CORES_OF_CLIENTS = 4  # of the machine's for each process of clients, so that these don't limit the rate
MOST_CLIENT_PROCESSES = 4  # for each server


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: What was measured.
        tokens_per_second: New tokens a second.
        requests_per_second: Replies a second; 0 where there are no requests.
        timings: The requests.
        streamed: Whether `timings` have times of tokens.
    """

    name: str
    tokens_per_second: float
    requests_per_second: float = 0.0
    timings: Sequence[Timing] = ()
    streamed: bool = False


def row(name: str, timings: Sequence[Timing], streamed: bool) -> Row:
    """Return the row of a load."""
    seconds = max(each.end for each in timings) - min(each.sent for each in timings)
    tokens = sum(each.tokens for each in timings)
    return Row(name, tokens / seconds, len(timings) / seconds, timings, streamed)


@dataclass(frozen=True)
class Machine:
    """A server and its clients.

    Attributes:
        processes: Processes of the server, the one that answers HTTP first.
        clients: Processes of the clients, which share the requests.
        opened: The server.
    """

    processes: Sequence[WorkerProcess]
    clients: Sequence[WorkerProcess]
    opened: Opened


def open_machines(stack: ExitStack, options: argparse.Namespace) -> tuple[list[Machine], list[float]]:
    """Start a server for each device, and clients beside it. Return them and the first one's offline rates."""
    devices = options.devices or [None]
    names = [f"server {number}" for number in range(len(devices))]
    servers = [stack.enter_context(WorkerProcess(name)) for name in names]
    opening = [
        process.submit(server.open_model, options.deployable, options.runtime, device)
        for process, device in zip(servers, devices, strict=True)
    ]
    for each in opening:
        each.result()
    longest, most = options.prompt_tokens[-1], options.new_tokens[-1]
    rates = servers[0].call(server.offline_rates, options.clients, longest, most, OFFLINE_REPEATS)
    machines = []
    cores = (os.cpu_count() or 1) // (CORES_OF_CLIENTS * len(servers))
    processes = min(max(1, cores), MOST_CLIENT_PROCESSES, options.clients)
    for process in servers:
        clients_of = [stack.enter_context(WorkerProcess(f"clients {number + 1}")) for number in range(processes)]
        limits = (options.deployable, options.clients, options.requests)
        if (options.processes or process.call(server.usual_processes)) == 1:
            machines.append(Machine([process], clients_of, process.call(server.open_server, *limits)))
            continue
        http = stack.enter_context(WorkerProcess("HTTP"))
        schedulers = process.call(server.open_schedulers, *limits)
        machines.append(Machine([http, process], clients_of, http.call(server.open_http, schedulers, *limits)))
    return machines, rates


def load(machines: Sequence[Machine], work: Sequence[Work], count: int, stream: bool) -> list[Timing]:
    """Load servers in a closed loop at once, each with the same requests by as many clients."""
    loads = []
    for each in machines:
        processes = min(count, len(each.clients))
        for number, process in enumerate(each.clients[:processes]):
            own = count // processes + (number < count % processes)
            loads.append(process.submit(clients.closed_loop, each.opened.port, work[number::processes], own, stream))
    return [timing for each in loads for timing in each.result()]


def open_loop(machine: Machine, work: Sequence[Work], arrivals: Sequence[float]) -> list[Timing]:
    """Send requests to a server at their times, and return their timings."""
    processes, port = len(machine.clients), machine.opened.port
    loads = [
        process.submit(clients.open_loop, port, work[number::processes], arrivals[number::processes])
        for number, process in enumerate(machine.clients)
    ]
    return [timing for each in loads for timing in each.result()]


def warm_up(machines: Sequence[Machine], options: argparse.Namespace) -> None:
    """Load servers with 1, 2, 4, ... and all clients, since sizes of the batch are captured when they first occur."""
    counts = [1 << power for power in range(options.clients.bit_length()) if 1 << power < options.clients]
    for count in (*counts, options.clients, options.clients):
        vocabulary = machines[0].opened.vocabulary
        work = random_work(count, vocabulary, options.prompt_tokens, options.new_tokens, seed=count)
        for stream in (False, True):
            load(machines, work, count, stream)


def measure(options: argparse.Namespace) -> None:
    """Run all loads and print the table."""
    start = time.perf_counter()
    with ExitStack() as stack:
        machines, rates = open_machines(stack, options)
        work = random_work(options.requests, machines[0].opened.vocabulary, options.prompt_tokens, options.new_tokens)
        warm_up(machines, options)
        print(
            f"{options.deployable}: {machines[0].opened.description}\n{options.clients} clients and as many rows, "
            f"{options.requests} requests of {_range(options.prompt_tokens)} prompt tokens and "
            f"{_range(options.new_tokens)} new tokens\nloaded and captured in {time.perf_counter() - start:.0f} s\n",
            flush=True,
        )
        print(HEAD)
        offline = Row(f"offline, {options.clients} rows", statistics.median(rates))
        show(offline, offline)
        rows = []
        for name, stream in (("closed loop, whole", False), ("closed loop, streamed", True)):
            rows.append(row(name, load(machines[:1], work, options.clients, stream), stream))
            show(rows[-1], offline)
        rate = OPEN_LOOP * max(each.requests_per_second for each in rows)
        arrivals = arrival_times(len(work), rate)
        timings = open_loop(machines[0], work, arrivals)
        show(row(f"open loop, {rate:.3g} requests/s", timings, True), offline)
        if len(machines) > 1:
            for alone, stream in zip(rows, (False, True), strict=True):
                together = row(
                    f"{len(machines)} devices, {alone.name.split(', ')[1]}",
                    load(machines, work, options.clients, stream),
                    stream,
                )
                show(together, offline)
                print(f"  {together.tokens_per_second / alone.tokens_per_second:.2f} times one device")
        for each in machines:
            for process in each.processes:
                process.call(server.close_server)


HEAD = (
    f"{'':32}{'tokens/s':>10}{'of offline':>12}{'requests/s':>12}{'latency p50':>14}{'p99':>9}"
    f"{'TTFT p50':>11}{'p99':>9}{'TPOT p50':>11}{'p99':>9}"
)


def show(shown: Row, offline: Row) -> None:
    """Print a row of the table; times are in milliseconds."""
    line = f"{shown.name:32}{shown.tokens_per_second:10.1f}{shown.tokens_per_second / offline.tokens_per_second:12.2f}"
    if shown.timings:
        line += f"{shown.requests_per_second:12.2f}"
        line += _quantiles([each.end - each.sent for each in shown.timings], 14)
    if shown.streamed:
        line += _quantiles([each.first_token_s for each in shown.timings], 11)
        line += _quantiles([each.token_s for each in shown.timings], 11)
    print(line, flush=True)


def _quantiles(seconds: Sequence[float], width: int) -> str:
    """Return p50 and p99 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return f"{cuts[49] * 1e3:{width}.1f}{cuts[98] * 1e3:9.1f}"


def _range(numbers: Sequence[int]) -> str:
    """Return one number, or the bounds of a range."""
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deployable", type=Path, help="folder, built with runtime.static=true, or for a GPU")
    parser.add_argument("--runtime", default="auto", help="preset; default: what the deployable was built for")
    parser.add_argument("--devices", type=lambda text: text.split(","), help="numbers of GPUs, such as 0,1")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), help="of each server; 2: one for HTTP, one that decodes, as on a GPU"
    )
    parser.add_argument("--clients", type=int, default=64, help="of each server, which has as many rows")
    parser.add_argument("--requests", type=int, default=1024, help="of each load and server; the last ones run alone")
    for name, default in (("prompt", [4, 24]), ("new", [128])):
        parser.add_argument(
            f"--{name}-tokens", type=int, nargs="+", default=default, help="a number, or fewest and most"
        )
    options = parser.parse_args(arguments)
    for name in ("clients", "requests"):
        if getattr(options, name) < 2:
            parser.error(f"--{name} {getattr(options, name)}: give at least 2")
    for name in ("prompt_tokens", "new_tokens"):
        values = getattr(options, name)
        option = f"--{name.replace('_', '-')} {' '.join(map(str, values))}"
        if len(values) > 2 or values[0] < 1 or values[-1] < values[0]:
            parser.error(f"{option}: give one number, or fewest and most, from 1 on")
        setattr(options, name, [values[0], values[-1]])
    if options.devices and not all(device.isdecimal() for device in options.devices):
        parser.error(f"--devices {','.join(options.devices)}: give numbers of GPUs, such as 0,1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement. Return the exit status."""
    try:
        measure(parse_arguments(arguments))
    except AccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
