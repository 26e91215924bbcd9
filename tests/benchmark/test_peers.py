"""`scripts/peers` compares libraries in turns, on the same tokens, and says why one can't take part."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from accel.data.corpus import SAMPLES
from accel.errors import AccelError
from accel.models.checkpoints import BUILT_IN
from scripts.peers import __main__ as script
from scripts.peers import environment
from scripts.peers.checkpoint import save_random_t5
from scripts.peers.comparison import Row, Workload, agreement, table, take_turns
from scripts.peers.gguf_file import interleave_rotary
from scripts.peers.libraries import Ids, Request
from scripts.peers.worker import Worker, WorkerError

SMALL = {"vocab_size": 500, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
SHORT = Workload("greedy", batch=1, beams=1, source=4, new_tokens=3)


def recorded(calls: list[str], name: str, seconds: Sequence[float]) -> Callable[[], tuple[float, Ids]]:
    """Return a function that notes its calls, and takes these seconds one after the other."""
    remaining = iter(seconds)

    def generate() -> tuple[float, Ids]:
        calls.append(name)
        return next(remaining), [[1, 2, 3]]

    return generate


def test_turns_interleave_and_leave_warm_up_out() -> None:
    calls: list[str] = []
    generates = {name: recorded(calls, name, (9, 1, 2)) for name in ("a", "b", "c")}
    rows = take_turns(generates, repeats=2, pause_s=0)
    assert calls == [*"abc", *"bca", *"cab"]
    assert [(row.name, row.seconds) for row in rows] == [("a", [1, 2]), ("b", [1, 2]), ("c", [1, 2])]


def test_a_library_that_fails_is_left_out_from_then_on() -> None:
    calls: list[str] = []

    def fails() -> tuple[float, Ids]:
        calls.append("b")
        raise WorkerError("no beams")

    rows = take_turns({"a": recorded(calls, "a", (1, 1, 1)), "b": fails}, repeats=2, pause_s=0)
    assert calls.count("b") == 1
    assert calls.count("a") == 3
    assert (rows[1].reason, rows[1].seconds) == ("no beams", [])


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([[5, 6, 7, 8], [1, 2, 3, 4]], 1.0),
        ([[5, 6, 9, 8], [1, 2, 3, 4]], 0.75),  # the 8 after the difference doesn't count
        ([[5, 6], [1, 2, 3, 4]], 0.75),
        ([[0, 6, 7, 8], [0, 2, 3, 4]], 0.0),
    ],
)
def test_agreement_ends_at_the_first_difference(tokens: Ids, share: float) -> None:
    assert agreement(tokens, [[5, 6, 7, 8], [1, 2, 3, 4]]) == share


def test_table_shows_speed_agreement_and_reasons() -> None:
    rows = [
        Row("reference", [4.0, 2.0, 3.0], [[1, 2, 3]]),
        Row("fast", [1.0, 1.5, 2.0], [[1, 2, 4]]),
        Row("short", [1.0], [[1, 2]]),
        Row("absent", reason="needs a | b"),
    ]
    lines = table(SHORT, rows, "reference").splitlines()
    assert lines[2] == "| reference | 3 [2 to 4] | 1.00 | 100% |"
    assert lines[3] == "| fast | 1.5 [1 to 2] | 2.00 | 67% |"
    assert lines[4] == "| short | 1 [1 to 1] | 3.00 | 67%, generated [2] tokens: not comparable |"
    assert lines[5] == "| absent | not measured: needs a / b | | |"


def test_table_without_reference_has_times_only() -> None:
    rows = [Row("reference", reason="out of memory"), Row("other", [1.0], [[1, 2, 3]])]
    assert table(SHORT, rows, "reference").splitlines()[3] == "| other | 1 [1 to 1] |  |  |"


class FakePip:
    """Stands for the commands that make an environment; those that name a package in `broken` fail."""

    def __init__(self, broken: str = "nothing") -> None:
        self.broken = broken
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        self.commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            python = Path(command[3]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        failed = any(argument.startswith(self.broken) for argument in command)
        return subprocess.CompletedProcess(command, int(failed), "", "first line\nerror: no compiler\n")


def test_environment_is_made_once(tmp_path: Path) -> None:
    pip = FakePip()
    assert environment.install(tmp_path, ["ctranslate2", "openvino"], pip) == {}
    installed = [argument for command in pip.commands for argument in command if "==" in argument]
    assert {"torch==2.13.0", "ctranslate2==4.8.5", "openvino==2026.4.1", "optimum-intel==2.2.0"} <= set(installed)
    again = FakePip()
    assert environment.install(tmp_path, ["ctranslate2", "openvino"], again) == {}
    assert again.commands == []


def test_a_library_that_does_not_install_leaves_the_others(tmp_path: Path) -> None:
    broken = FakePip("llama-cpp-python")
    failed = environment.install(tmp_path, ["llama.cpp", "ctranslate2"], broken)
    assert failed == {"llama.cpp": "not installed: error: no compiler"}
    mended = FakePip()
    assert environment.install(tmp_path, ["llama.cpp", "ctranslate2"], mended) == {}
    assert [command[-2] for command in mended.commands] == [environment.PACKAGES["llama.cpp"][0]]


def test_without_torch_nothing_is_installed(tmp_path: Path) -> None:
    failed = environment.install(tmp_path, ["openvino", "ctranslate2"], FakePip("torch=="))
    assert failed == dict.fromkeys(("openvino", "ctranslate2"), "not installed: error: no compiler")


@pytest.mark.parametrize("name", ["tensorrt-fp32", "openvino-int3", "openvino"])
def test_unknown_backends_are_answered_with_the_choices(name: str) -> None:
    with pytest.raises(AccelError, match=rf"'{name}' is unknown.*openvino, ctranslate2.*fp32, int8, int4"):
        script.split_backend(name)


def test_bad_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path / "kept"), "--model", str(tmp_path / "missing")]) == 2
    assert f"--model {tmp_path / 'missing'}: give t5-small or the folder" in capsys.readouterr().err


def test_inputs_are_distinct_and_the_same_in_every_run() -> None:
    workload = Workload("batch 8", batch=8, beams=1, source=32, new_tokens=4)
    ids = script.make_inputs(workload, 500)
    assert ids == script.make_inputs(workload, 500)
    assert len({tuple(row) for row in ids}) == 8
    assert min(min(row) for row in ids) >= 3
    assert len({number for row in ids for number in row}) > 150


def test_prompts_of_text_are_its_first_tokens() -> None:
    ids = script.text_inputs(Workload("", batch=2, beams=1, source=16, new_tokens=4), BUILT_IN / "t5-g2p")
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN / "t5-g2p")
    assert [len(row) for row in ids] == [16, 16]
    assert len({number for row in ids for number in row}) > 8
    text = (SAMPLES / "page.txt").read_text()
    assert [*ids[0], *ids[1]] == tokenizer(text).input_ids[:32]


def test_prompts_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(AccelError, match="has no tokenizer"):
        script.text_inputs(SHORT, tmp_path)


@pytest.fixture(scope="module")
def random_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_t5(folder, **SMALL)
    return folder


def test_random_weights_generate_distinct_tokens(random_t5: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(random_t5).eval()
    ids = torch.tensor(script.make_inputs(Workload("", 4, 1, 12, 24), 500))
    generated = model.generate(input_ids=ids, min_new_tokens=24, max_new_tokens=24, do_sample=False)
    assert min(len(set(row)) for row in generated[:, 1:].tolist()) >= 5
    assert len({tuple(row) for row in generated.tolist()}) == 4


@pytest.mark.slow
def test_worker_generates_what_transformers_generates(random_t5: Path) -> None:
    request = Request("transformers", "fp32", random_t5, None, random_t5 / "converted", threads=1, new_tokens=8)
    ids = script.make_inputs(Workload("", 2, 1, 12, 8), 500)
    with Worker(Path(sys.executable), threads=1) as worker:
        worker.open(request)
        seconds, tokens = worker.generate(ids, beams=3, new_tokens=8)
    model = T5ForConditionalGeneration.from_pretrained(random_t5).eval()
    right = model.generate(input_ids=torch.tensor(ids), min_new_tokens=8, max_new_tokens=8, num_beams=3)
    assert tokens == right[:, 1:].tolist()
    assert seconds > 0


def test_worker_gives_the_reason_in_one_line(tmp_path: Path) -> None:
    """This environment has no llama.cpp."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    request = Request("llama.cpp", "int8", tmp_path, None, tmp_path / "converted", threads=1, new_tokens=8)
    with (
        Worker(Path(sys.executable), threads=1) as worker,
        pytest.raises(WorkerError, match=r"^ModuleNotFoundError: No module named 'llama_cpp'$"),
    ):
        worker.open(request)


def test_worker_that_ends_is_reported(tmp_path: Path) -> None:
    request = Request("transformers", "fp32", tmp_path, None, tmp_path, threads=1, new_tokens=8)
    with Worker(Path("/bin/false"), threads=1) as worker, pytest.raises(WorkerError, match="ended with status 1"):
        worker.open(request)


def test_rotary_rows_are_interleaved_for_llama_cpp() -> None:
    """Neighbouring features rotated against each other give what halves give, in the new order."""
    heads, size, features = 2, 8, 5
    generator = np.random.default_rng(0)
    weight, x = generator.normal(size=(heads * size, features)), generator.normal(size=features)
    angles = generator.normal(size=size // 2)
    halves = (weight @ x).reshape(heads, 2, size // 2)  # Hugging Face: feature i with feature i + size / 2
    pairs = (interleave_rotary(weight, heads) @ x).reshape(heads, size // 2, 2)  # llama.cpp: 2i with 2i + 1
    cos, sin = np.cos(angles), np.sin(angles)
    right = np.stack([halves[:, 0] * cos - halves[:, 1] * sin, halves[:, 1] * cos + halves[:, 0] * sin], axis=-1)
    ours = np.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], axis=-1)
    assert np.abs(ours - right).max() < 1e-12
