"""Checks of `forward`: logits, loss and caches are PyTorch's, for code that calls a model without `generate`."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from accel.testing.subject import Subject

TOLERANCE = 2e-3  # absolute and relative


def forward_logits(subject: Subject) -> None:
    """Check logits and loss of a padded batch, called without positions and as a tuple."""
    inputs, labels = _teacher_forced(subject)
    expected, actual = _forward_both(subject, **inputs, labels=labels)
    shown = inputs.get("attention_mask") if not subject.has_encoder else None
    for row in range(len(labels)):
        tokens = slice(None) if shown is None else shown[row].bool()
        _assert_close(actual.logits[row, tokens], expected.logits[row, tokens])
    _assert_close(actual.loss, expected.loss)
    with torch.inference_mode():
        as_tuple = subject.model(**inputs, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], actual.loss)
    assert torch.equal(as_tuple[1], actual.logits)


def forward_kept_logits(subject: Subject) -> None:
    """Check `logits_to_keep` as a number and as indices; encoder-decoders have no such argument."""
    if subject.has_encoder:
        return
    inputs = {"input_ids": subject.ids(2, 7)}
    everything = _forward(subject.eager, **inputs).logits
    for keep, tokens in ((2, [5, 6]), (torch.tensor([1, 4], device=everything.device), [1, 4])):
        actual = _forward(subject.model, **inputs, logits_to_keep=keep).logits
        _assert_close(actual, everything[:, tokens])


def forward_caller_cache(subject: Subject) -> None:
    """Check that a cache passed to `forward` is filled with PyTorch's keys and values, and continues in both models."""
    inputs: dict[str, Any] = {}
    name = "input_ids"
    if subject.has_encoder:
        hidden = _forward(subject.eager.get_encoder(), **subject.inputs(1)).last_hidden_state
        inputs, name = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}, "decoder_input_ids"
    ids = subject.ids(1, 6)
    caches, logits = [], []
    for model in (subject.eager, subject.model):
        cache: Cache = DynamicCache()
        if subject.has_encoder:
            cache = EncoderDecoderCache(cache, DynamicCache())
        outputs = _forward(model, **inputs | {name: ids[:, :4]}, past_key_values=cache, use_cache=True)
        assert outputs.past_key_values is cache
        assert cache.get_seq_length() == 4
        caches.append([tensor.clone() for tensor in cache_tensors(cache)])
        outputs = _forward(model, **inputs | {name: ids[:, 4:5]}, past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 5
        # the other model continues from this cache
        other = subject.model if model is subject.eager else subject.eager
        logits.append(_forward(other, **inputs | {name: ids[:, 5:]}, past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == 6
    for expected, actual in zip(*caches, strict=True):
        _assert_close(actual, expected)
    _assert_close(logits[1], logits[0])


def cache_tensors(cache: Any) -> list[Tensor]:
    """Return keys and values of all layers, [B, H, S, D], self-attention caches first."""
    caches = [cache]
    if isinstance(cache, EncoderDecoderCache):
        caches = [cache.self_attention_cache, cache.cross_attention_cache]
    tensors = []
    for part in caches:
        for layer in part.layers:
            if layer.keys is not None:  # T5 allocates layers for its encoder too
                tensors += [layer.keys, layer.values]
    return tensors


def _assert_close(actual: Any, expected: Any) -> None:
    """Raise `AssertionError` unless tensors agree within `TOLERANCE`."""
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _forward(model: Any, **options: Any) -> Any:
    """Return the outputs of a model's call."""
    with torch.inference_mode():
        return model(**options)


def _forward_both(subject: Subject, **options: Any) -> tuple[Any, Any]:
    """Return the outputs of PyTorch and of the deployable."""
    return _forward(subject.eager, **options), _forward(subject.model, **options)


def _teacher_forced(subject: Subject) -> tuple[dict[str, Any], Tensor]:
    """Return inputs of `forward` for two rows, the second one padded, and labels with some left out."""
    if subject.has_encoder:
        labels = subject.ids(2, 6)
        labels[1, 4:] = -100
        return subject.inputs(2), labels
    ids, mask = subject.ids(2, 8), torch.ones(2, 8, dtype=torch.int64, device=subject.model.device)
    mask[1, :3] = 0
    # The first token after padding is predicted at padding, where PyTorch's own attention implementations disagree.
    predicted = mask * mask.roll(1, dims=1)
    return {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(predicted == 0, -100)
