"""Texts of the user: lines of a text file, JSON lines, or a folder that Hugging Face `datasets` reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.errors import AccelError, unknown

JSON_LINES = (".jsonl", ".json", ".ndjson")
MAX_LINE = 2**20  # bytes of one line: more is no text, and would fill the memory
SAMPLES = Path(__file__).parent / "samples"  # inputs of models for which the user gives none: see its README
DATASETS_MISSING = "reading a folder of data needs the package datasets: pip install 'accel-onnx[data]'"


def read_texts(path: str | Path, column: str | None = None) -> list[str]:
    """Read texts, in their order.

    Args:
        path: A text file with one text per line; JSON lines, by the file's suffix; or a folder, either written by
            `datasets.save_to_disk` or with data files that `datasets.load_dataset` reads, and with one split only.
        column: Column of JSON lines or of a dataset that holds the texts. Optional where only one column holds text.

    Raises:
        AccelError: The path can't be read, holds no text, or the column is missing or ambiguous.
    """
    path = Path(path)
    texts = _read_folder(path, column) if path.is_dir() else _read_file(path, column)
    if not any(text.strip() for text in texts):
        raise AccelError(f"{path} holds no text: all its texts are empty")
    return texts


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 file.

    Raises:
        AccelError: The file is missing, no regular file, empty or not UTF-8, or a line has more than `MAX_LINE` bytes.
    """
    lines: list[str] = []
    start = 0  # offset of the line
    try:
        if path.exists() and not path.is_file():  # a device has no end, and a pipe can be read only once
            raise AccelError(f"can't read {path}: it is a folder, a pipe or a device, not a regular file")
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise AccelError(f"{path}, line {len(lines) + 1}: longer than {MAX_LINE} bytes")
                lines.append(line.decode("utf-8").removesuffix("\n").removesuffix("\r"))
                start += len(line)
    except UnicodeDecodeError as error:
        raise AccelError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {start + error.start}"
        ) from error
    except OSError as error:
        raise AccelError(f"can't read {path}: {error.strerror}") from error
    if not any(line.strip() for line in lines):
        raise AccelError(f"{path} holds no text: it is empty or has blank lines only")
    return lines


def sample_lines(name: str) -> list[str]:
    """Read the lines of a file of sample inputs that ships with accel."""
    return read_lines(SAMPLES / name)


def _read_file(path: Path, column: str | None) -> list[str]:
    """Read the texts of a text file or of JSON lines."""
    lines = read_lines(path)
    if path.suffix not in JSON_LINES:
        if column is not None:
            raise AccelError(
                f"{path} holds lines of text and no column {column!r}: leave the column out, or rename the file "
                "to .jsonl if its lines are JSON"
            )
        return lines
    records = [_parse_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    columns = {key: [record.get(key) for record in records] for key in records[0]}
    name = _select_column(path, column, columns)
    texts: list[str] = []
    for number, record in enumerate(records, 1):
        text = record.get(name)
        if not isinstance(text, str):
            raise AccelError(f"{path}, record {number}: {name!r} holds no text but {text!r}")
        texts.append(text)
    return texts


def _parse_record(path: Path, number: int, line: str) -> dict[str, Any]:
    """Parse one line of JSON, which must be an object."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise AccelError(f"{path}, line {number}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise AccelError(f'{path}, line {number}: expected an object such as {{"text": "..."}}')
    return record


def _read_folder(path: Path, column: str | None) -> list[str]:
    """Read the texts of a dataset."""
    try:
        import datasets
    except ImportError as error:
        raise AccelError(f"{path}: {DATASETS_MISSING}") from error
    saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        dataset = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # datasets raises many kinds for folders that it can't read
        raise AccelError(f"datasets can't read {path}: {str(error).splitlines()[0]}") from error
    if isinstance(dataset, dict):
        if len(dataset) > 1:
            raise AccelError(f"{path} holds several splits; give the folder of one: {', '.join(dataset)}")
        dataset = next(iter(dataset.values()))
    name = _select_column(path, column, {key: dataset[:1][key] for key in dataset.column_names})
    texts: list[str] = list(dataset[name])
    return texts


def _select_column(path: Path, column: str | None, columns: Mapping[str, Sequence[Any]]) -> str:
    """Return `column`, or by default the only column whose first value is text."""
    text_columns = [key for key, values in columns.items() if values and isinstance(values[0], str)]
    if column is None and len(text_columns) == 1:
        return text_columns[0]
    if column is None:
        raise AccelError(
            f"{path}: which column holds the texts? Columns with text: {', '.join(text_columns) or 'none'}"
        )
    if column not in text_columns:
        raise unknown(f"column of {path}", column, text_columns)
    return column
