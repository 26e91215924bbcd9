"""Limits of one model's scheduler."""

from dataclasses import dataclass

from accel.errors import AccelError


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of one model's scheduler.

    Attributes:
        rows: Largest number of requests that are decoded at once.
        queue: Largest number of requests that wait.
        prompt_tokens: Longest prompt; beside an encoder, longest input of the encoder.
        total_tokens: Most tokens that a row holds: decoder prompt and new tokens. At most the positions of the model.
        stall_s: Time that running requests may wait between two tokens for the prompts of others, in seconds. Parts of
            prompts are as long as the measured speed allows.
        window_s: Time that a request waits for further ones to be encoded or batched with, in seconds.
        shared_prefixes: Number of prompt beginnings kept that several prompts share; 0 for none.
    """

    rows: int = 32
    queue: int = 256
    prompt_tokens: int = 4096
    total_tokens: int = 4096
    stall_s: float = 0.1
    window_s: float = 0.005
    shared_prefixes: int = 4

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("queue", 1), ("prompt_tokens", 1), ("total_tokens", 2)):
            if getattr(self, name) < least:
                raise AccelError(f"{name}={getattr(self, name)}: expected at least {least}")
        for name in ("stall_s", "window_s", "shared_prefixes"):
            if getattr(self, name) < 0:
                raise AccelError(f"{name}={getattr(self, name)}: expected at least 0")
