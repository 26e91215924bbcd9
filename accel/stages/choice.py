"""Choose the fastest of several precisions whose verification passes: `precision=auto-lowbit`.

Each candidate runs through the stages up to `verify` as if it had been asked for by itself, and so shares their
artifacts with such runs. The artifact `choice` is the deployable of the one chosen, with the others and why they were
rejected in its manifest and certificate.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PretrainedConfig

from accel import progress
from accel.adapters.types import Architecture
from accel.benchmark.figures import spread
from accel.benchmark.timer import fixed_length_options, time_generation
from accel.config.presets import precision_candidates
from accel.config.schema import STAGES, Config
from accel.data import texts
from accel.errors import AccelError
from accel.models.loading import open_model
from accel.pipeline import estimate
from accel.pipeline.replan import run_and_replan
from accel.pipeline.runner import Pipeline, select_stages
from accel.pipeline.source import stage_source
from accel.pipeline.store import Artifact
from accel.reporting import certificate
from accel.runtime import layout
from accel.stages import verify
from accel.system.environment import machine
from accel.system.hashing import make_key

CHOICE, VERIFY = "choice", "verify"
ROUNDS = 7  # timed generations of each candidate, in turn, after one that isn't timed

TIME_SLACK = 1.1  # candidates within this factor of the fastest count as equally fast, and the first named is taken

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """What became of a candidate.

    Attributes:
        config: Configuration that its verification passed, or failed, with.
        deployable: Artifact of `verify`; None if it failed.
        reason: Why it failed; else empty.
    """

    config: Config
    deployable: Artifact | None
    reason: str = ""


def check(config: Config) -> None:
    """Check that the requested stages need a choice.

    Raises:
        AccelError: No stage reads what `verify` makes.
    """
    stages = select_stages(config.stage)
    if not any(STAGES.index(name) >= STAGES.index(VERIFY) for name in stages):
        raise AccelError(
            f"precision={config.precision.name} chooses by verification, which stage={config.stage} doesn't reach: add "
            f"{VERIFY}, or name one of precision.candidates={config.precision.candidates}"
        )


def run(config: Config, architecture: Architecture, description: PretrainedConfig) -> dict[str, Artifact]:
    """Choose a precision, then run the requested stages with it.

    Args:
        config: The configuration, whose `precision.candidates` are tried.
        architecture: Adapter of the model.
        description: Hugging Face config of the model.

    Returns:
        Stage -> artifact. That of `verify` is the artifact `choice`.

    Raises:
        AccelError: No candidate passed, or a stage failed.
    """
    undelivered = replace(config, output=None)
    candidates = {
        name: replace(undelivered, precision=precision)
        for name, precision in precision_candidates(config.precision).items()
    }
    key = _key(candidates, architecture)
    store = Pipeline(undelivered, architecture).store
    chosen = store.find(CHOICE, key)
    if chosen is None:
        attempts = {name: _attempt(name, each, architecture, description) for name, each in candidates.items()}
        passed = {name: each.deployable for name, each in attempts.items() if each.deployable is not None}
        if not passed:
            reasons = "\n".join(f"{name}: {each.reason}" for name, each in attempts.items())
            raise AccelError(f"precision={config.precision.name}: no candidate passed\n{reasons}")
        chosen = store.build(
            CHOICE,
            key,
            lambda folder: _choose(attempts, passed, architecture, description, folder),
            upstream={f"{VERIFY} {name}": artifact.key for name, artifact in passed.items()},
            config={"precision": asdict(config.precision), VERIFY: asdict(config.verify)},
            packages={},
        )
    precision = replace(config.precision, **chosen.summary["precision"])
    best = replace(undelivered, precision=precision)
    artifacts = Pipeline(best, architecture).run(select_stages(config.stage, mixed=not precision.exact))
    verify.deliver(config, chosen.folder)
    return artifacts | {VERIFY: chosen}


def _key(candidates: Mapping[str, Config], architecture: Architecture) -> str:
    """Return the SHA-256 of everything that the choice depends on, before anything runs."""
    runtime = next(iter(candidates.values())).runtime
    return make_key(
        source=stage_source(CHOICE),
        candidates={name: Pipeline(each, architecture).key(VERIFY) for name, each in candidates.items()},
        audits={name: asdict(each.audit) for name, each in candidates.items()},
        machine=machine(runtime.device, runtime.threads),
    )


def _attempt(name: str, config: Config, architecture: Architecture, description: PretrainedConfig) -> Attempt:
    """Build and verify one candidate."""
    progress.note(f"candidate {name}")
    stages = [*_before_verify(config), VERIFY]
    estimate.announce(config, description, Pipeline(config, architecture).pending(stages))
    try:
        passing, artifacts = run_and_replan(config, architecture, stages)
    except AccelError as error:
        logger.warning(f"candidate {name} is rejected: {error}")
        return Attempt(config, None, _reason(error))
    return Attempt(passing, artifacts[VERIFY])


def _before_verify(config: Config) -> list[str]:
    """Return the requested stages that come before `verify`."""
    stages = select_stages(config.stage, mixed=not config.precision.exact)
    return [name for name in stages if STAGES.index(name) < STAGES.index(VERIFY)]


def _reason(error: AccelError) -> str:
    """Return the line of an error's message that names the first failure, after the headline of `verify`."""
    first, *others = str(error).splitlines()
    return others[0] if first.endswith(":") and others else first


