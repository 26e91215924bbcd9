"""Faster token-by-token generation for Hugging Face models, with token-identical output."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.adapters.registry import register as register
    from accel.api import build as build
    from accel.models.loading import load as load

# Imported on first use, so that `python -m accel --help` needn't wait for torch, nor `load` for the export's packages.
_MODULES = {"build": "accel.api", "load": "accel.models.loading", "register": "accel.adapters.registry"}
__all__ = ["build", "load", "register"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'accel' has no attribute {name!r}")
