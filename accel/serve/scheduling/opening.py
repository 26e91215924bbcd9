"""Choice of the scheduler for a model."""

import logging

from accel.errors import AccelError
from accel.models.generation import AcceleratedModel
from accel.serve.protocol import Scheduler
from accel.serve.scheduling.batch_scheduler import BatchScheduler
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.row_scheduler import RowScheduler

logger = logging.getLogger(__name__)


def open_scheduler(model: AcceleratedModel, limits: SchedulerLimits | None = None) -> Scheduler:
    """Return a scheduler for a model: continuous batching where the model can have rows, else padded batches.

    Args:
        model: The model, opened with `static=True` for continuous batching. It stays the caller's, who closes it after
            the scheduler.
        limits: The limits; by default those of `SchedulerLimits`.

    Returns:
        The scheduler. Call `warm_up` before the first request, and `close` at the end.
    """
    limits = SchedulerLimits() if limits is None else limits
    reason = f"its input is {model.main_input_name}"
    if model.main_input_name == "input_ids":
        try:
            return RowScheduler(model, limits)
        except (AccelError, ValueError) as error:
            reason = str(error)
    logger.warning("requests are served in padded batches, not in rows that begin and end by themselves: %s", reason)
    return BatchScheduler(model, limits)
