"""`accel.build`: from a checkpoint to a deployable, in Python."""

from collections.abc import Sequence

from accel.cli.compose import compose, execute
from accel.errors import AccelError
from accel.pipeline.store import Artifact

UP_TO_VERIFY = "stage=[export,optimize,convert,merge,verify]"  # stages that these depend on run as well


def build(checkpoint: str | None = None, overrides: Sequence[str] = ()) -> Artifact:
    """Run a checkpoint through the stages up to `verify`.

    Args:
        checkpoint: Folder or hub id; None for the model that ships with accel.
        overrides: Configuration values, as on the command line.

    Returns:
        The artifact of `verify`, whose `folder` is the deployable; or that of `merge`, whose `folder` is the unverified
        bundle, if `stage=[...]` among the overrides stops before `verify`.

    Raises:
        AccelError: The configuration can't be used, a stage failed, or the stages end before `merge`.
    """
    model_overrides = [] if checkpoint is None else ["model=auto", f"model.checkpoint={checkpoint}"]
    config = compose([*model_overrides, UP_TO_VERIFY, *overrides])
    artifacts = execute(config)
    for name in ("verify", "merge"):
        if name in artifacts:
            return artifacts[name]
    raise AccelError(f"stage={config.stage} makes neither a deployable nor an unverified bundle: add merge or verify")
