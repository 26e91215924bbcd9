"""Compose the configuration, run the stages; nothing else."""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from accel.cli import console
from accel.cli.messages import USER_ERRORS, explain
from accel.config import hydra_setup
from accel.errors import VerificationError

FAILED = 2


def main() -> None:
    """The console script `accel`. Exits with 0, or with 2 after one message that says what was wrong."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to us: Hydra's own report is more than a screen
    try:
        hydra_setup.register()
        sys.argv[1:] = resolved_for_display(sys.argv[1:])
    except USER_ERRORS as error:
        console.fail(explain(error))
        sys.exit(FAILED)
    failures: list[str] = []

    @hydra.main(config_path="pkg://accel.conf", config_name="config", version_base="1.3")
    def job(composed: DictConfig) -> None:
        # Errors end here and not in Hydra: in a sweep, one job's failure is a row of the table, and the rest goes on.
        settings = HydraConfig.get()
        console.install(settings.verbose)
        message, summaries = None, dict[str, Mapping[str, Any]]()
        try:
            summaries |= run(composed, list(settings.overrides.task))
        except USER_ERRORS as error:
            message = explain(error)
            failures.append(message)
            console.fail(message)
            if isinstance(error, VerificationError):
                summaries["verify"] = error.found
        except Exception as error:  # a defect: in a sweep it is a row too, and Hydra raises it when all jobs are done
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            if settings.mode is RunMode.MULTIRUN:
                from accel.cli import sweep_table

                sweep_table.record(settings, list(settings.overrides.task), summaries, message)

    try:
        job()
    except USER_ERRORS as error:
        console.fail(explain(error))
        sys.exit(FAILED)
    if failures:
        sys.exit(FAILED)


def resolved_for_display(arguments: list[str]) -> list[str]:
    """Return the arguments of `--cfg job` with every `auto` replaced, so that it prints what would run.

    Those of any other command stay as they are.
    Raises `AccelError` or one of Hydra's errors where the configuration can't be used.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--multirun", "-m", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    if known.cfg not in ("job", "all") or known.multirun:
        return arguments
    from accel.cli.compose import resolved_overrides

    overrides = [given for given in rest if "=" in given and not given.startswith("-")]
    options = [given for given in rest if given not in overrides]
    return ["--cfg", known.cfg, *options, *resolved_overrides(overrides)]


def run(composed: DictConfig, overrides: list[str]) -> dict[str, Mapping[str, Any]]:
    """Run the stages of one job and print what they found. Returns the summaries of those that were asked for."""
    from accel.cli import compose, report
    from accel.system.quiet import quiet

    quiet()
    config = compose.settle(composed, overrides)
    artifacts = compose.execute(config)
    report.finish(config, artifacts)
    return {name: artifact.summary for name, artifact in artifacts.items()}


if __name__ == "__main__":
    main()
