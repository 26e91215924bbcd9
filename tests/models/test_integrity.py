"""`accel.load` opens what the manifest lists and nothing else, and says once if nobody verified it."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import accel
from accel.errors import AccelError
from accel.models import integrity
from accel.runtime import layout
from accel.system import remembered_hashes
from accel.system.hashing import make_key
from accel.system.remembered_hashes import FILE, hash_files

DECODER, ENCODER = f"{layout.GRAPHS}/decoder_model_merged.onnx", f"{layout.GRAPHS}/encoder_model.onnx"
VERIFICATION = "verification.json"


@pytest.fixture
def folder(deployable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the tiny T5's deployable that a test may damage, with an empty memory of hashes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(deployable, tmp_path / "deployable"))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Change the list of files in a manifest; with `sign`, write the hash that belongs to the new list."""
    manifest = json.loads((folder / layout.MANIFEST).read_text())
    change(manifest["files"])
    if sign:
        manifest["files_sha256"] = make_key(files=manifest["files"])
    (folder / layout.MANIFEST).write_text(json.dumps(manifest))


def relist(folder: Path, *names: str) -> None:
    """Write new sizes and hashes of files into the manifest."""
    for name in names:
        path = folder / name
        record = {"size": path.stat().st_size, "sha256": hash_files([path])[path]}
        edit(folder, lambda files, name=name, record=record: files.update({name: record}))


@pytest.mark.parametrize("check", ["fast", "full", False])
def test_undamaged(folder: Path, caplog: pytest.LogCaptureFixture, check: str | bool) -> None:
    """A deployable as it was made loads without a warning, and so does one with documentation of its user."""
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (folder / name).write_text("text")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("text")
    with caplog.at_level(logging.WARNING):
        accel.load(folder, "cpu", check=check).close()
    assert caplog.messages == []


@pytest.mark.parametrize("name", [DECODER, ENCODER, "config.json", VERIFICATION])
@pytest.mark.parametrize("always_hashed", [0, integrity.ALWAYS_HASHED])
def test_flipped_bit(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, always_hashed: int) -> None:
    """One changed bit is refused with the file's name, in a small file and in one whose hash is remembered."""
    monkeypatch.setattr(integrity, "ALWAYS_HASHED", always_hashed)
    accel.load(folder, "cpu").close()
    flip(folder / name)
    for check in ("fast", "full"):
        with pytest.raises(AccelError, match=rf"{name} has another SHA-256"):
            accel.load(folder, "cpu", check=check)


def test_zeroed_weights(folder: Path) -> None:
    """Zeros in place of weights give other tokens without a word, which is why they are refused."""
    path = folder / DECODER
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    content, weights = path.read_bytes(), largest.raw_data
    path.write_bytes(content.replace(weights, bytes(len(weights))))
    with accel.load(folder, "cpu", check=False) as model:
        assert model.generate(torch.tensor([[5, 9, 40]]), max_new_tokens=4).shape[1] > 1
    with pytest.raises(AccelError, match="another SHA-256"):
        accel.load(folder, "cpu")


@pytest.mark.parametrize("size", [0, 100])
def test_truncated(folder: Path, size: int) -> None:
    """A shorter file is refused with both sizes."""
    (folder / DECODER).write_bytes((folder / DECODER).read_bytes()[:size])
    with pytest.raises(AccelError, match=rf"{DECODER} has {size} bytes, but \d+ according"):
        accel.load(folder, "cpu")


def test_missing_file(folder: Path) -> None:
    (folder / ENCODER).unlink()
    with pytest.raises(AccelError, match=rf"{ENCODER} is missing"):
        accel.load(folder, "cpu")


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer.json", "spiece.model", "modeling.py", "additional_chat_templates/a.jinja"],
)
def test_unlisted_file(folder: Path, name: str) -> None:
    """A file that transformers would read, or anyone else, is refused if nobody verified it."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(AccelError, match=rf"{name} is not in {layout.MANIFEST}"):
        accel.load(folder, "cpu")


@pytest.mark.parametrize("kind", ["pipe", "linked folder", "dangling link"])
def test_unlisted_pipe_or_link(folder: Path, tmp_path: Path, kind: str) -> None:
    """Neither a pipe, which would block, nor a link to a folder is followed."""
    if kind == "pipe":
        os.mkfifo(folder / "entry")
    else:
        (tmp_path / "other").mkdir()
        (folder / "entry").symlink_to(tmp_path / ("other" if kind == "linked folder" else "nowhere"))
    with pytest.raises(AccelError, match="entry is not in"):
        accel.load(folder, "cpu")


def test_other_deployable_below(folder: Path) -> None:
    """A subfolder with a manifest of its own is another deployable."""
    shutil.copytree(folder, folder.parent / "copy")
    (folder.parent / "copy").rename(folder / "fp16")
    accel.load(folder, "cpu").close()
    accel.load(folder, "cpu", subfolder="fp16").close()


@pytest.mark.parametrize(
    ("change", "sign", "message"),
    [
        (lambda files: files.clear(), True, "doesn't list"),
        (lambda files: files.clear(), False, "was edited"),
        (lambda files: files.pop(DECODER), True, "doesn't list"),
        (lambda files: files.pop("config.json"), True, "config.json is not in"),
        (lambda files: files.pop("config.json"), False, "was edited"),
        (lambda files: files[DECODER].update(sha256="0" * 64), False, "was edited"),
        (lambda files: files[DECODER].update(sha256="0" * 64), True, "another SHA-256"),
        (lambda files: files[DECODER].pop("size"), True, "was edited"),
        (lambda files: files.update({"../secret": files[DECODER]}), True, "was edited"),
        (lambda files: files.update({"/etc/passwd": files[DECODER]}), True, "was edited"),
        (lambda files: files.update({DECODER: None}), True, "is damaged"),
    ],
)
def test_edited_list(folder: Path, change: Callable[[dict[str, Any]], object], sign: bool, message: str) -> None:
    """A list of files that is empty, that accel didn't write or that leaves the folder is refused."""
    edit(folder, change, sign=sign)
    with pytest.raises(AccelError, match=message):
        accel.load(folder, "cpu")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"files": 3}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_manifest(folder: Path, content: bytes) -> None:
    (folder / layout.MANIFEST).write_bytes(content)
    with pytest.raises(AccelError, match=rf"{layout.MANIFEST} is damaged"):
        accel.load(folder, "cpu")


