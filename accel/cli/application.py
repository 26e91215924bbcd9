"""Command line: compose the configuration, run the stages, print their results."""

import argparse
import os
import sys
import traceback
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
from accel.system.signals import interrupter

FAILED = 2  # exit code


def main() -> None:
    """Run the command line. Exit with 0, or with 2 after a message that explains the error."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # pass errors on: Hydra's own report fills more than a screen
    try:
        hydra_setup.register()
        hydra_setup.check_choices(_overrides_in(sys.argv[1:]))
        sys.argv[1:] = resolved_for_display(sys.argv[1:])
    except USER_ERRORS as error:
        console.fail(explain(error))
        sys.exit(FAILED)
    failures: list[str] = []

    @hydra.main(config_path="pkg://accel.conf", config_name="config", version_base="1.3")
    def job(composed: DictConfig) -> None:
        interrupter.by_exception()
        # Handle errors here and not in Hydra: in a sweep, a failed job is a row of the table, and the others go on.
        settings = HydraConfig.get()
        console.install(settings.verbose)
        message, summaries = None, dict[str, Mapping[str, Any]]()
        try:
            summaries |= run(composed, list(settings.overrides.task))
        except USER_ERRORS as error:
            message = explain(error)
            failures.append(message)
            if settings.verbose:
                traceback.print_exception(error)
            console.fail(message)
            if isinstance(error, VerificationError):
                summaries["verify"] = error.summary
        except Exception as error:  # a bug in accel: in a sweep it is a row too, and Hydra raises it after the last job
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            if settings.mode is RunMode.MULTIRUN:
                from accel.cli import sweep_table

                sweep_table.record(settings, list(settings.overrides.task), summaries, message)

    try:
        with (
            interrupter.at_once()
        ):  # until the job begins: OmegaConf's cleanup may raise another exception than a signal's
            job()
    except USER_ERRORS as error:
        console.fail(explain(error))
        sys.exit(FAILED)
    if failures:
        sys.exit(FAILED)


def resolved_for_display(arguments: list[str]) -> list[str]:
    """Replace every `auto` in the arguments of `--cfg job`, so that it prints the configuration that would run.

    Args:
        arguments: `sys.argv` without the program.

    Returns:
        The arguments to run Hydra with; those of any other command unchanged.

    Raises:
        AccelError: The configuration can't be used; Hydra's own errors are raised as well.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--multirun", "-m", action="store_true")
    options, remaining = parser.parse_known_args(arguments)
    if options.cfg not in ("job", "all") or options.multirun:
        return arguments
    from accel.cli.compose import resolved_overrides

    overrides = _overrides_in(remaining)
    flags = [argument for argument in remaining if argument not in overrides]
    return ["--cfg", options.cfg, *flags, *resolved_overrides(overrides)]


def _overrides_in(arguments: list[str]) -> list[str]:
    """Return those command-line arguments that are overrides."""
    return [argument for argument in arguments if "=" in argument and not argument.startswith("-")]


def run(composed: DictConfig, overrides: list[str]) -> dict[str, Mapping[str, Any]]:
    """Run the stages of one job and print their results.

    Args:
        composed: The configuration, as Hydra composed it.
        overrides: The overrides on the command line.

    Returns:
        Stage -> summary of its artifact, for the stages that were asked for.
    """
    with interrupter.at_once():
        from accel.benchmark.process import share_imports
        from accel.cli import compose, report
        from accel.config.schema import EXPORT_TRITON, SERVE
        from accel.pipeline.runner import includes
        from accel.system.host_memory import return_large_blocks
        from accel.system.quiet import quiet

    quiet()
    return_large_blocks()
    share_imports()
    config = compose.settle(composed, overrides)
    if includes(config.stage, SERVE):
        from accel.cli import serving

        return serving.run(config, overrides)
    if includes(config.stage, EXPORT_TRITON):
        from accel.cli import triton_export

        return triton_export.run(config)
    artifacts = compose.execute(config)
    report.finish(config, artifacts)
    return {name: artifact.summary for name, artifact in artifacts.items()}
