"""Section `generate`: options of accel's own, and options of transformers' `GenerationConfig`."""

from typing import Any

OWN_OPTIONS = frozenset({"text", "file", "audio", "output", "batch_size", "seed", "chat"})


def generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that belong to transformers' `GenerationConfig`.

    Args:
        options: Section `generate` of the configuration.
    """
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS}
