"""Encoder of an encoder-decoder model, as `generate` and its callers run it."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from accel.models import arguments
from accel.models.usage import Usage
from accel.runtime.protocol import Runtime


class Encoder:
    """Callable that `generate` gets from `get_encoder` and runs once per input.

    Args:
        runtime: Runtime whose encoder graph is called.
        main_input_name: Name of the first positional argument: `input_ids`, or `input_features` for speech.
        vocabulary: Number of rows of the embedding, for an input of ids.
        usage: Bookkeeping of the model's calls.
    """

    def __init__(self, runtime: Runtime[Any], main_input_name: str, vocabulary: int, usage: Usage) -> None:
        self.runtime = runtime
        self.main_input_name = main_input_name
        self.vocabulary = vocabulary
        self._usage = usage

    def forward(
        self, *args: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the encoder.

        Args:
            args: The main input, ids [batch, source] or features [batch, ...], unless it is given by name.
            attention_mask: [batch, source], 0 at padding; None for inputs without padding.
            return_dict: False returns a tuple.
            kwargs: Further inputs by name. Arguments of `generate` that are for the decoder are ignored.

        Returns:
            The `last_hidden_state`: [batch, source, width].

        Raises:
            ValueError: The main input is missing, an input has a wrong type, shape or range, or something is asked for
                that an exported graph doesn't have.
            RuntimeError: The model is closed.
        """
        arguments.reject_unavailable(kwargs)
        inputs: dict[str, Tensor] = {}
        if args:
            inputs[self.main_input_name] = args[0]
        inputs |= {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        main_input = inputs.get(self.main_input_name)
        if main_input is None:
            raise ValueError(f"the encoder needs {self.main_input_name}")
        if self.main_input_name == "input_ids":
            arguments.check_ids("input_ids", main_input, self.vocabulary)
            if attention_mask is not None:
                arguments.check_mask("attention_mask", attention_mask, *main_input.shape)
        if attention_mask is None:
            attention_mask = main_input.new_ones(main_input.shape[:2], dtype=torch.int64)
        # the runtime drops inputs that the graph doesn't have, as the mask of an encoder without one
        with self._usage.call():
            encoded = self.runtime.encode(inputs | {"attention_mask": attention_mask})
        output = BaseModelOutput(last_hidden_state=encoded["last_hidden_state"])
        return output.to_tuple() if return_dict is False else output

    __call__ = forward
