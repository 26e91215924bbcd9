"""What a measurement depends on beside the configuration."""

import platform
from pathlib import Path
from typing import Any

import torch

from accel.schema import Config


def machine(config: Config) -> dict[str, Any]:
    """Processor, device, driver and threads, as JSON."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": config.runtime.threads or torch.get_num_threads(),
        "device": config.runtime.device,
    }
    if config.runtime.device.startswith("cuda") and torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