def fastest(seconds: Mapping[str, Sequence[float]]) -> str:
    """Return the candidate with the smallest median, or the first one that is as fast within `TIME_SLACK`.

    Args:
        seconds: Candidate -> seconds of each round, in the order of `precision.candidates`.
    """
    limit = TIME_SLACK * min(map(median, seconds.values()))
    return next(name for name, times in seconds.items() if median(times) <= limit)


def _choose(
    attempts: Mapping[str, Attempt],
    passed: Mapping[str, Artifact],
    architecture: Architecture,
    description: PretrainedConfig,
    out: Path,
) -> Mapping[str, Any]:
    """Copy the deployable of the fastest candidate into `out`, and return its summary with the choice."""
    seconds = _time_in_turn(attempts, passed, architecture, description)
    best = fastest(seconds)
    choice = []
    for name, attempt in attempts.items():
        summary = attempt.deployable.summary if attempt.deployable is not None else {}
        choice.append(
            {
                "precision": name,
                "chosen": name == best,
                "reason": attempt.reason or ("" if name == best else f"not faster than {best}"),
                "seconds": spread(seconds[name]) if name in seconds else None,
                "identical": summary.get("identical", {}),
                "metrics": summary.get("metrics", {}),
                "decoder_bytes": summary.get("decoder_bytes"),
            }
        )
    source = passed[best]
    shutil.copytree(source.folder, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(layout.MANIFEST))
    certificate.add_choice(layout.first_variant(out), choice)
    return {**source.summary, CHOICE: choice, "precision": asdict(attempts[best].config.precision)}


def _time_in_turn(
    attempts: Mapping[str, Attempt],
    passed: Mapping[str, Artifact],
    architecture: Architecture,
    description: PretrainedConfig,
) -> dict[str, list[float]]:
    """Return the seconds of greedy generation of `verify.max_new_tokens` tokens, `ROUNDS` for each that passed.

    In turn, so that a slow minute of the machine affects all of them. All are open at the same time.
    """
    first = next(iter(attempts.values())).config
    inputs = texts.random_inputs(architecture, description, 1, first.verify.source_length, first.verify.seed)[0]
    options = fixed_length_options(first.verify.max_new_tokens, 1, use_cache=True)
    seconds: dict[str, list[float]] = {name: [] for name in passed}
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(open_model(artifact.folder, first.runtime)) for name, artifact in passed.items()
        }
        for model in models.values():
            model.generate(**inputs, **options)
        for _ in progress.track(range(ROUNDS), "candidates in turn", total=ROUNDS):
            for name, model in models.items():
                seconds[name].append(time_generation(model, inputs, options).total)
    return seconds
