"""PEFT adapters that can't be used: one message, exit code 2, before any stage begins."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from accel.cli.compose import compose
from tests.cli.test_command_line import ErrorMessage, assert_names, error_message
from tests.conftest import overrides_for
from tests.families import FAMILIES, LLAMA
from tests.lora import save_adapter
from tests.random_t5 import random_t5

__all__ = ["error_message"]  # a fixture
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Adapter for the tiny T5."""
    return save_adapter(random_t5(), LoraConfig(target_modules=["q", "v"]), tmp_path / "adapter")


def without(name: str) -> Callable[[Path], None]:
    """Return a function that removes a file of the adapter."""
    return lambda folder: (folder / name).unlink()


def config(**values: Any) -> Callable[[Path], None]:
    """Return a function that changes values of the adapter's config."""

    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def pickled(folder: Path) -> None:
    """Store the weights as a pickle, as old versions of PEFT did."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def renamed(folder: Path) -> None:
    """Give one of the weights the name of a layer that the model lacks."""
    weights = load_file(folder / WEIGHTS)
    name = next(iter(weights))
    weights[name.replace("block.0", "block.7")] = weights.pop(name)
    save_file(weights, folder / WEIGHTS)


def incomplete(folder: Path) -> None:
    """Leave one of the weights out."""
    weights = load_file(folder / WEIGHTS)
    del weights[next(iter(weights))]
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (shutil.rmtree, ("this folder doesn't exist", "hf download")),
        (without(CONFIG), (CONFIG, "not the folder of a PEFT adapter")),
        (without(WEIGHTS), (WEIGHTS, "no weights")),
        (pickled, (WEIGHTS, "adapter_model.bin is a pickle", "save_pretrained")),
        (lambda folder: (folder / CONFIG).write_text('{"peft_type": '), (CONFIG, "damaged")),
        (lambda folder: (folder / CONFIG).write_text("[1]"), (CONFIG, "damaged")),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"no weights"), (WEIGHTS, "damaged")),
        (config(peft_type="PROMPT_TUNING"), ("'PROMPT_TUNING'", "LORA")),
        (config(peft_type=None), ("None", "LORA")),
        (config(peft_type=["LORA"]), ("['LORA']", "LOHA")),
        (config(megatron_config={}, megatron_core="os"), ("megatron_config",)),
        (config(alora_invocation_tokens=[3], task_type="CAUSAL_LM"), ("aLoRA does not support merging",)),
        (config(layer_replication=[[0, 2], [1, 2]]), ("doesn't fit the model",)),
        (config(target_modules=["query"]), ("query", "doesn't fit the model")),
        (config(r=16), ("size mismatch", "doesn't fit the model")),
        (config(r="eight"), ("doesn't fit the model",)),
        (config(modules_to_save=["lm_head"]), ("lm_head", "doesn't fit the model")),
        (renamed, ("no layer for weights", "block.7")),
        (incomplete, ("lacks weights", "block.0")),
    ],
)
def test_unusable_adapter(
    error_message: ErrorMessage, adapter: Path, damage: Callable[[Path], object], named: tuple[str, ...]
) -> None:
    """The adapter and what is wrong with it are named."""
    damage(adapter)
    message = error_message(f"model.peft_adapter={adapter}")
    assert_names(message, str(adapter), *named)
    assert len(message.splitlines()) == 1


def test_adapter_for_another_architecture(error_message: ErrorMessage, tmp_path: Path) -> None:
    """The message names the model that it was trained for, also where modules have the same names by chance."""
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA))
    llama.name_or_path = "someone/llama"
    folder = save_adapter(llama, LoraConfig(target_modules=["q_proj"]), tmp_path / "llama")
    assert_names(error_message(f"model.peft_adapter={folder}"), "doesn't fit the model", "someone/llama", "q_proj")
    OPTForCausalLM(OPTConfig(**FAMILIES["opt"])).save_pretrained(tmp_path / "opt")
    base = ["model=auto", f"model.checkpoint={tmp_path / 'opt'}", "runtime=cpu"]
    message = error_message(f"model.peft_adapter={folder}", base=base)
    assert_names(message, "doesn't fit the model", "no layer for weights", "someone/llama")


def test_adapter_as_checkpoint(error_message: ErrorMessage, adapter: Path, tiny: Path, tmp_path: Path) -> None:
    """An adapter in place of its base model is refused, and also beside one, where transformers would load others."""
    assert_names(error_message(f"model.checkpoint={adapter}"), str(adapter), "model.peft_adapter=FOLDER")
    both = Path(shutil.copytree(tiny, tmp_path / "both"))
    shutil.copy(adapter / CONFIG, both)
    assert_names(error_message(f"model.checkpoint={both}"), str(both), "model.peft_adapter=FOLDER")


def test_other_values(error_message: ErrorMessage, adapter: Path) -> None:
    """An empty path, and references that can't be copied with the checkpoint."""
    assert_names(error_message("model.peft_adapter=''"), "model.peft_adapter=''", "null")
    message = error_message(f"model.peft_adapter={adapter}", "model.references=../heldout.tsv")
    assert_names(message, "model.references=../heldout.tsv", "absolute")


def test_nothing_of_a_pickle_is_read(
    error_message: ErrorMessage, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle beside the weights is ignored, and one in their place is not opened."""
    pickled(adapter)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    assert_names(error_message(f"model.peft_adapter={adapter}"), "is a pickle")


def test_peft_is_missing(
    error_message: ErrorMessage, tiny: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what to install; without an adapter, nothing needs it."""
    monkeypatch.setitem(sys.modules, "peft", None)  # so its import fails
    message = error_message(f"model.peft_adapter={adapter}")
    assert message == f"model.peft_adapter={adapter} needs peft: pip install 'accel-onnx[lora]'"
    assert compose(overrides_for(tiny, Path("unused"))).model.peft_adapter is None
