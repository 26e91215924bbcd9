"""Files beside the graphs in the bundle that `merge` writes."""

import json
from pathlib import Path

from accel.runtime import layout
from accel.stages import merge


def test_the_tokenizer_is_one_that_older_clients_load(tmp_path: Path) -> None:
    """Names that only transformers 5 knows are replaced; all else is copied, but no weights."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    config = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"], "pad_token": "<pad>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "model.safetensors", "model.safetensors.index.json", "README.md"):
        (source / name).write_text("{}")
    merge.copy_checkpoint_files(source, out, with_code=False)
    assert {path.name for path in out.iterdir()} == {"tokenizer_config.json", "tokenizer.json"}
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<x>"],
        "pad_token": "<pad>",
    }
    unchanged = {"tokenizer_class": "T5Tokenizer", "extra_special_tokens": {"image": "<i>"}}
    assert merge.portable_tokenizer_config(unchanged) == unchanged


def test_external_data_is_declared(tmp_path: Path) -> None:
    """By the graphs' file names; a folder without such data keeps its config.json as it is."""
    (tmp_path / layout.GRAPHS).mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    layout.declare_external_data(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "t5"}'
    (tmp_path / layout.GRAPHS / "encoder_model.onnx").touch()
    (tmp_path / layout.GRAPHS / "decoder_model_merged.onnx_data").touch()
    layout.declare_external_data(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "t5",
        "transformers.js_config": {"use_external_data_format": {"decoder_model_merged.onnx": 1}},
    }
