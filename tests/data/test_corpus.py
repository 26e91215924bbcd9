"""Texts are read from lines, JSON lines and datasets; files that can't be read are named."""

from pathlib import Path

import datasets
import pytest

from accel.data.corpus import read_lines, read_texts
from accel.errors import AccelError

TEXTS = ["one", "two,\tand a half", "drei, vier é"]


@pytest.mark.parametrize("kind", ["lines", "json lines", "saved", "data files"])
def test_every_kind_gives_the_same_texts(tmp_path: Path, kind: str) -> None:
    """The texts are the same in every format, and a column of numbers beside them is ignored."""
    table = datasets.Dataset.from_dict({"number": [1, 2, 3], "sentence": TEXTS})
    path = tmp_path / "texts"
    if kind == "lines":
        path.write_text("\n".join(TEXTS), encoding="utf-8")
    elif kind == "json lines":
        path = path.with_suffix(".jsonl")
        table.to_json(path, force_ascii=False)
    elif kind == "saved":
        table.save_to_disk(path)
    else:
        path.mkdir()
        table.to_parquet(path / "part.parquet")
    assert read_texts(path) == TEXTS


def test_choice_of_a_column(tmp_path: Path) -> None:
    """Where several columns hold text, one must be named; a wrong name is reported."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n{"source": "c", "target": "d"}\n')
    assert read_texts(path, "target") == ["b", "d"]
    with pytest.raises(AccelError, match="source, target"):
        read_texts(path)
    with pytest.raises(AccelError, match=r"'sauce'. Did you mean source\?"):
        read_texts(path, "sauce")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["a"]\n', "a.jsonl, line 1: expected an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "a.jsonl, record 2: 'text' holds no text but 3"),
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b"\n \n", "a.txt holds no text"),
        ("a.txt", b"fine\ncaf\xe9\n", "a.txt is not UTF-8: byte 0xe9 at offset 8"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """The message names the file, and the line if there is one."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AccelError, match=message):
        read_texts(tmp_path / name)


def test_unusable_folders(tmp_path: Path) -> None:
    """A folder without data, several splits, a missing file, and a column of a text file are reported."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(AccelError, match="empty"):
        read_texts(tmp_path / "empty")
    table = datasets.Dataset.from_dict({"sentence": TEXTS})
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    with pytest.raises(AccelError, match=r"several splits.*train, test"):
        read_texts(tmp_path / "two")
    with pytest.raises(AccelError, match=r"can't read .*missing\.txt"):
        read_lines(tmp_path / "missing.txt")
    (tmp_path / "lines.txt").write_text("a\n")
    with pytest.raises(AccelError, match="no column 'text'"):
        read_texts(tmp_path / "lines.txt", "text")
