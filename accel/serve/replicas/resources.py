"""CPUs and GPUs of a replica."""

import os
from dataclasses import dataclass

import torch

from accel.config.schema import RuntimeConfig
from accel.config.serve import ServeConfig
from accel.errors import AccelError
from accel.runtime.providers import fastest


@dataclass(frozen=True)
class Resources:
    """What Ray reserves for each replica.

    Attributes:
        cpus: CPUs.
        gpus: GPUs.
    """

    cpus: int
    gpus: float


def cores() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def resources_per_replica(config: ServeConfig, runtime: RuntimeConfig | None) -> Resources:
    """Return what each replica needs.

    Args:
        config: Section `serve` of the configuration.
        runtime: Runtime of the models; None: the one that each was built for, or the fastest here.

    Raises:
        AccelError: This machine has fewer CPUs or GPUs than all replicas need, or the runtime names one GPU.
    """
    on_gpu = fastest() != "cpu" if runtime is None else runtime.device != "cpu"
    if runtime is not None and torch.device(runtime.device).index is not None:
        raise AccelError(f"runtime.device={runtime.device}: with serve.executor=ray, Ray chooses the GPU: use cuda")
    gpus = config.gpus_per_replica
    if gpus is None:
        gpus = 1.0 if on_gpu else 0.0
    elif runtime is not None and on_gpu and not gpus:
        raise AccelError(f"serve.gpus_per_replica=0: runtime={runtime.name} needs a GPU; or take runtime=cpu")
    most = max(config.replicas, config.max_replicas or 0)
    cpus = config.cpus_per_replica
    if cpus is None:
        cpus = 1 if gpus or config.ray_address is not None else max(1, cores() // most)
    if config.ray_address is None:
        _check_machine(most, Resources(cpus, gpus))
    return Resources(cpus, gpus)


def _check_machine(replicas: int, each: Resources) -> None:
    """Raise `AccelError` if this machine has less than `replicas` replicas need: Ray would wait for more forever."""
    for kind, needed, present in (("CPU", each.cpus, cores()), ("GPU", each.gpus, torch.cuda.device_count())):
        if replicas * needed > present:
            raise AccelError(
                f"{replicas} replicas with {kind}s={needed:g} each need {replicas * needed:g}, and this machine has "
                f"{present}: lower serve.replicas, serve.max_replicas or serve.{kind.lower()}s_per_replica, or join a "
                "cluster by serve.ray_address"
            )
