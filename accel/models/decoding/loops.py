"""Decoding loops without host-device synchronisation: next tokens, beams and the stop flag are tensors on the device.

Transformers' `generate` prepares a generation and then calls one of its own loops, which prepares the inputs of every
decode step anew and, with beams, synchronises at every token to decide whether to continue. The loops here replace them
with token-identical output. What they don't support (see `unsupported_reason`) is passed on to transformers' loops.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PretrainedConfig,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from accel.models.cache import state_of
from accel.models.decoding.acceptance import Acceptance, count_acceptance
from accel.models.decoding.beam_search import BeamSearch
from accel.models.decoding.processors import PURE
from accel.models.decoding.sampling import Sampler
from accel.models.decoding.step_observer import StepObserver
from accel.models.decoding.stop_poller import StopPoller
from accel.models.decoding.token_selector import TokenSelector
from accel.runtime.protocol import Runtime, State

logger = logging.getLogger("accel.decoding")

InputsFor: TypeAlias = Callable[[Tensor, int], Mapping[str, Tensor]]
"""Function of new ids [rows, 1] and the number of decode steps before, that returns the inputs of `Runtime.decode`."""

PREPARE_INPUTS = "prepare_inputs_for_generation"

SUPPORTED_CRITERIA = {MaxLengthCriteria, EosTokenCriteria, StepObserver}
TOKENIZERS = ("tokenizer", "assistant_tokenizer")  # transformers leaves them among the model's inputs
UNSUPPORTED_OPTIONS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "is_assistant")


def unsupported_reason(
    processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig, use_cache: bool
) -> str | None:
    """Return the reason why the loops here can't run a generation, as text for a log; None if they can."""
    for option in UNSUPPORTED_OPTIONS:
        if getattr(config, option, False):
            return option
    if not use_cache:
        return "use_cache=False"
    if config.return_dict_in_generate and config.num_beams > 1:
        return "return_dict_in_generate with beams"
    for processor in processors:
        if type(processor) not in PURE:
            return type(processor).__name__
    for criterion in criteria:
        if type(criterion) not in SUPPORTED_CRITERIA:
            return type(criterion).__name__
    return None if criteria.max_length is not None else "no maximum length"


