"""A model repository for Triton: its files, and its `model.py` over a stub of Triton's python backend."""

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from accel import testing
from accel.cli import application
from accel.config.export_triton import ExportTritonConfig
from accel.config.serve import ServeConfig
from accel.errors import AccelError
from accel.models.loading import load
from accel.pipeline import runner
from accel.serve.triton import config_file, repository
from tests.conftest import Build
from tests.families import FAMILIES
from tests.serve.triton import triton_backend_stub as stub
from tests.serve.triton.triton_schema import DataType, Kind, ModelConfig, data_type_name

NAME = "g2p"
LONG = {"min_new_tokens": 60, "max_new_tokens": 60, "no_repeat_ngram_size": 1}
WORDS = ["photosynthesis", "speculative", "a", "unquestionably"]


@pytest.fixture(scope="module")
def folder(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the embedded model, trained, in a repository."""
    overrides = ["model.checkpoint=accel://t5-g2p", "runtime.static=true", "verify.inputs=2", "verify.references=4"]
    deployable = build(Path("t5-g2p"), "verify", overrides)[1]["verify"].folder
    target = tmp_path_factory.mktemp("repository") / NAME
    repository.write(deployable, target, ExportTritonConfig(instances=2), ServeConfig(max_new_tokens=64), on_gpu=False)
    return target


def parsed(folder: Path) -> Any:
    """Return the description of a model as Triton reads it."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def opened(folder: Path) -> Any:
    """Return the model of a repository, as Triton opens it."""
    spec = importlib.util.spec_from_file_location("triton_model", folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    description = parsed(folder)
    outputs = [{"name": item.name, "data_type": data_type_name(item.data_type)} for item in description.output]
    parameters = {key: {"string_value": value.string_value} for key, value in description.parameters.items()}
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps({"name": description.name, "output": outputs, "parameters": parameters}),
            "model_instance_kind": "CPU",
            "model_instance_name": f"{description.name}_0_0",
            "model_instance_device_id": "0",
            "model_name": description.name,
            "model_repository": str(folder),
            "model_version": "1",
        }
    )
    return model


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    sys.modules["triton_python_backend_utils"] = stub
    model = opened(folder)
    yield model
    model.finalize()
    del sys.modules["triton_python_backend_utils"]


def request(text: str | None = None, ids: list[int] | None = None, stream: bool | None = None, **options: Any) -> Any:
    """Return a request."""
    inputs = {}
    if text is not None:
        inputs["text_input"] = np.array([text.encode()], np.object_)
    if ids is not None:
        inputs["input_ids"] = np.array(ids, np.int64)
    if stream is not None:
        inputs["stream"] = np.array([stream])
    if options:
        inputs["generation_parameters"] = np.array([json.dumps(options).encode()], np.object_)
    return stub.InferenceRequest(inputs)


def answer(sent: Any) -> tuple[str, list[int], list[str]]:
    """Wait for a request that succeeds, and return its text, its tokens, and the finish reason of each response."""
    text, ids, reasons = b"", list[int](), list[str]()
    for response in sent.wait():
        assert not response.has_error(), response.error().message()
        values = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        assert values["output_ids"].dtype == np.int64
        text += values["text_output"][0]
        ids += values["output_ids"].tolist()
        reasons.append(values["finish_reason"][0].decode())
    return text.decode(), ids, reasons


