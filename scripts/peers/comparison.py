"""What is compared: workloads, the order of turns, agreement of tokens, and the table."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.peers.libraries import Ids
from scripts.peers.worker import WorkerError

PAUSE_S = 0.3  # between two generations: idle threads of a library spin for a while before they sleep


@dataclass(frozen=True)
class Workload:
    """One way to generate from a model.

    Attributes:
        name: For the table.
        batch: Number of sequences.
        beams: Beams of each.
        source: Tokens of each source or prompt.
        new_tokens: New tokens of each.
    """

    name: str
    batch: int
    beams: int
    source: int
    new_tokens: int


ENCODER_DECODER = (
    Workload("greedy", 1, 1, 32, 64),
    Workload("batch 8", 8, 1, 32, 64),
    Workload("4 beams", 1, 4, 32, 64),
)
DECODER_ONLY = (Workload("prompt 64, 128 tokens", 1, 1, 64, 128),)


@dataclass
class Row:
    """One library in one precision, on one workload.

    Attributes:
        name: For the table.
        seconds: One entry per timed generation.
        tokens: New tokens of the last one.
        reason: Why it couldn't take part; None if it did.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    tokens: Ids = field(default_factory=list)
    reason: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the row as JSON."""
        return dict(vars(self))


def take_turns(
    generates: Mapping[str, Callable[[], tuple[float, Ids]]], repeats: int, warmup: int = 1, pause_s: float = PAUSE_S
) -> list[Row]:
    """Let all generate in turn, so that a slow minute of the machine affects each of them.

    Every round begins with the next one, so that none always follows the same neighbour's end of the round. One that
    fails is left out from then on.

    Args:
        generates: Name -> a function that generates once, and returns seconds and new tokens.
        repeats: Timed rounds.
        warmup: Rounds before them.
        pause_s: Seconds between two generations.

    Returns:
        A row for each, in their order.
    """
    rows = {name: Row(name) for name in generates}
    names = list(generates)
    for number in range(warmup + repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            row = rows[name]
            if row.reason is not None:
                continue
            time.sleep(pause_s)
            try:
                seconds, row.tokens = generates[name]()
            except WorkerError as error:
                row.reason = str(error)
                continue
            if number >= warmup:
                row.seconds.append(seconds)
    return list(rows.values())


def agreement(tokens: Ids, reference: Ids) -> float:
    """Return the share of the reference's tokens before the first one that differs, 0 to 1.

    What follows a token that differs was generated from another text, so equal tokens there say nothing.

    Args:
        tokens: New tokens, [rows][tokens].
        reference: Those of the reference, with as many rows.
    """
    equal = 0
    for ours, right in zip(tokens, reference, strict=True):
        pairs = zip(ours, right, strict=False)
        equal += next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(right)))
    return equal / sum(map(len, reference))


def table(workload: Workload, rows: Sequence[Row], reference: str) -> str:
    """Return a table in Markdown.

    Args:
        workload: What was generated.
        rows: What was measured.
        reference: Name of the row that times and tokens are compared with.
    """
    by_name = {row.name: row for row in rows}
    base = by_name[reference]
    lines = [
        f"| {workload.name} | seconds, median [min to max] | x {reference} | tokens before the first difference |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row.reason is not None:
            lines.append(f"| {row.name} | not measured: {row.reason.replace('|', '/')} | | |")
            continue
        median = statistics.median(row.seconds)
        spread = f"{median:.3g} [{min(row.seconds):.3g} to {max(row.seconds):.3g}]"
        ratio = same = ""
        if base.reason is None:
            ratio = f"{statistics.median(base.seconds) / median:.2f}"
            same = f"{agreement(row.tokens, base.tokens):.0%}"
            if {len(tokens) for tokens in row.tokens} != {workload.new_tokens}:
                same += f", generated {sorted({len(tokens) for tokens in row.tokens})} tokens: not comparable"
        lines.append(f"| {row.name} | {spread} | {ratio} | {same} |")
    return "\n".join(lines)
