"""Stand-in for CUDA graphs on the CPU: records the operations of a function's second call, and replays these later.

A replay runs the same operations over the same tensors, whatever the host's values are by then. So it shows what a CUDA
graph would do wrong: a value of the host that should have changed, a tensor at another address, a synchronisation.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel.engine.operations import choice
from accel.runtime import beam_cache, token_graph
from accel.runtime.decode_buffers import DecodeBuffers

SYNCHRONIZING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")


class Recorder(TorchDispatchMode):
    """Mode that records operators, and calls that aren't made of operators, in order."""

    active: ClassVar["Recorder | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Callable[[], None]] = []
        self.paused = False

    def __enter__(self) -> "Recorder":
        Recorder.active = self
        super().__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        Recorder.active = None
        super().__exit__(*arguments)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = operator(*args, **kwargs)
        if self.paused:
            return results
        if operator.name().split(".")[0] in SYNCHRONIZING:
            raise RuntimeError(f"{operator.name()} waits for the device")

        def replay() -> None:
            again = operator(*args, **kwargs)
            for kept, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)

        self.tape.append(replay)
        return results


class ReplayedCallable:
    """Function that is run, then recorded, then replayed, as `CudaGraphCallable` does on a GPU."""

    recorded: ClassVar[list[str]] = []
    """Names of the functions that were recorded."""

    def __init__(self, function: Callable[[], None], device: torch.device, name: str) -> None:
        self._function, self._name = function, name
        self._calls = 0
        self._tape: list[Callable[[], None]] | None = None

    @property
    def captured(self) -> bool:
        return self._tape is not None

    def __call__(self) -> None:
        self._calls += 1
        if self._tape is not None:
            for replay in self._tape:
                replay()
        elif self._calls == 1:
            self._function()
        else:
            with Recorder() as recorder:
                self._function()
            self._tape = recorder.tape
            ReplayedCallable.recorded.append(self._name)


def replay_token_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decode buffers that are made from now on replay tokens."""
    bind = DecodeBuffers._bind

    def recordable(*arguments: Any) -> Callable[[], None]:
        step = bind(*arguments)

        def call() -> None:
            recorder = Recorder.active
            if recorder is None:
                step()
                return
            recorder.paused = True
            step()
            recorder.paused = False
            recorder.tape.append(step)

        return call

    monkeypatch.setattr(ReplayedCallable, "recorded", [])
    monkeypatch.setattr(DecodeBuffers, "_bind", recordable)
    monkeypatch.setattr(token_graph, "CudaGraphCallable", ReplayedCallable)
    monkeypatch.setattr(choice, "on_cpu", lambda scores: False)
    monkeypatch.setattr(beam_cache, "row_mover", lambda device: beam_cache.copy_rows)