def failure(sent: Any) -> tuple[str, int]:
    """Wait for a request that fails, and return its message and code."""
    last = sent.wait()[-1]
    assert last.has_error()
    return last.error().message(), last.error().code()


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[str, list[int], list[int]]]:
    """Word -> text, new tokens and prompt of `generate`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "1" / "deployable")
    found = {}
    with load(folder / "1" / "deployable") as direct:
        for word in WORDS:
            encoded = tokenizer(word, return_tensors="pt")
            tokens = direct.generate(**encoded, max_new_tokens=64)[0, 1:].tolist()
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            found[word] = (text, tokens, encoded["input_ids"][0].tolist())
    assert len({text for text, _, _ in found.values()}) == len(WORDS)
    return found


def test_the_description_is_what_triton_reads(folder: Path) -> None:
    """Types and shapes are those of the graph, and the model gets one request at a time, with several responses."""
    description = parsed(folder)
    assert (description.name, description.backend, description.max_batch_size) == (NAME, "python", 0)
    assert description.model_transaction_policy.decoupled
    inputs = {item.name: (item.data_type, list(item.dims), item.optional) for item in description.input}
    outputs = {item.name: (item.data_type, list(item.dims)) for item in description.output}
    text, ids, flag = DataType["TYPE_STRING"].number, DataType["TYPE_INT64"].number, DataType["TYPE_BOOL"].number
    assert inputs == {
        "text_input": (text, [1], True),
        "input_ids": (ids, [-1], True),
        "generation_parameters": (text, [1], True),
        "stream": (flag, [1], True),
    }
    assert outputs == {"text_output": (text, [1]), "output_ids": (ids, [-1]), "finish_reason": (text, [1])}
    (group,) = description.instance_group
    assert (group.count, group.kind) == (2, Kind["KIND_CPU"].number)
    limits = ServeConfig(**json.loads(description.parameters["limits"].string_value))
    assert limits == ServeConfig(max_new_tokens=64)


def test_a_description_for_gpus_with_a_name_to_quote() -> None:
    text = config_file.config_text('say "ä" \\', "TYPE_INT32", True, 1, "{}")
    description = text_format.Parse(text, ModelConfig())
    assert description.name == 'say "ä" \\'
    assert description.instance_group[0].kind == Kind["KIND_GPU"].number
    assert description.input[1].data_type == DataType["TYPE_INT32"].number


def test_answers_are_those_of_generate(model: Any, expected: dict[str, Any]) -> None:
    """Text and token ids, all at once and each in one response."""
    requests = [request(word) for word in WORDS] + [request(ids=expected[word][2]) for word in WORDS]
    assert model.execute(requests) is None
    for sent, word in zip(requests, WORDS * 2, strict=True):
        assert answer(sent) == (*expected[word][:2], ["stop"])


def test_streaming(model: Any) -> None:
    """There are several responses, which together are the one without streaming; the last one alone has a reason."""
    whole, parts = request("photosynthesis", **LONG), request("photosynthesis", stream=True, **LONG)
    model.execute([whole, parts])
    text, ids, reasons = answer(parts)
    assert (text, ids) == answer(whole)[:2]
    assert len(set(ids)) == 60
    assert len(reasons) >= 3
    assert reasons == [""] * (len(reasons) - 1) + ["length"]


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (request(), "text_input or input_ids"),
        (request("a", ids=[5]), "only one"),
        (request(ids=[10**6]), "input_ids: 1000000 is no id"),
        (request(ids=[-1]), "input_ids: -1 is no id"),
        (request(ids=[]), "no ids"),
        (request("a", num_beam=2), "num_beams"),
        (request("a", max_new_tokens=65), "allows 64"),
        (request("a", num_return_sequences=2), "one sequence"),
        (stub.InferenceRequest({"text_input": np.array([b"\xff"], np.object_)}), "can't be read"),
        (
            stub.InferenceRequest(
                {
                    "text_input": np.array([b"a"], np.object_),
                    "generation_parameters": np.array([b"{"], np.object_),
                }
            ),
            "generation_parameters is no valid JSON",
        ),
    ],
)
def test_a_bad_request_has_an_error_and_the_next_an_answer(
    bad: Any, part: str, model: Any, expected: dict[str, Any]
) -> None:
    good = request("speculative")
    model.execute([bad, good])
    message, code = failure(bad)
    assert part in message
    assert code == stub.TritonError.INVALID_ARG
    assert answer(good)[:2] == expected["speculative"][:2]


def test_a_cancelled_request_ends(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before its last token, and leaves the batch."""
    step, resume = threading.Event(), threading.Event()
    sent = request("photosynthesis", stream=True, **LONG)
    scheduler = model._answering._served.scheduler
    submit = scheduler.submit

    def slow(asked: Any, listener: Any) -> Any:
        def listen(event: Any) -> None:
            step.set()
            resume.wait(0.2)  # holds the scheduler's thread, so that the request can't end before it is cancelled
            listener(event)

        return submit(asked, listen)

    monkeypatch.setattr(scheduler, "submit", slow)
    model.execute([sent])
    assert step.wait(60)
    sent.cancel()
    message, code = failure(sent)
    resume.set()
    assert (message, code) == ("the request was cancelled", stub.TritonError.CANCELLED)
    assert sum(len(each.output_tensors()[1].as_numpy()) for each in sent.responses[:-1]) < 60
    deadline = time.monotonic() + 10
    while scheduler.status().running and time.monotonic() < deadline:
        time.sleep(0.01)  # the row is released after the last event
    assert scheduler.status().running == 0


