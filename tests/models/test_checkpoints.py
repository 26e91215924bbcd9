"""Checkpoints whose weights can't be read."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from accel.errors import AccelError
from accel.models.checkpoints import load_model
from tests.random_t5 import random_t5


class Command:
    """Object that runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[], Path], tuple[()]]:
        return Path.cwd, ()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "other": lambda content: b"no weights" * 100,
    "pickle": lambda content: pickle.dumps(Command()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights(tiny: Path, tmp_path: Path, name: str, damage: str) -> None:
    """One message, which names the file."""
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / name
    if name.endswith(".bin"):
        (tmp_path / "model" / "model.safetensors").unlink()
        torch.save(random_t5().state_dict(), path)
        assert load_model(tmp_path / "model").config.model_type == "t5"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(AccelError, match=rf"{name} is damaged") as caught:
        load_model(tmp_path / "model")
    assert len(str(caught.value).splitlines()) == 1


def test_another_error_is_not_blamed_on_the_file(tiny: Path) -> None:
    with pytest.raises(ValueError, match="dtype"):
        load_model(tiny, dtype="no dtype")  # type: ignore[arg-type]


def test_one_thread_loads(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would leave heaps of their own behind; the weights are those of the file."""
    monkeypatch.setattr("transformers.core_model_loading.ThreadPoolExecutor", None)  # raises if it is called
    weights = load_model(tiny).state_dict()
    assert weights
    for name, tensor in random_t5().state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)
