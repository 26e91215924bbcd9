"""What the server's section of the configuration says, and what schedulers are told."""

from dataclasses import fields

from accel.config.serve import ServeConfig
from accel.serve.requests.served_model import scheduler_limits
from accel.serve.scheduling.limits import SchedulerLimits


def test_every_limit_of_a_scheduler_can_be_configured() -> None:
    """The defaults are the same, and other values arrive."""
    assert scheduler_limits(ServeConfig()) == SchedulerLimits()
    config = ServeConfig(
        max_rows=3,
        max_waiting=5,
        max_prompt_tokens=7,
        max_total_tokens=11,
        stall_s=0.5,
        window_s=0.25,
        shared_prefixes=0,
    )
    limits = scheduler_limits(config)
    assert limits == SchedulerLimits(3, 5, 7, 11, 0.5, 0.25, 0)
    assert all(getattr(limits, field.name) != field.default for field in fields(SchedulerLimits))
