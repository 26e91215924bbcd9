"""The table in docs/engine.md of what is fused in each family's decode step."""

import os
from collections import Counter
from itertools import dropwhile, islice, takewhile
from pathlib import Path

from filelock import FileLock

from accel.engine.planning.ancestry import by_ancestry
from accel.engine.planning.buffers import steps
from accel.engine.planning.plan import DOMAIN, Plan
from accel.engine.planning.trace import NoMatchError
from tests.families import FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "engine.md"
WRITE = "ACCEL_WRITE_DOCS"  # environment variable: if it is set, tests write what they measure
HEADER = (
    "| family | fused operations | nodes in torch | bytes fused | beams | operators in torch | not fused, and why |"
)
NAMED = 5  # operators that a row names


def row(family: str, plan: Plan) -> str:
    """Return a family's row."""
    coverage = plan.coverage()
    nodes = steps(plan.graph)
    operators = Counter(node.kind[1] for node in nodes if node.kind[0] != DOMAIN)
    common = sorted(operators.items(), key=lambda item: (-item[1], item[0]))[:NAMED]
    left = ", ".join(f"{count} {name}" for name, count in common)
    more = len(operators) - len(common)
    reasons = Counter(_shortened(reason) for reason in plan.misses.values())
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(2)) or "-"
    cells = (
        family,
        sum(node.kind[0] == DOMAIN for node in nodes),
        coverage["torch_nodes"],
        f"{coverage['fused_share']:.0%}",
        "by table" if _reads_by_table(plan) else "copied",
        f"{left}{f' and {more} others' if more else ''}",
        why,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _reads_by_table(plan: Plan) -> bool:
    """Return whether beams are reordered without copies of cache entries."""
    try:
        by_ancestry(plan)
    except NoMatchError:
        return False
    return True


def _shortened(reason: str) -> str:
    """Return a reason without names of values, which exporters number."""
    return "its shape depends on data" if "depends on data" in reason else reason


def documented() -> dict[str, str]:
    """Return the rows of the table by family."""
    lines = iter(PAGE.read_text().splitlines())
    rows = takewhile(bool, islice(dropwhile(lambda line: line != HEADER, lines), 2, None))
    return {line.split("|")[1].strip(): line for line in rows}


def check(family: str, plan: Plan) -> None:
    """Compare a family's row with the table, or write it there, see `WRITE`."""
    if os.environ.get(WRITE):
        with FileLock(f"{PAGE}.lock"):
            table = documented()
            after = PAGE.read_text().split(HEADER)[1].split("\n\n", 1)[1]
            table[family] = row(family, plan)
            rows = "\n".join(table[name] for name in FAMILIES if name in table)
            before = PAGE.read_text().split(HEADER)[0]
            PAGE.write_text(f"{before}{HEADER}\n|---|---|---|---|---|---|---|\n{rows}\n\n{after}")
        Path(f"{PAGE}.lock").unlink(missing_ok=True)
    assert documented().get(family) == row(family, plan), f"run this test with {WRITE}=1 to write it"
