"""Creation of the class of an accelerated model, which depends on the transformers class that its config names."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig

from accel.models.decoder_only import DecoderOnlyModel
from accel.models.decoding.loops import PREPARE_INPUTS
from accel.models.encoder_decoder import EncoderDecoderModel
from accel.models.generation import AcceleratedModel
from accel.models.model_class import model_class
from accel.runtime.protocol import Runtime


class ModelStructureMixin:
    """Mixin for models whose transformers class wraps `generate` in a loop of its own, as speech models do.

    Such a loop reads the structure of the model, such as a convolution's stride. It is looked up in an instance of the
    transformers class on the meta device, without weights, which is built when it is first needed.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name.startswith("_") or name == "meta_model":
                raise
            return getattr(self.meta_model, name)


def model_over(
    runtime: Runtime[Any], config: PretrainedConfig, generation_config: GenerationConfig
) -> AcceleratedModel:
    """Return the model that `config` describes, over `runtime`.

    Its class is created here, since it depends on the transformers class of the config:

    - It has the name of the transformers class, by which transformers' pipelines look a model up.
    - Generation mixins of the transformers class, which have no weights, become its base classes. Whisper's adds
      timestamps and long audio. Their `super()` calls reach `GenerationMixin` as they do in transformers.
    - If the transformers class has no such mixin and overrides `prepare_inputs_for_generation` itself, that override is
      used. Phi-3's drops the caches where its rotary embedding is rescaled.

    Args:
        runtime: Runs the model's graphs.
        config: Hugging Face config. With `is_encoder_decoder`, the result is an `EncoderDecoderModel`, otherwise a
            `DecoderOnlyModel`.
        generation_config: Defaults for `generate`.
    """
    base = EncoderDecoderModel if config.is_encoder_decoder else DecoderOnlyModel
    transformers_class = model_class(config)
    members = {"main_input_name": getattr(transformers_class, "main_input_name", base.main_input_name)}
    bases: list[type] = [base, GenerationMixin]  # named directly, since transformers looks for it among the bases
    generation_mixins = _generation_mixins(transformers_class)
    prepare_inputs = getattr(transformers_class, PREPARE_INPUTS, None)
    if generation_mixins:
        bases = [ModelStructureMixin, base, *generation_mixins]
    elif prepare_inputs is not None and prepare_inputs is not getattr(GenerationMixin, PREPARE_INPUTS):
        members[PREPARE_INPUTS] = _delegate_to_transformers(prepare_inputs, transformers_class)
    name = getattr(transformers_class, "__name__", base.__name__)
    model: AcceleratedModel = type(name, tuple(bases), members)(runtime, config, generation_config)
    return model


def _generation_mixins(transformers_class: Any) -> list[type]:
    """Return the base classes with generation methods and without weights, except `GenerationMixin` itself."""
    mixins = []
    for ancestor in getattr(transformers_class, "__mro__", ()):
        has_weights = issubclass(ancestor, torch.nn.Module)
        if issubclass(ancestor, GenerationMixin) and not has_weights and ancestor is not GenerationMixin:
            mixins.append(ancestor)
    return mixins


def _delegate_to_transformers(prepare_inputs: Callable[..., Any], transformers_class: Any) -> Callable[..., Any]:
    """Return `transformers_class.prepare_inputs_for_generation` as a method for one accelerated model.

    The override calls `super()`, which Python allows only on instances of the override's own class, and an accelerated
    model is none. So the override runs on such an instance without modules and weights, which has the accelerated
    model's config, device, dtype and mask function.
    """

    class InputPreparer(transformers_class):
        """Instance of the transformers class that can prepare inputs and do nothing else."""

        device = None  # plain attributes replace properties that need parameters
        dtype = None
        create_masks_for_generate = staticmethod(AcceleratedModel.create_masks_for_generate)

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)  # not transformers' constructor, which creates the weights

    preparer: Any = InputPreparer()

    @wraps(prepare_inputs)  # `generate` reads the parameters' names from the signature
    def prepare_inputs_for_generation(model: AcceleratedModel, *args: Any, **kwargs: Any) -> Any:
        attributes = vars(preparer)  # `nn.Module` makes ordinary assignments slow
        attributes["config"], attributes["generation_config"] = model.config, model.generation_config
        attributes["device"], attributes["dtype"] = model.device, model.dtype
        return prepare_inputs(preparer, *args, **kwargs)

    return prepare_inputs_for_generation
