"""Methods of `torch.nn.Module` and transformers' `PreTrainedModel` that code around a model calls.

The weights are part of ONNX graphs, so there are no parameters: what asks for the model as it is returns it, and what
would change it raises `ValueError` with the reason.
"""

import inspect
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from accel.models.model_class import model_class
from accel.runtime.protocol import Runtime

REBUILD = "Change the PyTorch model and build it again with accel.build"


class InferenceModule(nn.Module):
    """Module without parameters over a runtime.

    Args:
        runtime: Runs the graphs. The model owns it and closes it.
        config: The Hugging Face config of the exported model.
        generation_config: Defaults for `generate`.

    Attributes:
        device: Device of the inputs and outputs.
        dtype: Dtype of the logits.
        folder: Deployable that the model was opened from; None if it was put together otherwise.
        reopen: Function without arguments that opens the same model again; None likewise.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    framework = "pt"
    is_gradient_checkpointing = False
    supports_gradient_checkpointing = False
    is_parallelizable = False
    accepts_loss_kwargs = False  # `Trainer` would pass `num_items_in_batch`, which only training needs
    _is_stateful = False

    def __init__(self, runtime: Runtime[Any], config: PretrainedConfig, generation_config: GenerationConfig) -> None:
        super().__init__()
        self.runtime = runtime
        self.config = config
        self.generation_config = generation_config
        self.device = runtime.device
        self.dtype = runtime.dtype
        self.folder: Path | None = None
        self.reopen: Callable[[], Any] | None = None
        self.training = False

    @property
    def name_or_path(self) -> str:
        """The checkpoint's name on the hub, or the folder."""
        return str(self.config.name_or_path or self.folder or "")

    def train(self, mode: bool = True) -> Self:
        """Return the model for `mode=False`; raise `ValueError` otherwise."""
        if mode:
            self._refuse("train()", "the weights are constants of ONNX graphs and can't be trained")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return the model for `requires_grad=False`; raise `ValueError` otherwise."""
        if requires_grad:
            self._refuse("requires_grad_(True)", "the weights are constants of ONNX graphs and have no gradients")
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the model if it has the device and dtype that are asked for.

        Args:
            args: As for `torch.nn.Module.to`.
            kwargs: Likewise.

        Raises:
            ValueError: The model is on another device, or has another dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and not _is_same_device(device, self.device):
            raise ValueError(
                f"to({str(device)!r}): the sessions of this model run on {self.device}. "
                f"Open the folder again for another device: accel.load(folder, runtime={device.type!r})"
            )
        if dtype is not None and dtype != self.dtype:
            raise ValueError(
                f"to({dtype}): this model was built for {self.dtype}. Build it again with another precision, such as "
                "precision=fp16"
            )
        return self

    def cpu(self) -> Self:
        """Return the model if it is on the CPU: see `to`."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Return the model if it is on that GPU: see `to`."""
        return self.to(torch.device("cuda") if device is None else torch.device("cuda", torch.device(device).index))

    def float(self) -> Self:
        """Return the model if it is in float32: see `to`."""
        return self.to(torch.float32)

    def half(self) -> Self:
        """Return the model if it is in float16: see `to`."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """Return the model if it is in bfloat16: see `to`."""
        return self.to(torch.bfloat16)

    def double(self) -> Self:
        """Raise `ValueError`: no model is in float64."""
        return self.to(torch.float64)

    @cached_property
    def meta_model(self) -> nn.Module:
        """Instance of the model's transformers class on the meta device, without weights."""
        with torch.device("meta"):
            model: nn.Module = model_class(self.config)(self.config)
        return model

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return how many parameters the exported model has.

        Args:
            only_trainable: Count parameters that can be trained: there are none.
            exclude_embeddings: Leave embedding tables out.
        """
        if only_trainable:
            return 0
        count: int = self.meta_model.num_parameters(exclude_embeddings=exclude_embeddings)  # type: ignore[operator]
        return count

    def get_decoder(self, modality: str | None = None) -> Self:
        """Return the model: calling it runs the decoder."""
        return self

    def get_compiled_call(self, compile_config: Any = None) -> Callable[..., Any]:
        """Return the model's call as it is: graphs are compiled when a session opens.

        It is kept as `_compiled_call`, by which transformers tells that calls are compiled.
        """
        self._compiled_call = self.__call__
        return self._compiled_call

    def get_input_embeddings(self) -> NoReturn:
        """Raise `ValueError`: the embeddings are part of the graphs."""
        self._refuse("get_input_embeddings()", "the embedding tables are constants of ONNX graphs")

    def get_output_embeddings(self) -> NoReturn:
        """Raise `ValueError`: the embeddings are part of the graphs."""
        self._refuse("get_output_embeddings()", "the embedding tables are constants of ONNX graphs")

    def resize_token_embeddings(self, *_: Any, **__: Any) -> NoReturn:
        """Raise `ValueError`: the vocabulary is fixed."""
        self._refuse("resize_token_embeddings()", "the vocabulary is fixed by the exported graphs")

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> NoReturn:
        """Raise `ValueError`: the model can't be trained."""
        self._refuse("gradient_checkpointing_enable()", "the model can't be trained")

    def can_generate(self) -> bool:
        """Return True: accel exports models with `generate` only."""
        return True

    def is_remote_code(self) -> bool:
        """Return False: the model runs no code from the hub."""
        return False

    def get_experts_implementation(self) -> Mapping[str, str]:
        """Return no implementations: experts are part of the graph."""
        return {}

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Do nothing: weights that are tied are stored once in the graphs."""

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return `labels` shifted to the right as the transformers class shifts them, [batch, length].

        Raises:
            ValueError: The transformers class doesn't shift labels, as decoder-only models.
        """
        transformers_class = model_class(self.config)
        method = getattr(transformers_class, "prepare_decoder_input_ids_from_labels", None)
        if method is not None:
            return method(self.meta_model, labels)  # type: ignore[no-any-return]
        # Classes without that method call a function of their module, with or without the id of the start token.
        function = getattr(sys.modules[transformers_class.__module__], "shift_tokens_right", None)
        if function is None:
            raise ValueError(
                f"a {self.config.model_type} model derives no decoder_input_ids from labels: pass input_ids"
            )
        values = [self.config.pad_token_id, self.config.decoder_start_token_id]
        return function(labels, *values[: len(inspect.signature(function).parameters) - 1])  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Copy the deployable that this model was opened from.

        Args:
            save_directory: Folder to write to. It is created if need be.
            push_to_hub: Upload it as well: see `push_to_hub`.
            kwargs: For `push_to_hub`: `repo_id` (by default the folder's name) and the rest. Options about the format
                of weights (`safe_serialization`, `max_shard_size`, …) are refused.

        Raises:
            ValueError: The model was not opened from a folder, or an option is unknown.
        """
        source = self._source("save_pretrained")
        target = Path(save_directory)
        if kwargs and not push_to_hub:
            raise ValueError(
                f"save_pretrained: {', '.join(sorted(kwargs))} can't be honoured: the folder is copied as is"
            )
        if target.resolve() != source.resolve():
            shutil.copytree(source, target, dirs_exist_ok=True)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a model accelerated by accel",
    ) -> Any:
        """Upload the deployable, its model card included, to the Hugging Face hub.

        Args:
            repo_id: Repository, such as "name/model". It is created if need be.
            private: Create it as a private one.
            token: Access token; by default the one that `hf auth login` stored.
            revision: Branch to upload to.
            commit_message: Subject of the commit.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            ValueError: The model was not opened from a folder.
            huggingface_hub.errors.HfHubHTTPError: The hub refuses.
        """
        source = self._source("push_to_hub")
        hub = HfApi(token=token)
        repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return hub.upload_folder(
            repo_id=repository, folder_path=source, revision=revision, commit_message=commit_message
        )

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        """Copy and pickle a model as the call that opens it again."""
        if self.reopen is None:
            raise TypeError("only a model that accel.load opened can be copied or pickled")
        return self.reopen, ()

    def _source(self, method: str) -> Path:
        """Return the folder that the model was opened from; raise `ValueError` if there is none."""
        if self.folder is None:
            raise ValueError(f"{method}: this model was not opened from a folder")
        return self.folder

    def _refuse(self, call: str, reason: str) -> NoReturn:
        """Raise `ValueError`."""
        raise ValueError(f"{call}: {reason}. {REBUILD}")


def _is_same_device(asked: torch.device, device: torch.device) -> bool:
    """Return whether `asked` means `device`; without an index, any device of its type is meant."""
    return asked.type == device.type and (asked.index is None or asked.index == (device.index or 0))
