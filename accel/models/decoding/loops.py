"""Decoding loops for which the device never waits: the next token, the beams and the end are tensors there.

Transformers' `generate` prepares a generation and calls one of these in place of its own loop, which builds each call
of the model anew and, with beams, waits for every token to know whether to go on. Tokens are the same. What these loops
don't know (see `reason_against`) goes through transformers' own.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

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

from accel.models.decoding.beam_search import BeamSearch
from accel.models.decoding.processors import PURE
from accel.models.decoding.sampling import Sampler
from accel.models.decoding.stop_poller import StopPoller
from accel.models.decoding.token_selector import TokenSelector
from accel.runtime.protocol import Runtime, State

logger = logging.getLogger("accel.decoding")
PREPARE = "prepare_inputs_for_generation"

KNOWN_CRITERIA = {MaxLengthCriteria, EosTokenCriteria}


def reason_against(
    processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig, use_cache: bool
) -> str | None:
    """Why these loops can't do what is asked; None if they can."""
    for asked in ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "is_assistant"):
        if getattr(config, asked, False):
            return asked
    if not use_cache:
        return "use_cache=False"
    if config.return_dict_in_generate and config.num_beams > 1:
        return "return_dict_in_generate with beams"
    for part, known in ((processors, PURE), (criteria, KNOWN_CRITERIA)):
        for one in part:
            if type(one) not in known:
                return type(one).__name__
    return None if criteria.max_length is not None else "no largest length"


def decode(selector: TokenSelector, logits: Tensor, follow: Callable[[Tensor], Tensor]) -> Tensor:
    """The sequences that `choice` makes. `logits` [rows, new, vocabulary]: what the model says to the prompt.

    `follow`: the ids chosen [rows, 1] -> the logits of what comes after them.
    """
    poller = StopPoller(selector.device)
    with selector:
        while not selector.last:
            ids = selector(logits)
            if selector.last or poller(selector.over):
                break
            logits = follow(ids)
        return selector.result()


class DecodingLoops:
    """Mixed into a model before transformers' mixin: what `generate` calls to decode."""

    config: PretrainedConfig
    runtime: Runtime[Any]
    followed: frozenset[str] = frozenset()  # what `generate` may carry along for a loop of our own

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
        """Greedy search and sampling; `generate` calls it with everything prepared."""
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        if streamer is not None or synced_gpus or not self._decodes(*given[1:], model_kwargs):
            theirs: Any = super()
            return theirs._sample(*given, synced_gpus, streamer, **model_kwargs)
        outputs, follow = self._prefilled(input_ids, stopping_criteria, generation_config, model_kwargs)
        cache, seen = outputs.past_key_values, outputs.past_key_values.get_seq_length()
        sequences = decode(Sampler(*given), outputs.logits, follow)
        if not generation_config.return_dict_in_generate:
            return sequences
        length = seen + sequences.shape[1] - input_ids.shape[1] - 1  # the last token is said, not yet seen
        if cache.get_seq_length() > length:
            cache.state.crop(length)
        kind: Any = GenerateEncoderDecoderOutput if self.config.is_encoder_decoder else GenerateDecoderOnlyOutput
        return kind(sequences=sequences, past_key_values=cache)

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Beam search and beam-sample; `generate` calls it with everything prepared."""
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        if synced_gpus or not self._decodes(*given[1:], model_kwargs):
            theirs: Any = super()
            return theirs._beam_search(*given, synced_gpus, **model_kwargs)
        outputs, follow = self._prefilled(input_ids, stopping_criteria, generation_config, model_kwargs)
        beams, state = BeamSearch(*given), outputs.past_key_values.state

        def followed(ids: Tensor) -> Tensor:
            state.reorder(beams.rows)
            return follow(ids)

        return decode(beams, outputs.logits, followed)

    def _decodes(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: Mapping[str, Any],
    ) -> bool:
        """Whether the loops here do what is asked. A log line says why not."""
        reason = reason_against(processors, criteria, config, model_kwargs["use_cache"])
        unknown = set(model_kwargs) - self.followed
        if reason is None and unknown:
            reason = f"{', '.join(sorted(unknown))} given"
        if reason is None and getattr(type(self), PREPARE) is not vars(GenerationMixin)[PREPARE]:
            reason = "inputs prepared by the model's own class"
        logger.info("decoding in %s", "accel" if reason is None else f"transformers: {reason}")
        return reason is None

    def _prefilled(
        self, ids: Tensor, criteria: StoppingCriteriaList, config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """What the model says to the prompt, and how to go on: new ids [batch, 1] -> logits."""
        mixin: Any = self  # typed for models that are modules
        outputs = mixin._prefill(ids, config, model_kwargs, is_first_iteration=True)
        given = mixin._update_model_kwargs_for_generation(outputs, model_kwargs, self.config.is_encoder_decoder)
        state = outputs.past_key_values.state
        inputs = self._decoder_inputs(given, state, (criteria.max_length or 0) - ids.shape[1])
        return outputs, lambda new: self.runtime.decode(inputs(new), state)

    def _decoder_inputs(
        self, given: Mapping[str, Any], state: State, room: int
    ) -> Callable[[Tensor], Mapping[str, Tensor]]:
        """A function from new ids [batch, 1] to what the runtime's step takes, called for at most `room` tokens."""
        raise NotImplementedError
