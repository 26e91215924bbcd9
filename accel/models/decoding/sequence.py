"""One sequence of a running batch: its options, and its next tokens as `generate` selects them for it alone."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from accel.models.decoding.generation_configs import GenerationConfigs
from accel.models.decoding.processors import score_filters

if TYPE_CHECKING:
    from accel.models.generation import AcceleratedModel

STEPWISE_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}
# Options that need more than the logits of one sequence, the value at which each asks for nothing.
NEEDS_GENERATE: dict[str, Any] = {
    "num_return_sequences": 1,
    "guidance_scale": 1,  # runs the model a second time
    "max_time": None,
    "stop_strings": None,
    "token_healing": False,
    "cache_implementation": None,
    "use_cache": True,
    "prefill_chunk_size": None,
    "assistant_early_exit": None,
    "return_timestamps": False,
}


class Sequence:
    """Tokens of one sequence, and what selects the next one.

    Args:
        prompt: Ids of the decoder's prompt, [1, length].
        config: Options, as `generate` prepares them.
        processors: Logits processors that they ask for.
        generator: Source of random numbers; None where nothing is drawn.

    Attributes:
        config: The options.
        filters: What the processors do with the scores, if they read nothing else; None: `processed` must be called.
        samples: True if the next token is drawn.
        generator: Source of random numbers.
        greedy: True if the next token is always the one of the largest logit.
        length: Number of tokens, the prompt's counted.
        max_length: Largest number of tokens, the prompt's counted.
        ended: True once an end-of-sequence token was appended.
    """

    def __init__(
        self,
        prompt: Tensor,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        generator: torch.Generator | None = None,
    ) -> None:
        self.config, self._processors, self.generator = config, processors, generator
        self.filters, self.samples = score_filters(processors), bool(config.do_sample)
        self.prompt_length = self.length = prompt.shape[1]
        self.max_length = int(config.max_length or 0)
        ends = getattr(config, "_eos_token_tensor", None)
        self._ends = frozenset() if ends is None else frozenset(ends.tolist())
        self._ids = prompt.new_zeros(1, max(self.max_length, self.length))
        self._ids[:, : self.length] = prompt
        self.greedy = not processors and not self.samples
        self.ended = False
        self._new: list[int] = []  # tokens that `_ids` doesn't hold yet

    @property
    def ids(self) -> Tensor:
        """All tokens, [1, length]."""
        if self._new:
            self._ids[0, self.length - len(self._new) : self.length] = self._ids.new_tensor(self._new)
            self._new.clear()
        return self._ids[:, : self.length]

    @property
    def prompt(self) -> Tensor:
        """Tokens of the prompt, [1, prompt length]."""
        return self._ids[:, : self.prompt_length]

    @property
    def finished(self) -> bool:
        """True if no token follows."""
        return self.ended or self.length >= self.max_length

    @property
    def left(self) -> int:
        """Number of tokens that may follow."""
        return 0 if self.ended else self.max_length - self.length

    def processed(self, logits: Tensor) -> Tensor:
        """Return the scores that the processors make of logits, FP32 [vocabulary].

        Args:
            logits: The model's logits behind the last token, [vocabulary]. Not overwritten.
        """
        scores = logits[None].to(torch.float32, copy=True)
        return self._processors(self.ids, scores)[0]  # type: ignore[arg-type]

    def append(self, token: int) -> None:
        """Append a token."""
        self._new.append(token)
        self.length += 1
        self.ended = token in self._ends


def why_not_stepwise(config: GenerationConfig) -> str | None:
    """Return the option because of which `Sequence` can't run a generation, which `generate` has to; None if it can."""
    mode = config.get_generation_mode()
    if mode not in STEPWISE_MODES:
        return str(mode.value)
    asked = (name for name, nothing in NEEDS_GENERATE.items() if getattr(config, name, None) not in (None, nothing))
    return next(asked, None)


def open_sequence(
    model: "AcceleratedModel",
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    seed: int | None = None,
    processors: Iterable[LogitsProcessor] = (),
    configs: GenerationConfigs | None = None,
) -> Sequence:
    """Return a sequence without new tokens.

    Args:
        model: The model.
        inputs: One input of `generate`: `input_ids` int64 [1, length] and, beside an encoder, perhaps
            `decoder_input_ids`. Every token counts, those with the id of padding as well.
        options: Options of `GenerationConfig`, over the model's own.
        seed: Seed of sampling, whose tokens are those of `generate` behind `torch.manual_seed(seed)`; None: a
            random one.
        processors: Processors of the caller's own, behind those of the options.
        configs: The model's generation configs, where they are kept between calls.

    Raises:
        ValueError: An option is unknown or has a wrong value.
    """
    mixin: Any = model
    config = (configs or GenerationConfigs(model)).of(options)
    mixin._prepare_special_tokens(config, True, device=model.device, batch_size=1)
    source = inputs[model.main_input_name]
    prompt = source
    if model.config.is_encoder_decoder:
        given = {name: inputs[name] for name in ("decoder_input_ids",) if name in inputs}
        prompt, _ = mixin._prepare_decoder_input_ids_for_generation(
            1, model.main_input_name, given, config._decoder_start_token_tensor, model.device
        )
    prompt = prompt.to(model.device, torch.int64)
    has_length = {
        name: options.get(name) is None and getattr(model.generation_config, name) is None
        for name in ("max_length", "min_length")
    }
    mixin._prepare_generated_length(
        config, has_length["max_length"], has_length["min_length"], "input_ids", prompt.shape[1], prompt
    )
    try:
        found = mixin._get_logits_processor(
            config,
            input_ids_seq_length=prompt.shape[1],
            encoder_input_ids=source,
            logits_processor=LogitsProcessorList(processors),
            device=model.device,
            model_kwargs={},
        )
    except (TypeError, AttributeError) as error:  # of a value of a wrong type
        raise ValueError(f"generation options {dict(options)}: {error}") from error
    generator = None
    if config.do_sample:
        generator = torch.Generator(model.device)
        _ = generator.seed() if seed is None else generator.manual_seed(seed)
    return Sequence(prompt, config, found, generator)
