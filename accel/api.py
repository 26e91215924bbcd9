"""`accel.build`: from a checkpoint to a deployable, in Python."""

from collections.abc import Sequence

from accel.cli.compose import compose, execute
from accel.errors import AccelError
from accel.pipeline.store import Artifact

UP_TO_VERIFY = "stage=[export,optimize,convert,merge,verify]"  # and what these take


def build(checkpoint: str | None = None, overrides: Sequence[str] = ()) -> Artifact:
    """Take a checkpoint (folder or hub id; None: the embedded model) through the stages up to `verify`.

    `overrides` are as on the command line. Returns the last stage's artifact; its `folder` holds the deployable, or the
    candidate if `stage=[...]` among the overrides stops before `verify`. Raises `AccelError`.
    """
    model = [] if checkpoint is None else ["model=auto", f"model.checkpoint={checkpoint}"]
    config = compose([*model, UP_TO_VERIFY, *overrides])
    artifacts = execute(config)
    for name in ("verify", "merge"):
        if name in artifacts:
            return artifacts[name]
    raise AccelError(f"stage={config.stage} makes neither a deployable nor a candidate; it must reach merge")
