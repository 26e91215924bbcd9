"""The checkpoint that later stages see: a PEFT adapter is merged into it, and everything else is as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from accel import progress
from accel.adapters import registry
from accel.cli.compose import compose, execute
from accel.errors import AccelError
from accel.models.checkpoints import load_model
from accel.models.peft_adapter import MERGEABLE
from accel.pipeline.runner import Pipeline
from accel.pipeline.store import Artifact
from tests.conftest import overrides_for
from tests.families import LLAMA
from tests.lora import merged_by_peft, save_adapter
from tests.random_t5 import random_t5

LORA = {"target_modules": ["q", "v", "wo"], "lora_alpha": 16}
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "LORA": lambda: LoraConfig(**LORA),
    "DoRA": lambda: LoraConfig(use_dora=True, **LORA),
    "rsLoRA with a pattern": lambda: LoraConfig(use_rslora=True, rank_pattern={"wo": 4}, **LORA),
    "PiSSA": lambda: LoraConfig(init_lora_weights="pissa", **LORA),
    "all linear layers": lambda: LoraConfig(target_modules="all-linear"),
    "modules to save": lambda: LoraConfig(modules_to_save=["final_layer_norm"], **LORA),
    "ADALORA": lambda: AdaLoraConfig(target_modules=["q", "v"], total_step=10),
    "FOURIERFT": lambda: FourierFTConfig(target_modules=["q", "v"], n_frequency=50),
    "HRA": lambda: HRAConfig(target_modules=["q", "v"]),
    "IA3": lambda: IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
    "LN_TUNING": lambda: LNTuningConfig(target_modules=["layer_norm"]),
    "LOHA": lambda: LoHaConfig(target_modules=["q", "v"]),
    "LOKR": lambda: LoKrConfig(target_modules=["q", "v"]),
    "OFT": lambda: OFTConfig(target_modules=["q", "v"], oft_block_size=0, r=8),
    "TRAINABLE_TOKENS": lambda: TrainableTokensConfig(target_modules=["shared"], token_indices=[3, 4, 5]),
    "VERA": lambda: VeraConfig(target_modules=["q", "v"]),
}


def pipeline(checkpoint: Path, root: Path, *overrides: object) -> Pipeline:
    """Return a pipeline that has run nothing yet."""
    config = compose(overrides_for(checkpoint, root, *map(str, overrides)))
    return Pipeline(config, registry.build(config.architecture))


def make(checkpoint: Path, root: Path, *overrides: object) -> Artifact:
    """Run the stage."""
    return pipeline(checkpoint, root, *overrides).artifact("checkpoint")


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all weights by name."""
    return dict(model.state_dict())


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the largest difference of two models' weights."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def random_llama(**changes: Any) -> LlamaForCausalLM:
    """Return a tiny Llama with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | changes))).eval()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Adapter for the tiny T5."""
    return save_adapter(random_t5(), LoraConfig(**LORA), tmp_path / "lora")


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_weights_are_those_of_peft(tiny: Path, tmp_path: Path, name: str) -> None:
    """For every type that is accepted; the folder that was made loads as a model without adapter."""
    adapter = save_adapter(random_t5(), ADAPTERS[name](), tmp_path / "adapter")
    model = make(tiny, tmp_path, f"model.peft_adapter={adapter}")
    found = load_model(model.folder)
    assert not (model.folder / "adapter_config.json").exists()
    assert largest_difference(weights(found), weights(merged_by_peft(load_model(tiny), adapter))) < 1e-5
    assert largest_difference(weights(found), weights(load_model(tiny))) > 1e-3


def test_every_type_is_tested() -> None:
    assert set(MERGEABLE) <= set(ADAPTERS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights are merged in FP32 and rounded once."""
    base = tmp_path / "base"
    random_llama(dtype=dtype).to(dtype).save_pretrained(base)
    adapter = save_adapter(load_model(base), LoraConfig(target_modules=["q_proj", "down_proj"]), tmp_path / "lora")
    merged = make(base, tmp_path / "artifacts", f"model.peft_adapter={adapter}")
    assert json.loads((merged.folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    found, expected = load_model(merged.folder, "auto"), merged_by_peft(load_model(base), adapter)
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}
    for name, tensor in weights(found).items():
        assert torch.equal(tensor, weights(expected)[name].to(dtype)), name


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [True, False])
def test_modules_to_save_are_kept(tmp_path: Path, module: str, tied: bool) -> None:
    """Whole modules of the adapter replace the model's, also one of two that shared a weight."""
    base = tmp_path / "base"
    random_llama(tie_word_embeddings=tied).save_pretrained(base)
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=[module])
    adapter = save_adapter(load_model(base), lora, tmp_path / "lora")
    merged = make(base, tmp_path / "artifacts", f"model.peft_adapter={adapter}")
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(2))
    expected = merged_by_peft(load_model(base), adapter)(ids).logits
    assert torch.allclose(load_model(merged.folder)(ids).logits, expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(load_model(base)(ids).logits, expected, rtol=0.1)


def test_a_shared_weight_is_not_changed_for_both(tmp_path: Path) -> None:
    """PEFT merges an adapter of the embedding into the output layer too, which computes something else."""
    random_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["embed_tokens", "q_proj"])
    adapter = save_adapter(load_model(tmp_path / "base"), lora, tmp_path / "lora")
    with pytest.raises(AccelError, match=r"can't be merged: logits .*tie_word_embeddings"):
        make(tmp_path / "base", tmp_path / "artifacts", f"model.peft_adapter={adapter}")


