"""The folder that a deployable is copied to, and its model card."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig

from accel.errors import AccelError
from accel.models import integrity
from accel.pipeline.store import Manifest, folder_files
from accel.reporting import card, delivery
from accel.runtime.layout import MANIFEST, SUFFIXES, DeployableFiles, variants
from tests.families import FAMILIES

SOURCE = {"id": "someone/small", "license": "mit", "license_name": None, "license_link": None, "pipeline_tag": None}


def deployable(folder: Path, dtype: str, family: str = "llama", content: bytes = b"graph", **source: Any) -> Path:
    """A folder with everything that `verify` writes, but for the contents of the graphs."""
    values = FAMILIES[family]
    config = AutoConfig.for_model(**values)
    config.save_pretrained(folder)
    files = DeployableFiles(folder, dtype, config.is_encoder_decoder)
    files.decoder.parent.mkdir(exist_ok=True)
    files.decoder.write_bytes(content)
    files.decoder.with_name(f"{files.decoder.name}_data").write_bytes(content)
    verification = {
        "precision": dtype,
        "execution": "native",
        "runtime": "cpu",
        "inputs": 8,
        "references": 20,
        "identical": {"greedy": 1.0, "beams": 0.875},
        "metrics": {"ours": {"exact_match": 97.5}},
        "passed": True,
    }
    certificate = {
        "model": "small",
        "checkpoint": SOURCE | source,
        "compared": {"kind": "random ids"},
        "verification": verification,
    }
    files.verification.write_text(json.dumps(verification))
    files.certificate.write_text(json.dumps(certificate))
    write_manifest(folder, dtype)
    return folder


def write_manifest(folder: Path, dtype: str) -> None:
    """Write the manifest of an artifact, and the list of files that its verification is of."""
    path = DeployableFiles(folder, dtype).verification
    hashes = {name: record.sha256 for name, record in folder_files(folder).items() if name.startswith(("onnx", "conf"))}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": hashes}))
    manifest = Manifest(
        stage="verify",
        key="0",
        upstream={},
        config={"runtime": {"name": dtype}},
        packages={},
        seconds=1.0,
        peak_memory=1,
        added_memory=1,
        summary={},
        files=folder_files(folder),
    )
    (folder / MANIFEST).write_text(manifest.dump())


def content(folder: Path) -> set[str]:
    """Relative paths of all files."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "order", [("float16", "float32"), ("float32", "float16"), ("int4", "float32", "int8"), ("int8", "int4")]
)
def test_variants_join(order: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each keeps its graphs and records; config.json lists the external data of all, and the card their figures."""
    target = tmp_path / "out"
    for dtype in order:
        delivery.deliver(deployable(tmp_path / dtype, dtype), target)
    expected = {"config.json", "README.md"}
    for suffix in map(SUFFIXES.get, order):
        expected |= {f"onnx/model{suffix}.onnx", f"onnx/model{suffix}.onnx_data", f"manifest{suffix}.json"}
        expected |= {f"verification{suffix}.json", f"certificate{suffix}.json"}
    assert content(target) == expected
    config = json.loads((target / "config.json").read_text())
    listed = config["transformers.js_config"]["use_external_data_format"]
    assert listed == {f"model{SUFFIXES[dtype]}.onnx": 1 for dtype in order}
    for dtype in order:
        manifest = json.loads((target / f"manifest{SUFFIXES[dtype]}.json").read_text())
        assert manifest["config"]["runtime"]["name"] == dtype
        assert json.loads((target / f"verification{SUFFIXES[dtype]}.json").read_text())["precision"] == dtype
    for variant in variants(target):
        integrity.check_files(variant, "full")
        integrity.warn_if_unverified(variant)
    assert caplog.messages == []
    results = ModelCard.load(target / "README.md").data.eval_results
    assert {result.dataset_config for result in results} == set(order)


def test_the_same_dtype_is_replaced(tmp_path: Path) -> None:
    """No file of the earlier build stays."""
    target = tmp_path / "out"
    delivery.deliver(deployable(tmp_path / "first", "float32", content=b"first"), target)
    stale = target / "certificate.html"
    stale.write_text("of the first")
    delivery.deliver(deployable(tmp_path / "second", "float32", content=b"second"), target)
    assert (target / "onnx" / "model.onnx").read_bytes() == b"second"
    assert not stale.exists()


def test_another_model_is_refused(tmp_path: Path) -> None:
    """As is a folder of other things, and a file."""
    target = tmp_path / "out"
    delivery.deliver(deployable(tmp_path / "llama", "float32"), target)
    before = content(target)
    with pytest.raises(AccelError, match="holds another model"):
        delivery.deliver(deployable(tmp_path / "t5", "float16", "t5"), target)
    assert content(target) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(AccelError, match="not empty and holds no deployable"):
        delivery.deliver(tmp_path / "llama", tmp_path / "notes")
    with pytest.raises(AccelError, match="is a file"):
        delivery.deliver(tmp_path / "llama", tmp_path / "notes" / "a.txt")


def test_damaged_variant(tmp_path: Path) -> None:
    """Nothing joins a variant whose files differ from its manifest, or that has another tokenizer."""
    target = tmp_path / "out"
    delivery.deliver(deployable(tmp_path / "first", "float32"), target)
    (target / "generation_config.json").write_text("{}")
    with pytest.raises(AccelError, match=r"generation_config\.json is not in manifest"):
        delivery.deliver(deployable(tmp_path / "second", "float16"), target)
    (target / "generation_config.json").unlink()
    for folder, content in ((tmp_path / "third", "{}"), (tmp_path / "fourth", "[]")):
        deployable(folder, "float16" if content == "[]" else "float32")
        (folder / "tokenizer.json").write_text(content)
        write_manifest(folder, "float16" if content == "[]" else "float32")
    delivery.deliver(tmp_path / "third", target)
    with pytest.raises(AccelError, match=r"another tokenizer\.json, in float32"):
        delivery.deliver(tmp_path / "fourth", target)


def test_the_front_matter(tmp_path: Path) -> None:
    """The hub's fields, and the certificate's figures as `model-index`."""
    folder = deployable(tmp_path, "float32")
    card.write(folder)
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("someone/small", "quantized")
    assert (data.license, data.pipeline_tag, data.library_name) == ("mit", "text-generation", "transformers.js")
    figures = {result.metric_type: result.metric_value for result in data.eval_results}
    assert figures == {"identical_to_pytorch_greedy": 1.0, "identical_to_pytorch_beams": 0.875, "exact_match": 97.5}


@pytest.mark.parametrize(
    ("family", "task", "optimum"),
    [
        ("t5", "text2text-generation", "ORTModelForSeq2SeqLM"),
        ("whisper", "automatic-speech-recognition", "ORTModelForSpeechSeq2Seq"),
        ("gpt2", "text-generation", "ORTModelForCausalLM"),
    ],
)
def test_the_task(tmp_path: Path, family: str, task: str, optimum: str) -> None:
    """By the config, for a source whose own card names none; without an id there is no `base_model`."""
    folder = deployable(tmp_path, "float32", family, id=None)
    card.write(folder)
    loaded = ModelCard.load(folder / "README.md")
    assert loaded.data.pipeline_tag == task
    assert loaded.data.base_model is None
    assert optimum in loaded.text


def test_a_merged_adapter(tmp_path: Path) -> None:
    """The card names it, and a model with other weights than its checkpoint on the hub is no quantized copy of that."""
    for adapter, relation in ((None, "quantized"), ("rhymes", "finetune")):
        folder = deployable(tmp_path / relation, "float32", adapter=adapter)
        card.write(folder)
        loaded = ModelCard.load(folder / "README.md")
        assert loaded.data.base_model == "someone/small"
        assert loaded.data.base_model_relation == relation
        assert ("with the PEFT adapter `rhymes` merged in" in loaded.text) is (adapter is not None)


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    """A variant with an adapter doesn't join one without, whose files beside the graphs are the same."""
    target = tmp_path / "out"
    delivery.deliver(deployable(tmp_path / "plain", "float32", key="a"), target)
    before = content(target)
    with pytest.raises(AccelError, match=r"other weights .* model\.peft_adapter"):
        delivery.deliver(deployable(tmp_path / "adapted", "float16", key="b", adapter="rhymes"), target)
    assert content(target) == before
    delivery.deliver(deployable(tmp_path / "half", "float16", key="a"), target)


def test_the_source(tmp_path: Path) -> None:
    """Licence and task are those of the checkpoint's own card; a folder is no id."""
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: translation\n---\nText")
    found = card.source_of("someone/small", tmp_path)
    assert (found["id"], found["license"], found["pipeline_tag"]) == ("someone/small", "apache-2.0", "translation")
    assert card.source_of(str(tmp_path), tmp_path)["id"] is None
    assert card.source_of("accel://t5-g2p", tmp_path / "none")["license"] is None
