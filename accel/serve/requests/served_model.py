"""A model that the server offers under a name, with what turns text or sound into its inputs."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from accel.config.schema import RuntimeConfig
from accel.config.serve import ServeConfig
from accel.data import audio, texts
from accel.errors import AccelError
from accel.evaluation.component_runner import max_positions
from accel.models.generation import AcceleratedModel
from accel.models.loading import load, open_model, verification_of
from accel.models.option_check import option_names
from accel.serve.protocol import Scheduler
from accel.serve.requests.option_checker import FORBIDDEN, checker
from accel.serve.scheduling.limits import SchedulerLimits

OpenScheduler = Callable[[AcceleratedModel], Scheduler]


class ModelFacts(Protocol):
    """What the server needs of a model beside its scheduler."""

    @property
    def config(self) -> PretrainedConfig:
        """Its configuration."""

    @property
    def generation_config(self) -> GenerationConfig:
        """Its default options."""

    @property
    def main_input_name(self) -> str:
        """Name of its input."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model under a name.

    Attributes:
        name: Name that clients know it by.
        model: The model.
        scheduler: Decodes its requests.
        tokenizer: Its tokenizer.
        extractor: Feature extractor of a speech model; None for other models.
        verification: Verification result of the deployable; None for an unverified bundle.
        created: Time of loading, in seconds since 1970.
        tokenizing: Lock around the tokenizer: its calls in several threads at once can fail.
    """

    name: str
    model: ModelFacts
    scheduler: Scheduler
    tokenizer: PreTrainedTokenizerBase
    extractor: Any = None
    verification: dict[str, Any] | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    tokenizing: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def check_options(self) -> Callable[[str], None]:
        """Function that checks options, as JSON, against the model: see `option_checker.checker`."""
        return checker(self.model.config)

    @cached_property
    def option_names(self) -> frozenset[str]:
        """Options that clients can set."""
        return frozenset(option_names(self.model.config) - FORBIDDEN.keys())

    @property
    def has_encoder(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a sequence."""
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be put into a prompt."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    @property
    def kind(self) -> str:
        """Input that the model takes: `speech`, `chat` (or plain text as well) or `text`."""
        if self.extractor is not None:
            return "speech"
        return "chat" if self.has_chat_template else "text"

    @property
    def positions(self) -> int | None:
        """Number of positions of the decoder; None: not limited."""
        return max_positions(self.model.config)

    def close(self) -> None:
        """End the scheduler's thread and free the model."""
        self.scheduler.close()
        self.model.close()


def scheduler_limits(limits: ServeConfig) -> SchedulerLimits:
    """Return what a scheduler has to know of the server's limits."""
    return SchedulerLimits(
        rows=limits.max_rows,
        queue=limits.max_waiting,
        prompt_tokens=limits.max_prompt_tokens,
        total_tokens=limits.max_total_tokens,
        stall_s=limits.stall_s,
        window_s=limits.window_s,
        shared_prefixes=limits.shared_prefixes,
    )


def open_served(
    name: str, folder: Path, runtime: RuntimeConfig | None, open_scheduler: OpenScheduler, **options: Any
) -> ServedModel:
    """Open a deployable for the server.

    Args:
        name: Name that clients know it by.
        folder: The deployable.
        runtime: Runtime to open it with; None: the one it was built for, or the fastest here.
        open_scheduler: Makes the scheduler of the model.
        options: Values that replace the runtime's, by the field names of `RuntimeConfig`.

    Raises:
        AccelError: The folder isn't a deployable, or has no tokenizer.
    """
    model = load(folder, **options) if runtime is None else open_model(folder, replace(runtime, **options))
    try:
        tokenizer = texts.load_tokenizer(folder)
        if tokenizer is None:
            raise AccelError(f"{folder} holds no tokenizer, which the server encodes prompts with")
        tokenizer("")  # drops padding and truncation that tokenizer.json may set
        speech = model.main_input_name == "input_features"
        extractor = audio.load_extractor(folder) if speech else None
        return ServedModel(name, model, open_scheduler(model), tokenizer, extractor, verification_of(folder))
    except BaseException:
        model.close()
        raise
