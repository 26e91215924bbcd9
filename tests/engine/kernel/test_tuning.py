"""Settings of the kernel: what is chosen by which times, how long that may take, and what is kept where."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accel.engine.kernel import launch, records, tuning
from accel.engine.kernel.launch import Target, settings_for, source
from accel.engine.kernel.placement import NotRunnableError
from accel.engine.kernel.program import Builder, Program
from accel.engine.kernel.tuning import CHOICES, DEFAULT, FILE, Tuning, keep, kept, tune
from accel.system.user_cache import user_cache
from tests.engine.kernel.layers import Sizes, layered, tensors_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "accel"


class Kernels:
    """Stands for a GPU: the times of settings, and a clock that goes on by what a measurement takes."""

    def __init__(self, seconds: Callable[[Tuning], float], takes: float = 1.0) -> None:
        self.measured: list[Tuning] = []
        self._seconds, self._takes, self.now = seconds, takes, 100.0

    def measure(self, settings: Tuning) -> float:
        self.measured.append(settings)
        self.now += self._takes
        return self._seconds(settings)

    def tune(self, **options: float) -> Tuning:
        return tune(self.measure, clock=lambda: self.now, **options)


def test_defaults_are_choices() -> None:
    for setting, values in CHOICES.items():
        assert getattr(DEFAULT, setting) in values


def test_the_fastest_settings() -> None:
    """One after the other: the second setting is tried with what the first was found to be."""
    times = {"max_splits": {8: 3.0, 4: 1.0, 2: 2.0, 1: 4.0}, "least_slots": {2: 5.0, 1: 6.0, 4: 3.0, 8: 9.0}}
    kernels = Kernels(lambda each: times["max_splits"][each.max_splits] + times["least_slots"][each.least_slots])
    assert kernels.tune() == Tuning(max_splits=4, least_slots=4)
    assert kernels.measured[0] == DEFAULT
    assert {each.max_splits for each in kernels.measured[4:]} == {4}
    assert len(kernels.measured) == len(set(kernels.measured)) == 11


def test_noise_changes_nothing() -> None:
    """What is less than one per cent faster than the defaults is no reason for other settings."""
    kernels = Kernels(lambda each: 1.0 if each == DEFAULT else 0.995)
    assert kernels.tune() == DEFAULT
    assert Kernels(lambda each: 0.98 if each.max_splits == 2 else 1.0).tune() == Tuning(max_splits=2)


def test_settings_that_the_device_lacks() -> None:
    """They are skipped, such as a ring that is too short; without the defaults there is no kernel."""

    def seconds(each: Tuning) -> float:
        if each.spare_slots:
            raise NotRunnableError("a block has too little shared memory")
        return 1.0 / each.least_slots

    assert Kernels(seconds).tune() == Tuning(least_slots=8)
    with pytest.raises(NotRunnableError, match="too little"):
        Kernels(lambda each: seconds(replace(each, spare_slots=2))).tune()


@pytest.mark.parametrize(("takes", "count"), [(2.5, 10), (4.0, 6), (9.0, 2), (20.0, 1), (60.0, 1)])
def test_time_is_limited(takes: float, count: int) -> None:
    """No measurement begins that would end after the budget; a slow one is the only one."""
    kernels = Kernels(lambda each: 1.0 / each.max_splits, takes)
    assert kernels.tune() == DEFAULT
    assert len(kernels.measured) == count
    assert kernels.now - 100 <= max(30.0, takes)


def test_what_is_kept(cache: Path) -> None:
    """Numbers alone, in a file that only the user can write, for this key alone."""
    first, second = Tuning(4, 1, 2, 3), Tuning(1, 8, 0)
    assert kept("a") is None
    keep("a", first)
    keep("b", second)
    assert (kept("a"), kept("b"), kept("c")) == (first, second, None)
    assert json.loads((cache / FILE).read_text())["a"] == GOOD
    assert cache.stat().st_mode & 0o077 == 0
    keep("a", second)
    assert kept("a") == second
    (cache / FILE).unlink()
    assert kept("a") is None


GOOD = {"max_splits": 4, "least_slots": 1, "spare_slots": 2, "in_flight": 3}


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        "fast",
        {},
        {**GOOD, "max_splits": 3},
        {**GOOD, "max_splits": 16},  # more than the kernel has room for
        {**GOOD, "least_slots": 0},
        {**GOOD, "least_slots": True},
        {**GOOD, "least_slots": 1.0},
        {**GOOD, "spare_slots": -1},
        {**GOOD, "spare_slots": "2"},
        {**GOOD, "in_flight": 1},
        {**GOOD, "command": 1},
        {"max_splits": 4, "least_slots": 1},
    ],
)
def test_damaged_values(values: Any) -> None:
    """The defaults hold where a file has no settings of the kernel, whoever wrote it."""
    folder = user_cache()
    assert folder is not None
    (folder / FILE).write_text(json.dumps({"a": values, "b": GOOD}))
    assert kept("a") is None
    assert kept("b") == Tuning(4, 1, 2, 3)
    keep("a", DEFAULT)
    assert (kept("a"), kept("b")) == (DEFAULT, Tuning(4, 1, 2, 3))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_damaged_files(content: bytes) -> None:
    folder = user_cache()
    assert folder is not None
    (folder / FILE).write_bytes(content)
    assert kept("a") is None
    keep("a", Tuning(2, 2, 2))
    assert kept("a") == Tuning(2, 2, 2)


def test_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    keep("a", DEFAULT)
    assert kept("a") is None


def program(rows: int = 2, length: int = 600, settings: Tuning = DEFAULT) -> Program:
    """Return the program of a small decoder."""
    sizes = Sizes(layers=1, length=length, source=1500)
    made = layered(sizes)
    return Builder(made, tensors_of(made, sizes, rows, CPU), rows, CPU, {}, 132, settings).program


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Properties of the GPU that there seems to be."""
    found = SimpleNamespace(name="H100", major=9, minor=0, shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    return found


def test_measured_once(device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each device, number of rows, length of caches and source of the kernel."""
    measured: list[Tuning] = []

    def measure(settings: Tuning) -> float:
        measured.append(settings)
        return 1.0 / settings.least_slots

    def found(each: Program, measuring: bool = True) -> Tuning:
        measured.clear()
        return settings_for(each, torch.device("cuda"), measure if measuring else None)

    best = Tuning(least_slots=8)
    assert found(program(), measuring=False) == DEFAULT
    assert (found(program()), len(measured)) == (best, 11)
    assert (found(program()), len(measured)) == (best, 0)
    assert (found(program(), measuring=False), len(measured)) == (best, 0)
    for other in (program(rows=3), program(length=700)):
        assert (found(other, measuring=False), len(measured)) == (DEFAULT, 0)
        assert (found(other), len(measured)) == (best, 11)
    device.name = "A100"
    assert found(program(), measuring=False) == DEFAULT
    device.name = "H100"
    assert found(program(), measuring=False) == best
    monkeypatch.setattr(launch, "SOURCES", (*launch.SOURCES, "main"))  # as after a change of the kernel
    assert found(program(), measuring=False) == DEFAULT


def test_settings_reach_the_kernel() -> None:
    """Splits are in the shapes, with words for what parts exchange; the rest are macros."""
    target = Target(232_448, bulk=True)
    few = program(settings=Tuning(max_splits=2, least_slots=4, in_flight=3))
    assert sum("SPLITS = 2 " in shape.body for shape in few.shapes) == 2
    assert sum("SPLITS = 8 " in shape.body for shape in program().shapes) == 2
    assert "#define LEAST_SLOTS 4\n" in source(few, target)
    assert "#define LEAST_SLOTS 2\n" in source(program(), target)
    assert "#define COPIES 3\n" in source(few, target)
    assert "#define COPIES 2\n" in source(program(), target)

    def words(each: Program) -> int:
        kept_words = {tensor.data_ptr(): tensor.numel() for tensor in each.keep}
        first = next(one for one in each.operations if each.shapes[one.shape].kind == "attention")
        return kept_words[first.pointers[10]]

    assert words(program(settings=Tuning(least_slots=1))) == 4 * words(program())  # 5 slots: 5 parts, or 2


def test_spare_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is shorter by so many slots, since the block gets less shared memory."""
    loaded: list[str] = []
    monkeypatch.setattr(launch, "_load", lambda code, rows, device, memory: loaded.append(code))
    for settings in (DEFAULT, Tuning(spare_slots=2)):
        launch.Kernel(program(settings=settings), CPU, None, target=Target(200_000, bulk=True))  # type: ignore[arg-type]
    memory = [int(code.split("#define MEMORY ")[1].split("\n")[0]) for code in loaded]
    assert memory == [200_000, 200_000 - 2 * records.slot_bytes(0)]
    common = source(program(), Target(200_000, bulk=True))
    assert "SLOTS = (MEMORY - (int)sizeof(Rest) - 128) / (SLOT_BYTES + 16);" in common
    assert f"SEGMENT = {records.SEGMENT};" in common
    assert "UNIT_BYTES = SEGMENT + 64;" in common
    assert "#define SCALE_BYTES 0\n" in common
    assert "SLOT_BYTES = UNITS * UNIT_BYTES + SCALE_BYTES;" in common


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [Tuning(4, 1, 0), Tuning(2, 2, 2, 3), Tuning(1, 2, 4, 4), Tuning(8, 8, 0)])
def test_settings_change_no_results_on_a_gpu(settings: Tuning) -> None:
    """But for the order of sums: the logits are those of the defaults within rounding."""
    from tests.engine.kernel.test_reliability import DEVICE, LONG, Decoder, block_count, difference

    decoder, other = Decoder(LONG, filled=True), Decoder(LONG, filled=True)
    expected = decoder.steps(decoder.kernel(), (0, 300, 1000))
    other.program = Builder(other.plan, other.tensors, 2, DEVICE, other.weights, block_count(), settings).program
    assert difference(other.steps(other.kernel(), (0, 300, 1000)), expected) < 3e-3


@pytest.mark.gpu
def test_tuning_on_a_gpu() -> None:
    """Below 30 s, kept, and no slower than the defaults by more than noise."""
    import time

    from tests.engine.kernel.test_reliability import DEVICE, LONG, Decoder, block_count

    decoder = Decoder(LONG)

    def measure(settings: Tuning) -> float:
        decoder.program = Builder(
            decoder.plan, decoder.tensors, 2, DEVICE, decoder.weights, block_count(), settings
        ).program
        decoder.tensors["position"].fill_(1099)
        return tuning.launch_seconds(decoder.kernel(), DEVICE)

    default = decoder.program
    start = time.perf_counter()
    found = settings_for(default, DEVICE, measure)
    assert time.perf_counter() - start < 30
    assert settings_for(default, DEVICE) == found
    assert measure(found) <= 1.05 * measure(DEFAULT)
