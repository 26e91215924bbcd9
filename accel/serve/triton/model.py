"""Model of Triton's python backend, which generates with the deployable beside this file.

https://github.com/triton-inference-server/python_backend#usage. It needs the package accel, with its extra `serve`.
"""

import json
import os
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

if TYPE_CHECKING:
    from accel.serve.requests.sequences import Delta

UNAVAILABLE = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
CANCELLED = 499


class TritonPythonModel:
    """A model that Triton opens by name of this class."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the deployable, and warm it up. Triton takes no requests before.

        Args:
            args: What Triton says about the model and this instance of it.
        """
        if args["model_instance_kind"] == "GPU":  # each instance is a process of its own: let it see its GPU only
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            number = int(args["model_instance_device_id"])
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
        from accel.config.serve import ServeConfig
        from accel.serve.triton.answering import Answering

        config = json.loads(args["model_config"])
        limits = ServeConfig(**json.loads(config["parameters"]["limits"]["string_value"]))
        types = {output["name"]: output["data_type"] for output in config["output"]}
        self._ids_type = pb_utils.triton_string_to_numpy(types["output_ids"])
        folder = Path(args["model_repository"]) / args["model_version"] / "deployable"
        self._answering = Answering(args["model_name"], folder, limits)

    def execute(self, requests: list[Any]) -> None:
        """Hand requests to the scheduler, without waiting for their responses."""
        from accel.serve.triton.answering import Inputs

        for request in requests:
            responses = _Responses(request.get_response_sender(), self._ids_type)
            try:
                ids, stream = _input(request, "input_ids"), _input(request, "stream")
                inputs = Inputs(
                    text=_text(request, "text_input"),
                    ids=None if ids is None else ids.reshape(-1).tolist(),
                    parameters=_text(request, "generation_parameters") or "{}",
                    stream=stream is not None and bool(stream.reshape(-1)[0]),
                )
            except (UnicodeDecodeError, IndexError) as error:
                responses.fail(HTTPStatus.BAD_REQUEST, f"an input can't be read: {error}")
            else:
                self._answering.submit(inputs, responses)

    def finalize(self) -> None:
        """Cancel what still runs, and free the model."""
        self._answering.close()


def _input(request: Any, name: str) -> Any:
    """Return an input as a numpy array; None if the request has none of this name."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _text(request: Any, name: str) -> str | None:
    """Return the text of an input; None if the request has none of this name."""
    array = _input(request, name)
    return None if array is None else str(array.reshape(-1)[0].decode("utf-8"))


class _Responses:
    """Sends the responses to one request. Implements `accel.serve.triton.answering.Receiver`.

    Args:
        sender: Triton's sender of responses.
        ids_type: Numpy dtype of token ids.
    """

    def __init__(self, sender: Any, ids_type: Any) -> None:
        self._sender, self._ids_type = sender, ids_type

    def part(self, delta: "Delta") -> None:
        """Send new text and tokens; those with a `finish_reason` are the last."""
        response = pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor("text_output", np.array([delta.text.encode()], dtype=np.object_)),
                pb_utils.Tensor("output_ids", np.array(delta.tokens, dtype=self._ids_type)),
                pb_utils.Tensor("finish_reason", np.array([(delta.finish_reason or "").encode()], dtype=np.object_)),
            ]
        )
        self._send(response, last=delta.finish_reason is not None)

    def fail(self, status: int, message: str) -> None:
        """Send an error, by its HTTP status, as the last response."""
        errors = pb_utils.TritonError
        code = errors.INVALID_ARG
        if status == CANCELLED:
            code = errors.CANCELLED
        elif status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in UNAVAILABLE:
            code = errors.UNAVAILABLE if status in UNAVAILABLE else errors.INTERNAL
        self._send(pb_utils.InferenceResponse(error=errors(message, code)), last=True)

    def is_cancelled(self) -> bool:
        """Return whether the client has given the request up."""
        return bool(self._sender.is_cancelled())

    def _send(self, response: Any, last: bool) -> None:
        """Send a response."""
        if last:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            self._sender.send(response)
