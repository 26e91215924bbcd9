"""What a person sees: notes, warnings, progress and tables. Everything goes to standard error but final results."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

T = TypeVar("T")

FILE_WIDTH = 120  # columns, where no terminal says otherwise


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else FILE_WIDTH
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width)


out = _console(stderr=False)
err = _console(stderr=True)
_current: list[tuple[Progress, str]] = []


def note(message: str) -> None:
    err.print(message, style="dim", markup=False)


def warn(message: str) -> None:
    err.print(message, style="yellow", markup=False)


def fail(message: str, lines: int = 12) -> None:
    """Print an error, at most `lines` lines of it."""
    kept = message.strip().splitlines()
    if len(kept) > lines:
        kept = [*kept[: lines - 1], f"... {len(kept) - lines + 1} more lines"]
    err.print("\n".join(kept), style="red", markup=False)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Show that stage `name` is at work. On a terminal: a spinner; elsewhere: one line."""
    if not err.is_terminal:
        note(f"{name} …")
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.fields[stage]:<10}"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        _current.append((progress, name))
        try:
            yield
        finally:
            _current.pop()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, and show how far it is within the stage at work."""
    if not _current:
        yield from items
        return
    progress, name = _current[-1]
    count = total if total is not None else len(items) if isinstance(items, Sequence) else None
    task = progress.add_task(description, total=count, stage=name)
    try:
        for item in items:
            yield item
            progress.advance(task)
    finally:
        progress.remove_task(task)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to standard output; the first column names the row."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index else "left")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    out.print(drawn)
