"""A user's texts: a file of lines, JSON lines, or a folder that Hugging Face `datasets` reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel.errors import AccelError, unknown

JSON_LINES = (".jsonl", ".json", ".ndjson")
SAMPLES = Path(__file__).parent / "samples"  # what a model is asked when nothing else is given: see its README
MISSING = "reading a folder of data needs the package datasets: pip install 'accel-onnx[data]'"


def read_texts(path: str | Path, column: str | None = None) -> list[str]:
    """The texts at `path`, in order.

    `column` names the column of JSON lines or of a dataset that holds them; it may be left out where only one holds
    text. A folder is what `datasets.save_to_disk` wrote, or data files that `datasets.load_dataset` knows; of several
    splits it must hold one. Raises `AccelError` where there is nothing to read.
    """
    path = Path(path)
    found = _folder(path, column) if path.is_dir() else _lines(path, column)
    if not any(text.strip() for text in found):
        raise AccelError(f"{path} holds no text")
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file. Raises `AccelError` if it is missing, empty or not UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise AccelError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}"
        ) from error
    except OSError as error:
        raise AccelError(f"can't read {path}: {error.strerror}") from error
    if not any(line.strip() for line in lines):
        raise AccelError(f"{path} holds no text")
    return lines


def sample_lines(name: str) -> list[str]:
    """The lines of a file of sample inputs that ships with accel."""
    return read_lines(SAMPLES / name)


def _lines(path: Path, column: str | None) -> list[str]:
    lines = read_lines(path)
    if path.suffix not in JSON_LINES:
        if column is not None:
            raise AccelError(f"{path} holds lines of text and no column {column!r}; JSON lines end in .jsonl")
        return lines
    records = [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    name = _choose(path, column, {key: [record.get(key) for record in records] for key in records[0]})
    texts = [record.get(name) for record in records]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise AccelError(f"{path}, record {number}: {name!r} holds no text but {text!r}")
    return [str(text) for text in texts]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise AccelError(f"{path}, line {number}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise AccelError(f'{path}, line {number}: expected an object such as {{"text": "..."}}')
    return record


def _folder(path: Path, column: str | None) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise AccelError(f"{path}: {MISSING}") from error
    saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # many kinds, all about what lies in the folder
        raise AccelError(f"datasets can't read {path}: {str(error).splitlines()[0]}") from error
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise AccelError(f"{path} holds several splits; give the folder of one: {', '.join(loaded)}")
        loaded = next(iter(loaded.values()))
    name = _choose(path, column, {key: loaded[:1][key] for key in loaded.column_names})
    texts: list[str] = list(loaded[name])
    return texts


def _choose(path: Path, column: str | None, columns: dict[str, Sequence[Any]]) -> str:
    """The column asked for, or the only one that holds text."""
    texts = [key for key, values in columns.items() if values and isinstance(values[0], str)]
    if column is None and len(texts) == 1:
        return texts[0]
    if column is None:
        raise AccelError(f"{path}: which column holds the texts? Columns with text: {', '.join(texts) or 'none'}")
    if column not in texts:
        raise unknown(f"column of {path}", column, texts)
    return column
