"""Paths that a configuration names: nothing outside the artifact folder is written, and no input is overwritten."""

import os
from pathlib import Path

import pytest

from accel.cli.compose import compose
from accel.cli.validate import check_generate
from accel.data import corpus
from accel.data.corpus import read_lines
from accel.errors import AccelError
from tests.conftest import overrides_for


@pytest.mark.parametrize(
    "name",
    ["''", "' '", "'..'", "'.'", "'../x'", "'a/b'", "'/tmp/x'", "'a\\\\b'", "${oc.env:HOME}", '"a\\tb"', "x" * 129],
)
def test_model_name_stays_in_the_artifact_folder(tiny: Path, tmp_path: Path, name: str) -> None:
    """A name that isn't that of one folder is refused, wherever it comes from."""
    with pytest.raises(AccelError, match=r"model\.name="):
        compose([*overrides_for(tiny, tmp_path / "artifacts"), f"model.name={name}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model", "a.b-c_d", "..x", "'größer'", "x" * 128])
def test_model_name_of_one_folder(tiny: Path, tmp_path: Path, name: str) -> None:
    """Any other name is accepted."""
    assert compose([*overrides_for(tiny, tmp_path), f"model.name={name}"]).model.name == name.strip("'")


@pytest.mark.parametrize("kind", ["same", "other spelling", "link", "hard link"])
def test_output_is_its_own_input(tmp_path: Path, kind: str) -> None:
    """The input file is never overwritten, by whatever path it is named."""
    source, output = tmp_path / "words.txt", tmp_path / "output.txt"
    source.write_text("a line\n")
    if kind == "same":
        output = source
    elif kind == "other spelling":
        (tmp_path / "folder").mkdir()
        output = tmp_path / "folder" / ".." / "words.txt"
    elif kind == "link":
        output.symlink_to(source)
    else:
        output.hardlink_to(source)
    with pytest.raises(AccelError, match=r"is the same file as generate\.file"):
        check_generate({"file": str(source), "output": str(output)})


def test_output_is_another_file(tmp_path: Path) -> None:
    """An output that exists already, or doesn't, is accepted."""
    source, output = tmp_path / "words.txt", tmp_path / "output.txt"
    source.write_text("a line\n")
    check_generate({"file": str(source), "output": str(output)})
    output.write_text("a line\n")
    check_generate({"file": str(source), "output": str(output)})


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_no_regular_file(tmp_path: Path, kind: str) -> None:
    """A device without an end, a pipe that nobody writes into and a folder are refused at once."""
    path = Path("/dev/zero") if kind == "device" else tmp_path / "input"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(AccelError, match="not a regular file"):
        check_generate({"file": str(path)})


def test_line_without_an_end(tmp_path: Path) -> None:
    """A line longer than the limit is refused with its number; one of the limit is read."""
    path = tmp_path / "lines.txt"
    longest = "x" * (corpus.MAX_LINE - 1) + "\n"
    path.write_text("first\n" + longest)
    assert read_lines(path) == ["first", longest.rstrip()]
    path.write_text("first\nx" + longest)
    with pytest.raises(AccelError, match=rf"line 2: longer than {corpus.MAX_LINE} bytes"):
        read_lines(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_as_written(tmp_path: Path, end: str) -> None:
    """A line ends at a line feed only, so that outputs have the lines of their inputs."""
    lines = ["one", "", "two\u2028still two", "three\x0cstill three"]
    (tmp_path / "lines.txt").write_bytes(end.join(lines).encode())
    assert read_lines(tmp_path / "lines.txt") == lines


def test_offset_of_a_byte_that_is_no_text(tmp_path: Path) -> None:
    """The message has the byte's offset in the file, not in its line."""
    (tmp_path / "lines.txt").write_bytes(b"first\nab\xffc\n")
    with pytest.raises(AccelError, match="0xff at offset 8"):
        read_lines(tmp_path / "lines.txt")
