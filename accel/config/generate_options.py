"""The section `generate`: options of accel's own beside those of transformers' `GenerationConfig`."""

from typing import Any

OWN_OPTIONS = frozenset({"text", "file", "audio", "output", "batch_size", "seed", "chat"})


def generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the `generate` section that are transformers' own."""
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS}
