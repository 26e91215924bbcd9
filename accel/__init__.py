"""Faster token-by-token generation for Hugging Face models, with token-identical output."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.adapters.registry import register as register
    from accel.api import build as build
    from accel.models.loading import load as load

# Imported on first use: `python -m accel --help` must not wait for torch, nor `load` for what only building needs.
_HOMES = {"build": "accel.api", "load": "accel.models.loading", "register": "accel.adapters.registry"}
__all__ = ["build", "load", "register"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'accel' has no attribute {name!r}")