def without_tokenizers(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's inputs without the tokenizers, which `generate` needs for stop strings only."""
    return {name: value for name, value in model_kwargs.items() if name not in TOKENIZERS}


class DecodingLoops:
    """Mixin that overrides the decoding loops of transformers' `GenerationMixin`, which must follow it in the bases.

    `generate` calls `_sample` and `_beam_search` with everything prepared.
    """

    config: PretrainedConfig
    runtime: Runtime[Any]
    acceptance: Acceptance | None = None
    """Counts of the last generation with an assistant or prompt lookup."""
    supported_model_kwargs: frozenset[str] = frozenset()
    """Names in the `model_kwargs` of `generate` that the loops here support. Others are passed on to transformers."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Run greedy search or sampling."""
        model_kwargs = without_tokenizers(model_kwargs)
        supported = streamer is None and not synced_gpus
        if not supported or not self._supports(logits_processor, stopping_criteria, generation_config, model_kwargs):
            parent: Any = super()
            return parent._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        outputs, inputs_for = self._run_prefill(input_ids, stopping_criteria, generation_config, model_kwargs)
        cache = outputs.past_key_values
        prefilled = cache.get_seq_length()
        vocabulary = outputs.logits.shape[-1]
        selector = TokenSelector(Sampler, input_ids, logits_processor, stopping_criteria, generation_config, vocabulary)
        sequences = self._decode(selector, outputs, inputs_for, stopping_criteria)
        if not generation_config.return_dict_in_generate:
            return sequences
        # The caches hold every token but the last, which was selected but not decoded. On a GPU they hold more: tokens
        # that were decoded after the end.
        length = prefilled + sequences.shape[1] - input_ids.shape[1] - 1
        if cache.get_seq_length() > length:
            _state(outputs).crop(length)
        encoder_decoder = self.config.is_encoder_decoder
        output_class: Any = GenerateEncoderDecoderOutput if encoder_decoder else GenerateDecoderOnlyOutput
        return output_class(sequences=sequences, past_key_values=cache)

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Run beam search or beam-sample."""
        model_kwargs = without_tokenizers(model_kwargs)
        if synced_gpus or not self._supports(logits_processor, stopping_criteria, generation_config, model_kwargs):
            parent: Any = super()
            return parent._beam_search(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **model_kwargs
            )
        outputs, inputs_for = self._run_prefill(input_ids, stopping_criteria, generation_config, model_kwargs)
        vocabulary = outputs.logits.shape[-1]
        selector = TokenSelector(
            BeamSearch, input_ids, logits_processor, stopping_criteria, generation_config, vocabulary
        )
        return self._decode(selector, outputs, inputs_for, stopping_criteria)

    def _decode(
        self, selector: TokenSelector, outputs: Any, inputs_for: InputsFor, criteria: StoppingCriteriaList
    ) -> Tensor:
        """Decode until all sequences have ended.

        Args:
            selector: Selects the next ids and collects the sequences.
            outputs: Outputs of the prompt, with logits [rows, new, vocabulary].
            inputs_for: See `_decode_inputs`.
            criteria: Those of the generation, of which observers are shown each step's ids.

        Returns:
            The sequences, [returned rows, length].
        """
        observers = [each for each in criteria if isinstance(each, StepObserver)]

        def observed_end() -> bool:
            return selector.selected > 0 and any(each.step(selector.selection.next_ids) for each in observers)

        poller, state = StopPoller(selector.device), _state(outputs)
        at_once = selector.on_device
        if not selector.at_max_length:
            selector(outputs.logits)
        while not observed_end() and not selector.at_max_length and not poller(selector.selection.finished):
            selection = selector.selection
            inputs = partial(inputs_for, selection.next_ids, selector.selected - 1)
            following = self.runtime.decode_and_select(inputs, state, selection) if at_once else None
            if following is not None:
                selector.follow(following)
                continue
            at_once = False
            if selection.parents is not None:
                state.reorder(selection.parents)
            selector(self.runtime.decode(inputs(), state))
        return selector.result()

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Return transformers' generator of candidates for assisted decoding, whose candidates are counted."""
        parent: Any = super()
        generator = parent._get_candidate_generator(*args, **kwargs)
        self.acceptance = count_acceptance(generator)
        return generator

    def _supports(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: Mapping[str, Any],
    ) -> bool:
        """Return True if the loops here can run a generation, and log which loop runs it and why."""
        reason = unsupported_reason(processors, criteria, config, model_kwargs["use_cache"])
        unsupported_kwargs = set(model_kwargs) - self.supported_model_kwargs
        if reason is None and unsupported_kwargs:
            reason = f"{', '.join(sorted(unsupported_kwargs))} given"
        if reason is None and getattr(type(self), PREPARE_INPUTS) is not getattr(GenerationMixin, PREPARE_INPUTS):
            reason = f"the model's class overrides {PREPARE_INPUTS}"
        logger.info("decoding in %s", "accel" if reason is None else f"transformers: {reason}")
        return reason is None

    def _run_prefill(
        self, ids: Tensor, criteria: StoppingCriteriaList, config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> tuple[Any, InputsFor]:
        """Run the prompt; return its outputs, and a function that returns the inputs of decode steps."""
        mixin: Any = self  # transformers annotates these methods for subclasses of `nn.Module`
        copies = self._copies_of_prompts(ids, config, model_kwargs)
        if copies == 1:
            outputs = mixin._prefill(ids, config, model_kwargs, is_first_iteration=True)
        else:
            distinct = {name: _every(value, copies, len(ids)) for name, value in model_kwargs.items()}
            outputs = mixin._prefill(ids[::copies], config, distinct, is_first_iteration=True)
            outputs.logits = outputs.logits.repeat_interleave(copies, dim=0)
            _state(outputs).expand(copies)
        # This also warns where a compile config has no effect, as transformers' loops do.
        if config.compile_config is not None and mixin._valid_auto_compile_criteria(model_kwargs, config):
            mixin.get_compiled_call(config.compile_config)
        model_kwargs = mixin._update_model_kwargs_for_generation(outputs, model_kwargs, self.config.is_encoder_decoder)
        max_new_tokens = (criteria.max_length or 0) - ids.shape[1]
        _state(outputs).reserve(_state(outputs).length + max_new_tokens)
        return outputs, self._decode_inputs(model_kwargs, _state(outputs), max_new_tokens)

    def _copies_of_prompts(self, ids: Tensor, config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> int:
        """Return how many adjacent rows are copies of one prompt, for beams or samples, where it is computed once.

        Not beside an encoder, since there a prompt is one token, and not where `generate` was given caches.
        """
        options = (model_kwargs.get("past_key_values"), config.prefill_chunk_size)
        if self.config.is_encoder_decoder or ids.shape[1] == 1 or any(option is not None for option in options):
            return 1
        return max(config.num_beams or 1, config.num_return_sequences or 1)

    def _decode_inputs(self, model_kwargs: Mapping[str, Any], state: State, max_new_tokens: int) -> InputsFor:
        """Return a function that returns all inputs of a decode step; implemented by the subclasses.

        Args:
            model_kwargs: As `generate` has updated them after the prefill.
            state: State after the prefill.
            max_new_tokens: Largest number of decode steps.

        Returns:
            A function of new ids [rows, 1] and the number of decode steps before, that returns the inputs of
            `Runtime.decode`.
        """
        raise NotImplementedError


def _every(value: Any, step: int, rows: int) -> Any:
    """Return each `step`-th row of a tensor of `rows` rows, and any other value as it is."""
    return value[::step] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value


def _state(outputs: Any) -> State:
    """Return the state under the caches of a model's outputs. The loops here run only where there is one."""
    state = state_of(outputs.past_key_values)
    if state is None:
        raise TypeError(f"the outputs hold a {type(outputs.past_key_values).__name__} without a runtime's state")
    return state
