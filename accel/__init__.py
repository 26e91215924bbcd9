"""Faster token-by-token generation for Hugging Face models, with the same words coming out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.api import build, load, register

__all__ = ["build", "load", "register"]


def __getattr__(name: str) -> Any:
    """The public functions, imported on first use: `python -m accel --help` must not wait for torch."""
    if name in __all__:
        from accel import api

        return getattr(api, name)
    raise AttributeError(f"module 'accel' has no attribute {name!r}")