def test_random_weights(tmp_path: Path, tiny: Path) -> None:
    """Random weights from a config are a base as well."""
    plain = make(tiny, tmp_path, "model.weights=random")
    adapter = save_adapter(load_model(plain.folder), LoraConfig(**LORA), tmp_path / "lora")
    merged = make(tiny, tmp_path, "model.weights=random", f"model.peft_adapter={adapter}")
    expected = weights(merged_by_peft(load_model(plain.folder), adapter))
    assert largest_difference(weights(load_model(merged.folder)), expected) < 1e-5


def test_without_an_adapter_the_checkpoint_is_used_where_it_is(tiny: Path, tmp_path: Path) -> None:
    assert make(tiny, tmp_path).folder == tiny


def test_the_key_is_of_the_contents(tiny: Path, tmp_path: Path, lora: Path) -> None:
    """Not of paths: a copy gives the same key, and other weights or settings, of the adapter or its base, another."""

    def key(adapter: Path, checkpoint: Path = tiny) -> str:
        return pipeline(checkpoint, tmp_path, f"model.peft_adapter={adapter}").key("verify")

    copied = Path(shutil.copytree(lora, tmp_path / "copied"))
    (copied / "README.md").write_text("# Another card")
    other = save_adapter(random_t5(), LoraConfig(**LORA), tmp_path / "other", seed=2)
    scaled = Path(shutil.copytree(lora, tmp_path / "scaled"))
    settings = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 32}))
    random_t5(seed=5).save_pretrained(tmp_path / "base")
    assert key(copied) == key(lora)
    plain = pipeline(tiny, tmp_path).key("verify")
    assert len({key(lora), key(other), key(scaled), key(lora, tmp_path / "base"), plain}) == 5


def test_other_files_of_the_checkpoint_are_kept(tiny: Path, tmp_path: Path, lora: Path) -> None:
    """Tokenizer, card, references and generation config as they are; neither code nor the index of other weights."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    generation = json.loads((base / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.5}
    contents = {
        "generation_config.json": json.dumps(generation),
        "tokenizer_config.json": "{}",
        "README.md": "---\nlicense: mit\n---\n",
        "data/heldout.tsv": "one\ttwo\n",
    }
    for name, content in contents.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(content)
    (base / "model.safetensors.index.json").write_text("{}")
    (base / "modeling.py").write_text("raise SystemExit")
    overrides = (f"model.peft_adapter={lora}", "model.references=data/heldout.tsv")
    folder = make(base, tmp_path / "artifacts", *overrides).folder
    for name, content in contents.items():
        assert (folder / name).read_text() == content
    expected = {"config.json", "manifest.json", "model.safetensors", *contents}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == expected


def test_another_base_model_is_noted(tiny: Path, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user is told, and the run goes on; the same name in another place is the same model."""
    notes: list[str] = []
    monkeypatch.setattr(progress, "note", notes.append)
    path = lora / "adapter_config.json"
    for number, name in enumerate(("someone/tiny", "someone/other")):
        settings = json.loads(path.read_text()) | {"base_model_name_or_path": name}
        path.write_text(json.dumps(settings))
        make(tiny, tmp_path / "artifacts", f"model.peft_adapter={lora}")
        said = [note for note in notes if "was trained for" in note]
        assert said == ["the adapter was trained for someone/other; it is merged into " + str(tiny)][:number]


def test_base_without_weights(tiny: Path, tmp_path: Path, lora: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(tiny / "config.json", base)
    with pytest.raises(AccelError, match="holds no weights"):
        execute(compose(overrides_for(base, tmp_path / "artifacts", f"model.peft_adapter={lora}", "stage=export")))
