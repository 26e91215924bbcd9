"""`stage=export_triton`: build the deployable, and write it as a model of a Triton repository."""

from collections.abc import Mapping
from typing import Any

from accel.cli import console, report
from accel.cli.compose import execute
from accel.config.schema import Config
from accel.errors import AccelError
from accel.models import checkpoints
from accel.stages.generate import takes_speech


def run(config: Config) -> dict[str, Mapping[str, Any]]:
    """Build what is to be built, and write the model's folder.

    Args:
        config: Configuration.

    Returns:
        Stage -> summary of its artifact, for the stages that were asked for.

    Raises:
        AccelError: A package is missing, the model takes speech, or the folder can't be written.
    """
    try:
        from accel.serve.triton import repository
    except ImportError as error:
        message = f"stage=export_triton needs the package {error.name}: pip install 'accel-onnx[serve]'"
        raise AccelError(message) from error
    target = repository.check(config.export_triton, config.model.name)
    if takes_speech(checkpoints.model_config(config.model)):
        raise AccelError(
            f"stage=export_triton: model={config.model.name} takes speech, and only models of text are exported"
        )
    artifacts = execute(config)
    report.finish(config, artifacts)
    on_gpu = config.runtime.device != "cpu"
    repository.write(artifacts["verify"].folder, target, config.export_triton, config.serve, on_gpu)
    lines = (
        f"Triton model: {target}",
        f"  serve it  tritonserver --model-repository={target.parent.absolute()}",
        "  where python3 has accel-onnx with its extra serve: see docs/serving.md",
    )
    console.out.print("\n".join(lines), markup=False)
    return {name: artifact.summary for name, artifact in artifacts.items()}
