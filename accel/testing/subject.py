"""What the checks look at: one architecture on one random model, in PyTorch and as a deployable."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from accel.adapters import registry
from accel.adapters.types import Architecture, Component
from accel.api import UP_TO_VERIFY
from accel.cli.compose import compose, execute
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.models.model_class import model_class
from accel.pipeline.store import Artifact
from accel.runtime import layout

TOKENS = 12
# Random weights say one token over and over, which would hide a wrong cache: none may come twice.
BUCKETS = [8, 16, 24, 40, 64, 512]  # so close that a generation outgrows some
UNIQUE = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "no_repeat_ngram_size": 1, "do_sample": False}


def random_model(config: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """A model of `config`, a Hugging Face config with `model_type`, in which a mix-up of any two parameters shows.

    Biases and norms differ from each other, and weights are large enough for attention to choose.
    """
    values = dict(config)
    description = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(description)._from_config(description, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.std() < 0.05:  # as most families begin: attention would see all tokens alike
                parameter.mul_(3)
    return model


@dataclass(frozen=True)
class Subject:
    """One architecture on one random model: in PyTorch, as a deployable, and what the stages made on the way."""

    eager: PreTrainedModel
    model: AcceleratedModel
    architecture: Architecture
    artifacts: Mapping[str, Artifact]
    half: Mapping[str, Artifact]
    static: AcceleratedModel | None = None  # over caches of a fixed length, where the model's step allows them

    @property
    def encodes(self) -> bool:
        return Component.ENCODER in self.architecture.components()

    def inputs(self, rows: int = 1, length: int = 9) -> dict[str, Any]:
        """Random inputs, padded where there are several."""
        generator = torch.Generator().manual_seed(rows)
        given = self.architecture.sample_inputs(self.eager.config, rows, length, generator)
        return {name: value.to(self.model.device) for name, value in given.items()}

    def ids(self, rows: int, length: int, seed: int = 5) -> Tensor:
        """Random ids, special ones left out."""
        vocabulary = self.eager.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
        return ids.to(self.model.device)

    def both(self, **options: Any) -> tuple[Any, Any]:
        """What PyTorch and the deployable generate, from the same seed."""
        found = []
        for model in (self.eager, self.model):
            torch.manual_seed(0)
            with torch.inference_mode():
                found.append(model.generate(**UNIQUE | options))  # type: ignore[operator]
        return found[0], found[1]

    def same(self, distinct: int = TOKENS - 2, **options: Any) -> Tensor:
        """The tokens of both, which must be equal and of many kinds."""
        expected, found = self.both(**options)
        assert torch.equal(found, expected), f"PyTorch says {expected.tolist()}, the deployable {found.tolist()}"
        kinds = len(set(found[0].tolist()))
        assert kinds >= distinct, f"only {kinds} kinds of token in {found[0].tolist()}: too few to show a mistake"
        return found  # type: ignore[no-any-return]


@contextmanager
def prepare(
    config: Mapping[str, Any],
    folder: Path,
    overrides: Sequence[str] = (),
    artifacts: Path | None = None,
    runtime: str = "cpu",
) -> Iterator[Subject]:
    """Take a random model of `config` up to `verify`, in FP32 and FP16, on `runtime`, a YAML in `conf/runtime`.

    `folder` receives the checkpoint and, unless `artifacts` names another, what the stages make. Raises `AccelError`
    where a stage refuses.
    """
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        random_model(config).save_pretrained(checkpoint)
    common = [
        "model=auto",
        f"model.checkpoint={checkpoint}",
        f"model.name={folder.name}",
        f"artifacts={artifacts or folder / 'artifacts'}",
        f"runtime={runtime}",
        UP_TO_VERIFY,
        "verify.unique_tokens=true",
        "verify.latency=false",
        "convert.static_decode=true",
        "convert.fuse_transposed_matmul=true",
        *(["convert.fuse_attention=[static_decode]"] if runtime == "cpu" else []),  # as it is on a GPU
        *overrides,
    ]
    composed = compose([*common, "precision=fp32"])
    made = execute(composed)
    # random weights decide nearly at random: what counts in FP16 is that outputs are within rounding
    halved = [
        *common,
        "precision=fp16",
        "verify.min_token_agreement=0",
        "merge.strategy=three_branch",
    ]  # as it is on a GPU
    half = execute(compose(halved))
    kind = model_class(AutoConfig.from_pretrained(checkpoint))
    eager = kind.from_pretrained(checkpoint, attn_implementation="eager").eval()
    folder = made["verify"].folder
    with ExitStack() as opened:
        model = opened.enter_context(load(folder, runtime=runtime))
        static = None
        if (folder / layout.STATIC_DECODE).is_file():
            static = opened.enter_context(load(folder, runtime, static=True, capture=True, buckets=BUCKETS))
        yield Subject(eager.to(model.device), model, registry.build(composed.architecture), made, half, static)