def test_no_manifest(folder: Path) -> None:
    (folder / layout.MANIFEST).unlink()
    with pytest.raises(AccelError, match=rf"holds no {layout.MANIFEST} .* check=False"):
        accel.load(folder, "cpu")


def test_unknown_check(folder: Path) -> None:
    for check in ("quick", True, None):
        with pytest.raises(AccelError, match=r"unknown check.* Choices: False, fast, full"):
            accel.load(folder, "cpu", check=check)


def test_second_load_hashes_no_large_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fast` hashes a large file once; `full` hashes it each time and believes no memory."""
    monkeypatch.setattr(integrity, "ALWAYS_HASHED", 100_000)
    read: list[str] = []
    original = remembered_hashes._hash

    def counted(path: Path) -> str:
        read.append(path.relative_to(folder).as_posix())
        return original(path)

    monkeypatch.setattr(remembered_hashes, "_hash", counted)
    integrity.check_files(layout.first_variant(folder), "fast")
    assert DECODER in read
    read.clear()
    integrity.check_files(layout.first_variant(folder), "fast")
    assert DECODER not in read
    assert "config.json" in read
    flip(folder / DECODER)
    memory = folder.parent / "cache" / "accel" / FILE
    right = json.loads((folder / layout.MANIFEST).read_text())["files"][DECODER]["sha256"]
    memory.write_text(json.dumps({remembered_hashes._state(folder / DECODER): right}))  # as if nothing had changed
    integrity.check_files(layout.first_variant(folder), "fast")
    with pytest.raises(AccelError, match="another SHA-256"):
        integrity.check_files(layout.first_variant(folder), "full")


def test_verdict_missing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, lambda files: files.pop(VERIFICATION))
    (folder / VERIFICATION).unlink()
    assert warning(folder, caplog) == f"{folder} is unverified: it holds no {VERIFICATION}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda verdict: verdict.update(passed=False), "it didn't pass"),
        (lambda verdict: verdict.update(passed="yes"), "it didn't pass"),
        (lambda verdict: verdict.pop("files"), "can't be read"),
        (lambda verdict: verdict["files"].update({DECODER: "0" * 64}), f"is of other files: {DECODER}"),
        (lambda verdict: verdict["files"].pop("config.json"), "is of other files: config.json"),
    ],
)
def test_verdict_does_not_hold(
    folder: Path, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """A verification result that failed, or of other files, gives one warning that says so."""
    verdict = json.loads((folder / VERIFICATION).read_text())
    change(verdict)
    (folder / VERIFICATION).write_text(json.dumps(verdict))
    relist(folder, VERIFICATION)
    assert message in warning(folder, caplog)


def test_damaged_graph_that_is_opened_regardless(folder: Path) -> None:
    """Without a check, ONNX Runtime's error names the file."""
    (folder / DECODER).write_bytes((folder / DECODER).read_bytes()[:1000])
    with pytest.raises(AccelError, match=rf"{DECODER} is damaged"):
        accel.load(folder, "cpu", check=False)


def test_files_exchanged_after_the_verification(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other weights with a manifest of their own give the warning: the result in the folder isn't theirs."""
    content = (folder / DECODER).read_bytes()
    (folder / DECODER).write_bytes(content + b"\xa2\x01\x00")  # an unknown field of protobuf, which readers skip
    relist(folder, DECODER)
    assert f"is of other files: {DECODER}" in warning(folder, caplog)


def warning(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Load the model, and return the one warning."""
    with caplog.at_level(logging.WARNING):
        accel.load(folder, "cpu").close()
    (message,) = caplog.messages
    return message