def test_the_end_of_the_model_ends_its_requests(folder: Path, model: Any) -> None:
    """Each has a last response, and no thread is left."""
    threads = threading.active_count()
    other = opened(folder)
    sent = [request("photosynthesis", stream=True, **LONG) for _ in range(40)]
    other.execute(sent)
    other.finalize()
    codes = {failure(each)[1] for each in sent if each.wait()[-1].has_error()}
    assert codes == {stub.TritonError.UNAVAILABLE}
    assert threading.active_count() <= threads


# the command line


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    """Run the command line, which must fail with 2 before anything is built, and return its message."""

    def refuse(*_: object) -> None:
        raise AssertionError("a stage runs")

    monkeypatch.setattr(runner.Pipeline, "run", refuse)
    monkeypatch.setattr(sys, "argv", ["accel", "runtime=cpu", *overrides])
    with pytest.raises(SystemExit) as raised:
        application.main()
    assert raised.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["stage=export_triton"], ("export_triton.output=REPO",)),
        (["stage=export_triton", "export_triton.output=file"], ("export_triton.output=file", "not a folder")),
        (["stage=export_triton", "export_triton.output=repo"], ("t5-g2p already", "model.name")),
        (["stage=export_triton", "export_triton.outptu=repo"], ("export_triton.outptu", "export_triton.output")),
        (["stage=export_triton", "export_triton.instances=0"], ("export_triton.instances=0",)),
        (["stage=[serve,export_triton]"], ("serve doesn't end", "export_triton")),
        (["stage=export_trion"], ("export_trion", "export_triton")),
    ],
)
def test_mistakes(
    overrides: list[str],
    parts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Each has one message that names value and choices, before anything is built."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "repo" / "t5-g2p").mkdir(parents=True)
    message = run(capsys, monkeypatch, *overrides)
    for part in parts:
        assert part in message, message
    assert len(message.splitlines()) <= 3


def test_speech_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything is built, and before the repository is made."""
    testing.random_model(FAMILIES["whisper"]).save_pretrained(tmp_path / "speaking")
    checkpoint, repo = f"model.checkpoint={tmp_path / 'speaking'}", tmp_path / "repo"
    overrides = ("stage=export_triton", "model=auto", checkpoint, f"export_triton.output={repo}")
    assert "speaking takes speech" in run(capsys, monkeypatch, *overrides)
    assert not repo.exists()


def test_a_deployable_without_token_ids_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AccelError, match="no merged decoder"):
        repository.write(tmp_path, tmp_path / "repo" / "a", ExportTritonConfig(), ServeConfig(), on_gpu=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_command_line(
    folder: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage reuses what is built, writes the folder once, and says how to serve it."""
    overrides = ["model=auto", "model.checkpoint=accel://t5-g2p", f"artifacts={artifacts}", "runtime=cpu"]
    more = ["runtime.static=true", "verify.inputs=2", "verify.references=4", "verify.unique_tokens=true"]
    stage = ["verify.latency=false", "stage=export_triton", f"export_triton.output={tmp_path / 'repo'}"]
    monkeypatch.setattr(sys, "argv", ["accel", *overrides, *more, *stage])
    application.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "tritonserver --model-repository=" in shown
    written = {str(path.relative_to(tmp_path / "repo")) for path in (tmp_path / "repo").rglob("*")}
    assert {"t5-g2p/config.pbtxt", "t5-g2p/1/model.py", "t5-g2p/1/deployable/config.json"} <= written
    assert [path.name for path in (tmp_path / "repo").iterdir()] == ["t5-g2p"]
    with pytest.raises(SystemExit):
        application.main()
    assert "t5-g2p already" in capsys.readouterr().err
