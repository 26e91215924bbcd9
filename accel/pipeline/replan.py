"""Repetition of a run whose low-bit weights failed the verification, with a plan that keeps more of them in FP32."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from accel.adapters.types import Architecture
from accel.config.schema import Config
from accel.errors import VerificationError
from accel.pipeline.runner import Pipeline
from accel.pipeline.store import Artifact

logger = logging.getLogger(__name__)

REPLANS = 3  # times that a plan goes back to the trials, each time with stricter limits
STRICTER = 2.0  # factor by which each of the trials' limits shrinks; with 4, most of a small model's int4 weights fell


def run_and_replan(
    config: Config, architecture: Architecture, stages: Sequence[str]
) -> tuple[Config, dict[str, Artifact]]:
    """Run `stages`; if `verify` refuses quantized weights, again with stricter limits for the trials.

    Returns:
        The configuration of the run that passed, and stage -> artifact of that run.

    Raises:
        AccelError: A stage failed, or the verification with the strictest limits, or without trials.
    """
    replannable = config.precision.weight_bits is not None and config.audit.trials > 0
    for _ in range(REPLANS if replannable else 0):
        try:
            return config, Pipeline(config, architecture).run(stages)
        except VerificationError as error:
            config = with_stricter_trials(config)
            logger.warning(
                f"{error}\nBack to the trials, whose limits are divided by precision.strictness="
                f"{config.precision.strictness:g}"
            )
    return config, Pipeline(config, architecture).run(stages)


def with_stricter_trials(config: Config) -> Config:
    """Return the configuration with each limit of the trials divided by `STRICTER` once more."""
    precision = config.precision
    return replace(config, precision=replace(precision, strictness=precision.strictness * STRICTER))
