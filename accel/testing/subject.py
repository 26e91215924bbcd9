"""Subject of the checks: one architecture on one random model, in PyTorch and as a deployable."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from accel.adapters import registry
from accel.adapters.types import Architecture, Component
from accel.api import UP_TO_VERIFY
from accel.cli.compose import compose, execute
from accel.data.pretrained import load_config
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.models.model_class import model_class
from accel.pipeline.store import Artifact
from accel.runtime import layout

NEW_TOKENS = 12
# Options of `generate` for all checks. Random weights would generate one token over and over, which would hide a wrong
# cache: no token may be generated twice.
UNIQUE_TOKENS = {
    "max_new_tokens": NEW_TOKENS,
    "min_new_tokens": NEW_TOKENS,
    "no_repeat_ngram_size": 1,
    "do_sample": False,
}
BUCKETS = [8, 16, 24, 40, 64, 512]  # in tokens; small enough that generations move from one bucket to the next


def random_model(config: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """Return a model with random weights, in which exchanging any two parameters changes the output.

    Biases and norms are made different from each other, and small weights larger, so that attention is not uniform.

    Args:
        config: Values of a Hugging Face config, `model_type` included.
        seed: Seed of the weights.

    Returns:
        The model in evaluation mode, in FP32 on the CPU.
    """
    values = dict(config)
    model_config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    transformers_class = model_class(model_config)
    model: PreTrainedModel = transformers_class._from_config(model_config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.std() < 0.05:  # most families' initialisation, with which all tokens get equal attention
                parameter.mul_(3)
    return model


@dataclass(frozen=True)
class Subject:
    """One architecture on one random model.

    Attributes:
        eager: The model in PyTorch.
        model: The FP32 deployable, with dynamic caches.
        architecture: The adapter.
        artifacts: Artifacts of the FP32 stages, by stage.
        fp16_overrides: Hydra overrides of the FP16 stages.
        static: The FP32 deployable with static caches; None if the model can't be exported with them.
    """

    eager: PreTrainedModel
    model: AcceleratedModel
    architecture: Architecture
    artifacts: Mapping[str, Artifact]
    fp16_overrides: Sequence[str]
    static: AcceleratedModel | None = None

    @cached_property
    def fp16_artifacts(self) -> Mapping[str, Artifact]:
        """Artifacts of the FP16 stages, by stage; they run when this is first needed."""
        return execute(compose(self.fp16_overrides))

    @property
    def has_encoder(self) -> bool:
        """True for encoder-decoder models."""
        return Component.ENCODER in self.architecture.components()

    def inputs(self, rows: int = 1, length: int = 9) -> dict[str, Any]:
        """Return random inputs of `generate`: [rows, length, ...], with padding where there are several rows."""
        generator = torch.Generator().manual_seed(rows)
        inputs = self.architecture.sample_inputs(self.eager.config, rows, length, generator)
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def ids(self, rows: int, length: int, seed: int = 5) -> Tensor:
        """Return random ids [rows, length] without special ones."""
        vocabulary = self.eager.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
        return ids.to(self.model.device)

    def generate_both(self, **options: Any) -> tuple[Any, Any]:
        """Return the results of PyTorch's and the deployable's `generate`, from the same seed.

        `options` are added to `UNIQUE_TOKENS`.
        """
        results = []
        for model in (self.eager, self.model):
            torch.manual_seed(0)
            with torch.inference_mode():
                results.append(model.generate(**UNIQUE_TOKENS | options))  # type: ignore[operator]
        return results[0], results[1]

    def assert_same_tokens(self, distinct: int = NEW_TOKENS - 2, **options: Any) -> Tensor:
        """Generate with PyTorch and the deployable, and require equal and varied tokens.

        Args:
            distinct: Smallest number of different ids in the first row. With fewer, a mistake might not show.
            options: Inputs and options of `generate`, added to `UNIQUE_TOKENS`.

        Returns:
            The ids, [rows, length].

        Raises:
            AssertionError: The tokens differ or are not varied enough.
        """
        expected, actual = self.generate_both(**options)
        assert torch.equal(actual, expected), f"PyTorch generates {expected.tolist()}, the deployable {actual.tolist()}"
        different = len(set(actual[0].tolist()))
        assert different >= distinct, (
            f"only {different} different ids in {actual[0].tolist()}, at least {distinct} are needed to show a mistake"
        )
        return actual  # type: ignore[no-any-return]


FP16 = (
    "precision=fp16",
    "verify.min_token_agreement=0",  # rounding changes tokens of random weights: only the outputs' errors are judged
    "merge.strategy=three_branch",  # as for a GPU
    "convert.transpose_weights=true",
)


def _overrides(checkpoint: Path, artifacts: Path, runtime: str) -> list[str]:
    """Return the overrides that a subject's FP32 and FP16 deployables have in common."""
    overrides = [
        "model=auto",
        f"model.checkpoint={checkpoint}",
        f"model.name={checkpoint.parent.name}",
        f"artifacts={artifacts}",
        f"runtime={runtime}",
        UP_TO_VERIFY,
        "verify.unique_tokens=true",
        "verify.latency=false",
        "convert.static_decode=true",
        "convert.fuse_transposed_matmul=true",
    ]
    if runtime == "cpu":
        overrides.append("convert.fuse_attention=[static_decode]")  # so that the CPU tests what a GPU runs
    return overrides


@contextmanager
def prepare(
    config: Mapping[str, Any],
    folder: Path,
    overrides: Sequence[str] = (),
    artifacts: Path | None = None,
    runtime: str = "cpu",
) -> Iterator[Subject]:
    """Run the stages up to `verify` on a random model in FP32, and open the deployable.

    Args:
        config: Values of a Hugging Face config, `model_type` included.
        folder: Folder for the checkpoint and, unless `artifacts` names another, for the artifacts. An existing
            checkpoint is used again.
        overrides: Hydra overrides, such as `architecture=mine`.
        artifacts: Folder for the artifacts.
        runtime: Preset: name of a YAML file in `conf/runtime`.

    Yields:
        The subject. Its models are closed afterwards.

    Raises:
        AccelError: A stage failed.
    """
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        random_model(config).save_pretrained(checkpoint)
    common = [*_overrides(checkpoint, artifacts or folder / "artifacts", runtime), *overrides]
    fp32_config = compose([*common, "precision=fp32"])
    fp32_artifacts = execute(fp32_config)
    transformers_class = model_class(load_config(checkpoint))
    eager = transformers_class.from_pretrained(checkpoint, attn_implementation="eager").eval()
    deployable = fp32_artifacts["verify"].folder
    with ExitStack() as stack:
        model = stack.enter_context(load(deployable, runtime=runtime))
        static = None
        if layout.first_variant(deployable).static_decode.is_file():
            static = stack.enter_context(load(deployable, runtime, static=True, capture=True, buckets=BUCKETS))
        architecture = registry.build(fp32_config.architecture)
        yield Subject(eager.to(model.device), model, architecture, fp32_artifacts, [*common, *FP16], static)
