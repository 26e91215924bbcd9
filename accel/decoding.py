"""Decoding loops for which the device never waits: the next token, the beams and the end are tensors there.

Transformers' `generate` prepares a generation and calls one of these in place of its own loop, which builds each call
of the model anew and, with beams, waits for every token to know whether to go on. Tokens are the same. What these loops
don't know (see `reason_against`) goes through transformers' own.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PretrainedConfig,
    StoppingCriteriaList,
)
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from accel.runtime.protocol import Runtime, State

logger = logging.getLogger(__name__)
PREPARE = "prepare_inputs_for_generation"

Process = Callable[..., Tensor]
"""Ids [batch, length] and scores [batch, vocabulary] -> scores: a list of transformers' logits processors."""
Follow = Callable[[Tensor], Tensor]
"""New ids [batch, 1] -> logits [batch, 1, vocabulary]; the caches move on."""

LAG = 3  # tokens that a GPU has queued while the host reads whether an earlier one was the last
NEVER = -1e9  # score of what can't be chosen

# Processors that say the same whenever they are asked: one that counts its calls would notice the tokens after the end.
PURE = (
    *("MinLength", "MinNewTokensLength", "RepetitionPenalty", "EncoderRepetitionPenalty", "NoRepeatNGram"),
    *("EncoderNoRepeatNGram", "SequenceBias", "NoBadWords", "ForcedBOSToken", "ForcedEOSToken", "InfNanRemove"),
    *("SuppressTokensAtBegin", "SuppressTokens"),
)
WARPERS = ("Temperature", "TopP", "TopK", "TopH", "MinP", "Typical", "Epsilon", "Eta")
KNOWN_PROCESSORS = {
    *(getattr(logits_process, f"{name}LogitsProcessor", None) for name in PURE),
    *(getattr(logits_process, f"{name}LogitsWarper", None) for name in WARPERS),
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.LogitNormalization,
}
KNOWN_CRITERIA = {stopping_criteria.MaxLengthCriteria, stopping_criteria.EosTokenCriteria}


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
    for part, known in ((processors, KNOWN_PROCESSORS), (criteria, KNOWN_CRITERIA)):
        for one in part:
            if type(one) not in known:
                return type(one).__name__
    return None if criteria.max_length is not None else "no largest length"


def sample(
    ids: Tensor,
    logits: Tensor,
    follow: Follow,
    processors: Process,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
) -> Tensor:
    """Greedy search, or sampling. `ids` [batch, prompt], `logits` [batch, new, vocabulary] -> [batch, length].

    What transformers calls `_sample`, as of 5.23:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py
    """
    (batch, begin), limit, ends = ids.shape, _limit(criteria), _ends(criteria)
    pad = getattr(config, "_pad_token_tensor", None)
    tokens = ids.new_zeros(batch, limit)
    tokens[:, :begin] = ids
    ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    length = torch.full((), begin, device=ids.device)
    watch = Watch(ids.device)
    for place in range(begin, limit):
        scores = processors(tokens[:, :place], logits[:, -1].to(torch.float32, copy=True))
        chosen = _drawn(scores, 1).squeeze(1) if config.do_sample else scores.argmax(-1)
        if ends is not None:
            chosen = torch.where(ended, pad, chosen) if pad is not None else chosen
            length += ~ended.all()
            ended |= torch.isin(chosen, ends)
        tokens[:, place] = chosen
        if place + 1 == limit or (ends is not None and watch(ended.all())):
            break
        logits = follow(chosen[:, None])
    return tokens if ends is None else tokens[:, : int(length)]


