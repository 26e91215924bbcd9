"""Generation configs: options over the defaults of a model, as transformers' `generate` combines them."""

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

if TYPE_CHECKING:
    from accel.models.generation import AcceleratedModel

KEPT = 64
LENGTH = "max_new_tokens"  # most requests differ in it, and no other field depends on it


class GenerationConfigs:
    """Generation configs of one model. Those of options that came before are copied. Callable from any thread.

    Combining the options takes transformers (5.23) about a millisecond, in which a server could decode several tokens
    of other requests.

    Args:
        model: The model. Changes of its own generation config are seen.
    """

    def __init__(self, model: "AcceleratedModel") -> None:
        self._model = model
        self._kept: OrderedDict[str, GenerationConfig] = OrderedDict()  # the one that was used last comes last
        self._lock = threading.Lock()

    def of(self, options: Mapping[str, Any]) -> GenerationConfig:
        """Return the config for options. It is the caller's own, but for lists and the like that are its values.

        Raises:
            ValueError: An option is unknown, or has a wrong value.
        """
        key = self._key(options)
        if key is None:
            return generation_config_for(self._model, options)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
        if kept is None:
            kept = generation_config_for(self._model, options)
            with self._lock:
                self._kept[key] = kept
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        config = copy.copy(kept)
        if LENGTH in options:
            config.max_new_tokens = options[LENGTH]
        return config

    def _key(self, options: Mapping[str, Any]) -> str | None:
        """Return what decides about all fields of a config but `max_new_tokens`; None if that can't be told."""
        if LENGTH in options and not (type(options[LENGTH]) is int and options[LENGTH] > 0):
            return None  # refused, or the default
        try:
            given = json.dumps({name: value for name, value in options.items() if name != LENGTH}, sort_keys=True)
        except TypeError:  # objects, whose state can change
            return None
        return f"{LENGTH in options} {given} {vars(self._model.generation_config)}"


def generation_config_for(model: "AcceleratedModel", options: Mapping[str, Any]) -> GenerationConfig:
    """Return the options over the defaults of the model, as `generate` combines them.

    Raises:
        ValueError: An option is unknown, or has a wrong value.
    """
    mixin: Any = model
    try:
        config, unknown = mixin._prepare_generation_config(None, **options)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"generation options {dict(options)}: {error}") from error
    if unknown:
        raise ValueError(f"no option of GenerationConfig: {', '.join(sorted(unknown))}")
    prepared: GenerationConfig = config
    return prepared
