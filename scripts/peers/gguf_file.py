"""A Llama checkpoint as a GGUF file in Q8_0, for llama.cpp."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write the weights of a Llama as llama.cpp reads them: matrices in Q8_0, vectors in FP32.

    The file has no vocabulary, since ids go in and come out. The format is described in
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and names of tensors in the package `gguf`.

    Args:
        checkpoint: Folder with `config.json` and `model.safetensors`.
        path: The file to write.

    Raises:
        ValueError: The checkpoint isn't a Llama.
    """
    import gguf  # here, as only the peers' environment has it

    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"{checkpoint} has model_type {config['model_type']!r}: only llama is written as GGUF")
    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    _add_dimensions(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:  # NumPy has no bfloat16
        for name in weights.keys():  # noqa: SIM118 - not a dict
            array = weights.get_tensor(name).float().numpy()
            part = name.split(".")[-2]
            if part in heads:
                array = interleave_rotary(array, heads[part])
            if array.ndim == 1:
                kind = gguf.GGMLQuantizationType.F32
            else:
                kind = gguf.GGMLQuantizationType.Q8_0
                array = gguf.quants.quantize(array, kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(path)


def _add_dimensions(writer: Any, config: dict[str, Any]) -> None:
    """Add a Llama's dimensions to the header."""
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def interleave_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection for llama.cpp's rotary positions.

    Hugging Face rotates the two halves of a head against each other, llama.cpp neighbouring features, as the original
    Llama did.

    Args:
        weight: [heads * head size, features].
        heads: Number of heads.
    """
    rows, features = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, features)
    return halves.swapaxes(1, 2).reshape(rows, features)
