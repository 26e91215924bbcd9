"""Worker processes: a model generates the same there as here, and its errors come back."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig

from accel.adapters import registry
from accel.adapters.types import Component
from accel.benchmark.backends import MERGED, TORCH, Sources, loaded_model
from accel.benchmark.timer import fixed_length_options
from accel.benchmark.worker import ModelWorker
from accel.errors import AccelError, DeviceMemoryError
from tests.conftest import Build

INPUTS = {"input_ids": torch.tensor([[5, 9, 7, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
OPTIONS = fixed_length_options(6, 2, use_cache=True)


@pytest.fixture(scope="module")
def sources(build: Build, tiny: Path) -> Sources:
    config, artifacts = build(tiny, "[convert,merge]")
    cache = registry.build(config.architecture).signature(AutoConfig.from_pretrained(tiny), Component.DECODE).cache
    folders = (str(tiny), str(artifacts["merge"].folder), str(artifacts["convert"].folder))
    return Sources(*folders, cache, replace(config.runtime, threads=1))


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_same_tokens_in_another_process(sources: Sources) -> None:
    """Tokens equal those of the model loaded here, with one latency each; the process ends with the context."""
    with loaded_model(MERGED, sources) as model:
        expected = model.generate(**INPUTS, **OPTIONS)
    with ModelWorker(MERGED, sources) as merged, ModelWorker(TORCH, sources) as eager:
        for process, name in ((merged, "onnx_merged"), (eager, "torch_cache")):
            assert process.open(INPUTS, (name, OPTIONS)) > 10**5  # bytes, of weights of more than that
        for process, name in ((merged, "onnx_merged"), (eager, "torch_cache")):
            timing = process.generate(name, OPTIONS)
            assert timing.tokens == expected.tolist()
            assert len(timing.latencies) == 6
            assert process.kept_in_fp32() == {}
        processes = {process.process.pid for process in (merged, eager)}
        assert len(processes & children()) == 2
    assert not processes & children()


def test_errors_come_back(sources: Sources) -> None:
    """Errors keep their message, and the process goes on."""
    with ModelWorker(MERGED, replace(sources, deployable="nowhere")) as process:
        with pytest.raises(AccelError, match="'nowhere' holds no merged decoder"):
            process.open(INPUTS)
        assert process.process.pid in children()


def test_a_process_that_ends_is_named(sources: Sources) -> None:
    """A killed process, as by an out-of-memory killer, is reported by its model's name."""
    with ModelWorker(MERGED, sources) as process:
        psutil.Process(process.process.pid).kill()
        with pytest.raises(AccelError, match=f"the process that runs '{MERGED}' ended"):
            process.open(INPUTS)


def test_out_of_memory(sources: Sources) -> None:
    """The message names the model and the remedy; the model itself goes on and can be asked for less."""
    with ModelWorker(MERGED, sources) as process:
        process.open(INPUTS)
        message = r"'merged': the device is out of memory: \d+ MB more were requested\..*fewer benchmark.backends"
        with pytest.raises(DeviceMemoryError, match=message):
            process.generate("onnx_merged", fixed_length_options(10**15, 1, use_cache=True))  # petabytes
        assert len(process.generate("onnx_merged", OPTIONS).latencies) == 6


def test_an_idle_process_leaves_no_semaphore_behind(tmp_path: Path) -> None:
    """It ends by itself: killed, it would leave what Python's resource tracker warns of on the user's screen."""
    script = tmp_path / "measure.py"
    script.write_text(
        "from multiprocessing import get_context\n"
        "from accel.benchmark.process import WorkerProcess\n"
        "def work():\n    global lock\n    lock = get_context('spawn').RLock()\n    return 7\n"
        "if __name__ == '__main__':\n    with WorkerProcess('work') as process:\n        print(process.call(work))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("7\n", "")


SHARING = """
import os, psutil, sys
from accel.benchmark.process import WorkerProcess, begin_imports, share_imports

def imported():
    return "transformers.generation.utils" in sys.modules, os.getppid()

if __name__ == "__main__":
    begin_imports()  # without an effect yet
    before = {child.pid for child in psutil.Process().children()}
    share_imports()
    begin_imports()
    begun = {child.pid for child in psutil.Process().children()}
    with WorkerProcess("a", forked=True) as a, WorkerProcess("b", forked=True) as b, WorkerProcess("c") as c:
        (a_has, server), (b_has, same_server), (c_has, parent) = [each.call(imported) for each in (a, b, c)]
        print(a_has, b_has, c_has, server == same_server != os.getpid(), parent == os.getpid(), a.pid != b.pid)
        print(not before, server in begun)
        print(server)
"""


STARTED = """
import psutil, sys
from accel.benchmark.process import WorkerProcess, begin_imports, share_imports

def imported():
    return "transformers.generation.utils" in sys.modules

if __name__ == "__main__":
    begin_imports(spawned=1)  # without an effect yet
    before = {child.pid for child in psutil.Process().children()}
    share_imports()
    begin_imports(spawned=2)
    begun = {child.pid for child in psutil.Process().children()}
    with WorkerProcess("a") as a, WorkerProcess("b") as b:
        print([each.call(imported) for each in (a, b)], {a.pid, b.pid} <= begun, not before)
    with WorkerProcess("c") as c:
        print(c.call(imported), c.pid in begun)
    begin_imports(spawned=1)
"""


def test_workers_may_start_ahead(tmp_path: Path) -> None:
    """With their imports; where none is left, one starts without them; what nobody takes ends with the program."""
    script = tmp_path / "measure.py"
    script.write_text(STARTED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[True, True] True True\nFalse False\n", "")


def test_workers_share_imports(tmp_path: Path) -> None:
    """Forked workers are processes of their own, with the imports of a process that ends with the program."""
    script = tmp_path / "measure.py"
    script.write_text(SHARING)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    facts, begun, server = done.stdout.splitlines()
    assert (facts, begun, done.stderr) == ("True True False True True True", "True True", "")
    psutil.wait_procs([psutil.Process(int(server))] if psutil.pid_exists(int(server)) else [], timeout=20)
    assert not psutil.pid_exists(int(server))
