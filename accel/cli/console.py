"""The command line's output: progress, log records, errors and tables. All but results goes to standard error."""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from accel import progress

T = TypeVar("T")

FILE_WIDTH = 120  # columns, where no terminal says otherwise
STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else FILE_WIDTH
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width)


out = _console(stderr=False)
err = _console(stderr=True)


def fail(message: str, lines: int = 12) -> None:
    """Print an error, at most `lines` lines of it."""
    kept = message.strip().splitlines()
    if len(kept) > lines:
        kept = [*kept[: lines - 1], f"... {len(kept) - lines + 1} more lines"]
    err.print("\n".join(kept), style="red", markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to standard output; the first column names the row."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index else "left")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    out.print(drawn)


class Terminal:
    """Shows progress: on a terminal by a spinner and a bar, elsewhere by one line a stage."""

    def __init__(self) -> None:
        self._current: list[tuple[Progress, str]] = []

    def note(self, message: str) -> None:
        err.print(message, style="dim", markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if not err.is_terminal:
            self.note(f"{name} …")
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[stage]:<10}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as shown:
            self._current.append((shown, name))
            try:
                yield
            finally:
                self._current.pop()

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        if not self._current:
            yield from items
            return
        shown, name = self._current[-1]
        count = total if total is not None else len(items) if isinstance(items, Sequence) else None
        task = shown.add_task(description, total=count, stage=name)
        try:
            for item in items:
                yield item
                shown.advance(task)
        finally:
            shown.remove_task(task)


class LogHandler(logging.Handler):
    """Prints log records to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        level = max((level for level in STYLES if level <= record.levelno), default=logging.INFO)
        err.print(self.format(record), style=STYLES.get(level, "dim"), markup=False)


def install(verbose: Any = False) -> None:
    """Show progress and the log of the package `accel`: warnings always, and more where `verbose` asks for it.

    `verbose` is Hydra's: true for level INFO, or the names of loggers, which show DEBUG then.
    """
    progress.install(Terminal())
    log = logging.getLogger("accel")
    log.handlers = [LogHandler()]
    log.propagate = False
    log.setLevel(logging.INFO if verbose is True else logging.WARNING)
    names = [] if isinstance(verbose, bool) else [verbose] if isinstance(verbose, str) else list(verbose or ())
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
