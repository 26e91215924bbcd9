"""Output of the command line: results on standard output; progress, log records and errors on standard error."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from accel import progress

T = TypeVar("T")

FILE_WIDTH = 120  # columns, where the output is not a terminal
LINE_INTERVAL = 5.0  # seconds: outside a terminal, items that begin sooner after the last line get none
STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


def _console(stderr: bool) -> Console:
    """Open a console on standard error or standard output."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else FILE_WIDTH
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width)


out = _console(stderr=False)
err = _console(stderr=True)


def fail(message: str, lines: int = 12) -> None:
    """Print an error message to standard error, cut to `lines` lines."""
    shown = message.strip().splitlines()
    if len(shown) > lines:
        shown = [*shown[: lines - 1], f"... {len(shown) - lines + 1} more lines"]
    err.print("\n".join(shown), style="red", markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], text_columns: int = 1) -> None:
    """Print a table to standard output: the first `text_columns` columns flush left, the others flush right."""
    rich_table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        rich_table.add_column(column, justify="left" if index < text_columns else "right")
    for row in rows:
        rich_table.add_row(*(str(cell) for cell in row))
    out.print(rich_table)


class Terminal:
    """Progress listener: a spinner and a bar on a terminal; elsewhere plain lines, at most one in `LINE_INTERVAL`."""

    def __init__(self) -> None:
        self._running: list[tuple[Progress, str]] = []  # the stages in progress, innermost last
        self._started = self._last_line = 0.0  # when the innermost stage and the last line began, `time.monotonic`

    def note(self, message: str) -> None:
        """Print one line."""
        err.print(message, style="dim", markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show that stage `name` is running, for the duration of the context."""
        if not err.is_terminal:
            self.note(f"{name} …")
            self._started, self._last_line = time.monotonic(), 0.0
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[stage]:<10}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as display:
            self._running.append((display, name))
            try:
                yield
            finally:
                self._running.pop()

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yield `items` and advance a bar under the innermost running stage; without a terminal, print lines.

        Args:
            items: The items to process; a text, or a tuple that begins with one, names its item in a line.
            description: Label of the bar.
            total: Number of items; by default that of `items`, if it is a sequence.
        """
        if not self._running:
            yield from items
            return
        display, name = self._running[-1]
        if total is None and isinstance(items, Sequence):
            total = len(items)
        task = display.add_task(description, total=total, stage=name)
        try:
            for number, item in enumerate(items, 1):
                if not err.is_terminal:
                    self._line(name, description, item, f"{number} of {total}" if total is not None else f"{number}")
                yield item
                display.advance(task)
        finally:
            display.remove_task(task)

    def _line(self, stage: str, description: str, item: Any, count: str) -> None:
        """Print which item of a stage begins, unless another line was printed a moment ago."""
        now = time.monotonic()
        first = item[0] if isinstance(item, tuple) and item else item
        label = f" {first}" if isinstance(first, str) else ""
        if now - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            self.note(f"{stage:<10} {description}{label}, {count}, after {now - self._started:.0f} s")


class LogHandler(logging.Handler):
    """Log handler that prints records to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print `record` in the colour of its level."""
        level = max((level for level in STYLES if level <= record.levelno), default=logging.INFO)
        err.print(self.format(record), style=STYLES.get(level, "dim"), markup=False)


def install(verbose: Any = False) -> None:
    """Show progress, and print the log records of the package `accel`.

    Args:
        verbose: Value of `hydra.verbose`. False: warnings and errors only; true: also level INFO; a name of a logger or
            a list of names: also level DEBUG of these loggers.
    """
    progress.install(Terminal())
    log = logging.getLogger("accel")
    log.handlers = [LogHandler()]
    log.propagate = False
    log.setLevel(logging.INFO if verbose is True else logging.WARNING)
    if isinstance(verbose, bool):
        return
    names = [verbose] if isinstance(verbose, str) else verbose or ()
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
