"""Choice of an architecture for a checkpoint, and messages for a YAML that doesn't fit the model."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel.adapters import registry
from accel.cli.compose import compose, execute
from accel.errors import AccelError
from accel.testing import random_model
from tests.conftest import overrides_for
from tests.families import FAMILIES, LLAMA

ROOT = Path(__file__).parents[2]
CAUSAL = "accel.architectures.causal.Causal"
SEQ2SEQ = "accel.architectures.seq2seq.Seq2Seq"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function that returns the folder of a family's tiny model."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            random_model(FAMILIES.get(family, LLAMA | {"model_type": family})).save_pretrained(folders[family])
        return folders[family]

    return folder_of


def test_every_family_has_a_yaml() -> None:
    """Every family's model type is listed by exactly one YAML."""
    listed = [model_type for types in registry.served().values() for model_type in types]
    assert len(listed) == len(set(listed))
    assert {str(values["model_type"]) for values in FAMILIES.values()} == set(listed)


def test_the_readme_lists_every_family() -> None:
    """README's table, which `scripts/family_table.py` prints, has every family with its YAML's number of lines."""
    text = (ROOT / "README.md").read_text()
    table = text.partition("<!-- families:")[2].partition("<!-- end of families -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")][
        1:
    ]
    assert [row[0] for row in rows] == list(FAMILIES)
    for family, _, length, equal, *_ in rows:
        path = ROOT / "conf" / "architecture" / f"{FAMILIES[family]['model_type']}.yaml"
        assert int(length) == len(path.read_text().splitlines()), family
        assert equal == "100%", family


def test_unlisted_model_type(checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    """The generic architecture is used, and a note says so."""
    caplog.set_level(logging.INFO, "accel")
    config = compose(overrides_for(checkpoint("stablelm"), Path("unused")))
    assert config.architecture == {"_target_": CAUSAL, "model_types": []}
    assert "'stablelm'" in caplog.text
    assert "architecture=causal" in caplog.text


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ("BertForMaskedLM", "encoder alone")),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, ("'mamba'", "recurrent state")),
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, ("T5EncoderModel", "encoder alone")),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequence",)),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, ("'vit'",)),
    ],
)
@pytest.mark.parametrize("architecture", ["auto", "causal"])
def test_unsupported_models(tmp_path: Path, config: dict[str, Any], named: tuple[str, ...], architecture: str) -> None:
    """The message has the reason, the supported types and how to add one; nothing is written."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AccelError) as caught:
        execute(compose(overrides_for(tmp_path / "model", tmp_path / "art", f"architecture={architecture}")))
    for part in (*named, "gpt2", "whisper", "docs/add-an-architecture.md"):
        assert part in str(caught.value)
    assert not (tmp_path / "art").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stage=benchmark benchmark.new_tokens=500", ("benchmark.new_tokens=500", "532 positions", "has 512")),
        ("stage=profile profile.source_length=500", ("profile.source_length=500", "'gpt2'")),
        ("stage=verify verify.max_new_tokens=600", ("verify.max_new_tokens=600", "has 512")),
    ],
)
def test_more_positions_than_the_model_has(
    checkpoint: Callable[[str], Path], tmp_path: Path, override: str, named: tuple[str, ...]
) -> None:
    """Lengths beyond the model's positions are refused before any stage of those requested."""
    with pytest.raises(AccelError) as caught:
        execute(compose(overrides_for(checkpoint("gpt2"), tmp_path, *override.split())))
    for part in named:
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


AXES = "{attention_mask: {0: batch_size, 1: new}}"


@pytest.mark.parametrize(
    ("family", "override", "named"),
    [
        ("llama", "+architecture.layers=n_layers", ("layers=n_layers", "num_hidden_layers")),
        ("llama", "+architecture.present=present.key", ("4 tensor specs", "present.key")),
        ("llama", "+architecture.past='past.{layer}.{prat}'", ("past.{layer}.{prat}", "{layer}", "{part}")),
        (
            "llama",
            "+architecture.axes={input_ids: {0: batch_size, 1: length}}",
            ("input_ids", "'length'", "batch_size, kept, new"),
        ),
        ("llama", f"+architecture.axes={AXES}", ("decode: attention_mask", "axis 1", "new, here 3", "[2, 10]")),
        ("llama", "+architecture.axes={logits: {0: batch_size, 3: new}}", ("logits", "axis 3", "[2, 7, 120]")),
        ("llama", "+architecture.axes={logits: {0: batch_size}}", ("logits", "axis 1 has no name", "[3, 4, 120]")),
        ("llama", f"architecture._target_={SEQ2SEQ}", ("encoder", "LlamaForCausalLM")),
        ("bart", f"architecture._target_={CAUSAL}", ("prefill", "BartForConditionalGeneration")),
        (
            "llama",
            "+architecture.wrapper={_target_: torch.nn.Linear, _partial_: true}",
            ("wrappers", "LlamaForCausalLM"),
        ),
        ("llama", "+architecture.wrapper={_target_: torch.nn.Liner, _partial_: true}", ("torch.nn.Liner",)),
        ("llama", "+architecture.warpper=x", ("warpper",)),
    ],
)
def test_yaml_that_does_not_fit_the_model(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, override: str, named: tuple[str, ...]
) -> None:
    """`export` fails before it traces, and names the tensor, the expected and the actual shape."""
    with pytest.raises(AccelError) as caught:
        execute(compose(overrides_for(checkpoint(family), tmp_path, "stage=export", override)))
    for part in named:
        assert part in str(caught.value)
    assert not list(tmp_path.rglob("*.onnx"))
