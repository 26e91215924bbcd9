"""What `triton_python_backend_utils` offers to a decoupled model, by its names, for tests without Triton.

https://github.com/triton-inference-server/python_backend/blob/main/src/resources/triton_python_backend_utils.py
and src/pb_stub.cc. As in Triton, a sender takes nothing after the response with the final flag.
"""

import threading
from collections.abc import Mapping, Sequence

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
PATIENCE_S = 120.0
NUMPY_TYPES = {"TYPE_INT64": np.int64, "TYPE_INT32": np.int32, "TYPE_BOOL": np.bool_, "TYPE_STRING": np.object_}


def triton_string_to_numpy(name: str) -> type:
    return NUMPY_TYPES[name]


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        assert array.dtype != np.object_ or all(isinstance(item, bytes) for item in array.reshape(-1))
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class InferenceRequest:
    """A request, and what was sent for it.

    Attributes:
        responses: Its responses.
        begun: Set once there is one.
    """

    def __init__(self, inputs: Mapping[str, np.ndarray]) -> None:
        self._inputs = [Tensor(name, array) for name, array in inputs.items()]
        self.responses: list[InferenceResponse] = []
        self.begun, self._done = threading.Event(), threading.Event()
        self._cancelled = False

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def is_cancelled(self) -> bool:
        return self._cancelled

    def get_response_sender(self) -> "InferenceResponseSender":
        return InferenceResponseSender(self)

    def cancel(self) -> None:
        """Give the request up, as a client does."""
        self._cancelled = True

    def wait(self) -> list[InferenceResponse]:
        """Wait for the final flag, and return the responses."""
        assert self._done.wait(PATIENCE_S), "no response has the final flag"
        return self.responses

    def add(self, response: InferenceResponse | None, flags: int) -> None:
        """Keep a response."""
        assert not self._done.is_set(), "a response follows the final one"
        if response is not None:
            self.responses.append(response)
            self.begun.set()
        if flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self._done.set()


class InferenceResponseSender:
    def __init__(self, request: InferenceRequest) -> None:
        self._request = request

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        self._request.add(response, flags)

    def is_cancelled(self) -> bool:
        return self._request.is_cancelled()


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)
