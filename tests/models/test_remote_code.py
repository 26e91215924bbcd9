"""Nothing that a checkpoint brings along is executed (code, kernels, pickles) unless the user says so.

Attacks run in a process of their own that answers `y` to every question, because transformers asks one.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from accel.data import pretrained
from accel.data.audio import load_extractor
from accel.data.texts import load_tokenizer
from accel.errors import AccelError
from accel.models.checkpoints import load_model
from accel.system import remote_code

CODE = """
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM


class StrangerConfig(LlamaConfig):
    model_type = "stranger"


class StrangerForCausalLM(LlamaForCausalLM):
    config_class = StrangerConfig
"""
SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
AUTO_MAP = {"AutoConfig": "stranger.StrangerConfig", "AutoModelForCausalLM": "stranger.StrangerForCausalLM"}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """File that the code of the folder writes."""
    return tmp_path / "executed"


@pytest.fixture
def stranger(tmp_path: Path, marker: Path) -> Path:
    """Checkpoint of a model type that transformers doesn't know, with code and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "stranger"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "architectures": ["StrangerForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "stranger.py").write_text(CODE.format(marker=str(marker)))
    return folder


def run(tmp_path: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run Python, with `y` typed again and again."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    answers = "y\n" * 100
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, input=answers, capture_output=True, text=True, env=environment, cwd=tmp_path)


def test_command_line_refuses(stranger: Path, marker: Path, tmp_path: Path) -> None:
    """The command line asks nothing, runs nothing, and says which key allows it."""
    done = run(tmp_path, "-m", "accel", "model=auto", f"model.checkpoint={stranger}", "runtime=cpu")
    assert done.returncode == 2
    assert "model.trust_remote_code=true" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not marker.exists()


def test_load_refuses(deployable: Path, marker: Path, stranger: Path, tmp_path: Path) -> None:
    """`accel.load` refuses code in a deployable, too, even where files aren't checked."""
    folder = Path(shutil.copytree(deployable, tmp_path / "deployable"))
    for name in ("config.json", "stranger.py"):
        shutil.copy(stranger / name, folder / name)
    code = f"import accel; accel.load({str(folder)!r}, 'cpu', check=False)"
    done = run(tmp_path, "-c", code)
    assert "AccelError" in done.stderr
    assert "trust_remote_code=True" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists()


@pytest.mark.parametrize(("part", "name"), [("tokenizer", "AutoTokenizer"), ("extractor", "AutoFeatureExtractor")])
def test_other_parts_refuse(
    stranger: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, part: str, name: str
) -> None:
    """A tokenizer or feature extractor with code is refused, and nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = stranger  # not a model type that transformers knows a tokenizer for, which it would prefer
    reference = ["stranger.Tokenizer", None] if part == "tokenizer" else "stranger.Extractor"
    content = json.dumps({"tokenizer_class": "Tokenizer", "auto_map": {name: reference}})
    (folder / ("tokenizer_config.json" if part == "tokenizer" else "preprocessor_config.json")).write_text(content)
    with pytest.raises(AccelError, match=r"model\.trust_remote_code=true"):
        load_tokenizer(folder) if part == "tokenizer" else load_extractor(folder)
    assert not marker.exists()


def test_kernels_from_the_hub_refuse(tiny: Path, tmp_path: Path) -> None:
    """A config that names attention kernels of a repository, which transformers would download and run, is refused."""
    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "somebody/kernels"}))
    with pytest.raises(AccelError, match="'somebody/kernels'"):
        pretrained.load_config(folder)
    with remote_code.allowing(True):
        assert pretrained.load_config(folder).model_type == "t5"


class Executes:
    """Object whose unpickling writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "bare"])
def test_pickled_weights_are_not_executed(tiny: Path, marker: Path, tmp_path: Path, archive: bool) -> None:
    """Weights that are a pickle with a call in it are refused as damaged."""
    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    (folder / "model.safetensors").unlink()
    content = {"shared.weight": Executes(marker)}
    if archive:
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(AccelError, match="is damaged, or holds objects other than tensors"):
        load_model(folder)
    assert not marker.exists()


def test_architecture_that_is_no_model(tiny: Path, tmp_path: Path) -> None:
    """A config whose `architectures` names something else of transformers is refused like an unknown class."""
    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["pipeline"]}))
    with pytest.raises(AccelError, match=r"no text generation class .*\(pipeline\)"):
        load_model(folder)


@pytest.mark.slow
def test_trusted_code_runs_from_checkpoint_to_deployable(stranger: Path, marker: Path, tmp_path: Path) -> None:
    """With `model.trust_remote_code=true` the model is built; the certificate says so, and the deployable loads."""
    code = f"""
import json
import accel, torch
overrides = ["artifacts={tmp_path}/artifacts", "runtime=cpu", "model.trust_remote_code=true", "verify.latency=false",
             "verify.unique_tokens=true"]
folder = accel.build({str(stranger)!r}, overrides).folder
print(json.loads((folder / "certificate.json").read_text())["trust_remote_code"])
with accel.load(folder, "cpu", trust_remote_code=True) as model:
    print(model.generate(torch.tensor([[5, 9, 40]]), max_new_tokens=4, do_sample=False).shape[0])
accel.load(folder, "cpu")
"""
    done = run(tmp_path, "-c", code)
    assert done.stdout.split() == ["True", "1"], done.stderr[-3000:]
    assert "AccelError" in done.stderr
    assert marker.exists()
    assert "trust_remote_code=true" in next((tmp_path / "artifacts").rglob("certificate.html")).read_text()


def test_permission_ends_with_its_block() -> None:
    """The permission holds inside the block only, also where an error ends it."""
    with suppress(ZeroDivisionError), remote_code.allowing(True):
        allowed = remote_code.is_allowed()
        raise ZeroDivisionError
    assert allowed
    assert not remote_code.is_allowed()