class Beams:
    """The running sequences of every input, and the best that have ended. [batch, beams, ...]"""

    def __init__(self, ids: Tensor, config: GenerationConfig, limit: int, ends: Tensor | None) -> None:
        self.config, self.limit, self.ends, self.prompt = config, limit, ends, ids.shape[1]
        self.beams = config.num_beams or 1
        self.batch = ids.shape[0] // self.beams
        self.kept = max(2, 1 + (0 if ends is None else len(ends))) * self.beams  # so many can't all end
        shape, device = (self.batch, self.beams), ids.device
        self.running = ids.new_full((*shape, limit), self._filling())
        self.running[:, :, : self.prompt] = ids.view(*shape, self.prompt)
        self.running_scores = torch.full(shape, NEVER, dtype=torch.float32, device=device)
        self.running_scores[:, 0] = 0  # all beams begin alike: only the first goes on
        self.ended = self.running.clone()
        self.ended_scores = torch.full(shape, NEVER, dtype=torch.float32, device=device)
        self.ended_lengths = torch.zeros(shape, dtype=torch.int64, device=device)
        self.has_ended = torch.zeros(shape, dtype=torch.bool, device=device)
        self.open = torch.ones(self.batch, 1, dtype=torch.bool, device=device)  # may still improve
        self.over = torch.zeros((), dtype=torch.bool, device=device)
        self.first_row = torch.arange(self.batch, device=device)[:, None] * self.beams

    def _filling(self) -> int:
        """What stands behind the end of a sequence."""
        pad = getattr(self.config, "_pad_token_tensor", None)
        if self.ends is None:
            return -1
        return int(pad) if pad is not None and pad else int(self.ends[0])

    def advance(self, scores: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """By one token: `scores` [batch * beams, vocabulary], log probabilities of what comes after `length` tokens.

        Returns the new ids [batch * beams, 1] and the rows that they continue [batch * beams].
        """
        vocabulary = scores.shape[-1]
        total = (scores.view(self.batch, self.beams, -1) + self.running_scores[:, :, None]).view(self.batch, -1)
        if self.config.do_sample:
            places = _drawn(total, self.kept)
            best = total.gather(1, places)
        else:
            best, places = total.topk(self.kept)
        parents, chosen = places // vocabulary, places % vocabulary
        candidates = _rows(self.running, parents)
        candidates[:, :, length] = chosen
        ends = torch.full_like(chosen, length + 1 >= self.limit, dtype=torch.bool)
        if self.ends is not None:
            ends |= torch.isin(chosen, self.ends)
        self._end(candidates, best, ends, length + 1 - self.prompt)
        going = best + ends * NEVER
        picked = going.topk(self.beams).indices
        self.running, self.running_scores = _rows(candidates, picked), going.gather(1, picked)
        self._look_ahead(ends, length + 1 - self.prompt)
        rows = parents.gather(1, picked) + self.first_row
        return chosen.gather(1, picked).view(-1, 1), rows.view(-1)

    def _end(self, candidates: Tensor, best: Tensor, ends: Tensor, new: int) -> None:
        """Let those of the first beams' candidates that end join the best that have ended."""
        ending = ends.clone()
        ending[:, self.beams :] = False
        scores = best / new**self.config.length_penalty
        closed = ~self.open | (self.has_ended.all(-1, keepdim=True) if self.config.early_stopping is True else False)
        scores = torch.where(ending, scores + closed * NEVER, scores + NEVER)
        self.ended_scores, picked = torch.cat([self.ended_scores, scores], 1).topk(self.beams)
        self.ended = _rows(torch.cat([self.ended, candidates], 1), picked)
        self.has_ended = torch.cat([self.has_ended, ending], 1).gather(1, picked)
        lengths = torch.cat(
            [self.ended_lengths, torch.full_like(self.ended_lengths[:, :1], new).expand(-1, self.kept)], 1
        )
        self.ended_lengths = lengths.gather(1, picked)

    def _look_ahead(self, ends: Tensor, new: int) -> None:
        """Whether a running sequence may still become better than the worst that has ended."""
        penalty, early = self.config.length_penalty, self.config.early_stopping
        longest = self.limit - self.prompt if early == "never" and penalty > 0 else new
        reachable = self.running_scores[:, :1] / longest**penalty
        worst = torch.where(self.has_ended, self.ended_scores.min(1, keepdim=True).values, NEVER)
        self.open = self.open & (reachable > worst).any(-1, keepdim=True)
        self.over = self.over | ~self.open.any() | ends.all()
        if early is True:
            self.over = self.over | self.has_ended.all()

    def result(self) -> Tensor:
        """[batch * num_return_sequences, length], best first."""
        returned = self.config.num_return_sequences or 1
        length = self.prompt + int(self.ended_lengths[:, :returned].max())
        return self.ended[:, :returned, :length].reshape(self.batch * returned, length)


def beam_search(
    ids: Tensor,
    logits: Tensor,
    follow: Callable[[Tensor, Tensor], Tensor],
    processors: Process,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
) -> Tensor:
    """Beam search, or beam-sample. `ids` [batch * beams, prompt] -> [batch * num_return_sequences, length].

    `follow` takes the rows to continue beside the new ids. What transformers calls `_beam_search`, as of 5.23:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py
    """
    limit = _limit(criteria)
    beams = Beams(ids, config, limit, _ends(criteria))
    watch = Watch(ids.device)
    for length in range(ids.shape[1], limit):
        seen = beams.running[:, :, :length].reshape(len(ids), length)
        scores = processors(seen, logits[:, -1].float().log_softmax(-1))
        chosen, rows = beams.advance(scores, length)
        if length + 1 == limit or watch(beams.over):
            break
        logits = follow(chosen, rows)
    return beams.result()


class Watch:
    """Says whether a flag on the device was true some calls ago: at once on the CPU, `LAG` calls late on a GPU.

    What comes after the end is computed in vain, and at most so often; but the device always has something to do.
    """

    def __init__(self, device: torch.device) -> None:
        self.flags: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.device, self.lag = device, lag(device)

    def __call__(self, flag: Tensor) -> bool:
        if self.device.type == "cuda":
            seen = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
            self.flags.append((seen, copied))
        else:
            self.flags.append((flag.clone(), None))
        if len(self.flags) <= self.lag:
            return False
        earlier, done = self.flags.popleft()
        if done is not None:
            done.synchronize()
        return bool(earlier)


def lag(device: torch.device) -> int:
    """Calls by which a `Watch` is late."""
    return LAG if device.type == "cuda" else 0


def _limit(criteria: StoppingCriteriaList) -> int:
    return int(criteria.max_length or 0)


def _ends(criteria: StoppingCriteriaList) -> Tensor | None:
    """The ids that end a sequence, if any do."""
    return next((one.eos_token_id for one in criteria if hasattr(one, "eos_token_id")), None)


def _drawn(scores: Tensor, count: int) -> Tensor:
    """[batch, choices] -> the places of `count` of them, drawn without replacement."""
    return torch.multinomial(scores.softmax(-1), count)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """`values` [batch, n, length] at `index` [batch, m] -> [batch, m, length]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


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
        sequences = sample(
            input_ids, outputs.logits, lambda ids: follow(ids), logits_processor, stopping_criteria, generation_config
        )
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
        return beam_search(input_ids, outputs.logits, follow, logits_processor, stopping_criteria, generation_config)

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
    ) -> tuple[Any, Callable[..., Tensor]]:
        """What the model says to the prompt, and how to go on: (new ids [batch, 1], rows to continue) -> logits."""
        mixin: Any = self  # typed for models that are modules
        outputs = mixin._prefill(ids, config, model_kwargs, is_first_iteration=True)
        given = mixin._update_model_kwargs_for_generation(outputs, model_kwargs, self.config.is_encoder_decoder)
        state = outputs.past_key_values.state
        feeds = self._feeds(given, state, (criteria.max_length or 0) - ids.shape[1])

        def follow(new: Tensor, rows: Tensor | None = None) -> Tensor:
            if rows is not None:
                state.reorder(rows)
            return self.runtime.step(feeds(new), state)

        return outputs, follow

    def _feeds(self, given: Mapping[str, Any], state: State, room: int) -> Callable[[Tensor], Mapping[str, Tensor]]:
        """A function from new ids [batch, 1] to what the runtime's step takes, called for at most `room` tokens."""
        raise NotImplementedError
