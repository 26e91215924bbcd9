"""Section `export_triton`: a model repository for NVIDIA's Triton Inference Server."""

from dataclasses import dataclass

from accel.config.bounds import number


@dataclass
class ExportTritonConfig:
    """Model repository of `stage=export_triton`.

    Attributes:
        output: Folder of the repository, which may hold other models; the model becomes its folder `model.name`.
        instances: Instances of the model: on the CPU as many processes, with a GPU so many on each.
    """

    output: str | None = None
    instances: int = number(1, 1, 64)
