"""Progress on standard error: plain lines where it is a file."""

from io import StringIO

import pytest
from rich.console import Console

from accel.cli import console


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    """What is written to standard error, which is a file."""
    stream = StringIO()
    monkeypatch.setattr(console, "err", Console(file=stream, soft_wrap=True, width=console.FILE_WIDTH))
    return stream


def test_items_in_a_file(written: StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first item of a stage, and each that begins long after the last line, gets a line that ends in a newline."""
    seconds = iter([100.0, 100.0, 101.0, 163.4, 163.5])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(seconds))
    terminal = console.Terminal()
    with terminal.stage("export"):
        assert list(terminal.track([("encoder", 1), ("decode", 2)], "tracing", None)) == [("encoder", 1), ("decode", 2)]
        assert list(terminal.track([7, 8], "batches", None)) == [7, 8]
    assert written.getvalue().splitlines() == [
        "export …",
        "export     tracing encoder, 1 of 2, after 0 s",
        "export     batches, 1 of 2, after 63 s",
    ]
    assert "\r" not in written.getvalue()
    assert "\x1b" not in written.getvalue()


def test_items_outside_stages(written: StringIO) -> None:
    """Without a running stage nothing is written."""
    assert list(console.Terminal().track([1, 2], "batches", None)) == [1, 2]
    assert not written.getvalue()
