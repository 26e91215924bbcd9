"""Compose the configuration, run the stages; nothing else."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from accel import console, schema
from accel.errors import AccelError

FAILED = 2
USER_ERRORS = (AccelError, HydraException, OmegaConfBaseException, OSError)


def main() -> None:
    """The console script `accel`. Exits with 0, or with 2 after one message that says what was wrong."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to us: Hydra's own report is more than a screen
    schema.register()
    failures: list[str] = []

    @hydra.main(config_path="pkg://accel.conf", config_name="config", version_base="1.3")
    def job(composed: DictConfig) -> None:
        from accel import application, report

        settings = HydraConfig.get()
        try:
            config = application.settle(composed, list(settings.overrides.task))
            pipeline, artifacts = application.execute(config)
        except USER_ERRORS as error:
            if settings.mode is not RunMode.MULTIRUN:
                raise
            failures.append(str(error))  # one job's failure is a row of the table, and the sweep goes on
            report.sweep_row(settings, None, str(error))
            console.fail(_message(error))
            return
        report.finish(config, pipeline, artifacts)
        if settings.mode is RunMode.MULTIRUN:
            report.sweep_row(settings, artifacts, None)

    try:
        job()
    except USER_ERRORS as error:
        console.fail(_message(error))
        sys.exit(FAILED)
    if failures:
        sys.exit(FAILED)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, AccelError):
        return f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
    return str(error)


if __name__ == "__main__":
    main()
