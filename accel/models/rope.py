"""Rotary embeddings whose angles depend on more than a token's own position."""

from transformers import PretrainedConfig

ROPE_BY_LENGTH = ("dynamic", "longrope")  # https://huggingface.co/docs/transformers/internal/rope_utils


def angles_depend_on_length(config: PretrainedConfig) -> bool:
    """Return whether rotary embeddings depend on the length of the whole input, so that it must not be cut."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [each for each in parameters.values() if isinstance(each, dict)]
    return any(each.get("rope_type") in ROPE_BY_LENGTH for each in (parameters, *by_layer_type))
