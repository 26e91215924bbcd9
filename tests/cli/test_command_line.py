"""Invalid input on the command line: one message with value and choices, exit code 2, artifacts unchanged."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from accel.__main__ import main
from accel.config.schema import STAGES
from accel.pipeline.store import Store
from tests.conftest import overrides_for

LINES = 12
ROOT = Path(__file__).parents[2]
ErrorMessage = Callable[..., str]


@pytest.fixture
def error_message(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> ErrorMessage:
    """Function that runs the command line on the tiny model with overrides, and returns its error message.

    With `runs`, a stage may begin, because the error shows only then.
    """
    root = tmp_path / "artifacts"
    (root / "tiny" / "export-0123456789ab").mkdir(parents=True)
    (root / "tiny" / "export-0123456789ab" / "encoder.onnx").write_text("of another run")

    def run(*overrides: str, base: Sequence[str] | None = None, folder: Path = root, runs: bool = False) -> str:
        if not runs:
            monkeypatch.setattr(Store, "build", lambda _, stage, *more, **rest: pytest.fail(f"stage {stage} ran"))
        arguments = overrides_for(tiny, folder) if base is None else [*base, f"artifacts={folder}"]
        before = listing(tmp_path)
        monkeypatch.setattr(sys, "argv", ["accel", *arguments, *overrides])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert "Traceback" not in printed.err + printed.out
        message = printed.err.strip()
        assert 0 < len(message.splitlines()) <= LINES, message
        assert max(map(len, message.splitlines())) < 2000
        assert printed.out.strip() == ""
        assert listing(tmp_path) == before, "the failed run changed files"
        return message

    return run


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("notes", "not empty and holds no deployable"),
        ("notes/a.txt", "is a file"),
        ("notes/a.txt/model", "is no folder that you may write to"),
    ],
)
def test_output(error_message: ErrorMessage, tmp_path: Path, output: str, message: str) -> None:
    """The folder for the deployable is checked before one is made, which takes minutes."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    assert message in error_message(f"output={tmp_path / output}")
    assert "takes what the stage verify makes" in error_message("stage=[export]", f"output={tmp_path / 'new'}")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of every file below `folder`, without lock files."""
    paths = (path for path in folder.rglob("*") if path.suffix != ".lock")
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()}


def assert_names(message: str, *parts: str) -> None:
    """Assert that a message contains all `parts`."""
    for part in parts:
        assert part in message, message


# names that don't exist


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stage=exprt", ("'exprt'", "Did you mean export?", *STAGES, "all")),
        ("stage=[export,exprt]", ("'exprt'", *STAGES)),
        ("stage=3", ("3", *STAGES)),
        ("stage=null", ("stage", *STAGES)),
        ("stage=[]", ("stage", *STAGES)),
        ("merge.flga=x", ("merge.flga", "merge.flag")),
        ("mreg.flag=x", ("mreg", "merge")),
        ("+merge.other=x", ("merge.other", "merge.flag")),
        ("architecture=t6", ("t6", "t5", "auto")),
        ("precision=fp8", ("fp8", "fp16", "fp32", "auto")),
        ("precision.dtype=int8", ("int8", "float16", "float32")),
        ("precision.weight_bits=3", ("precision.weight_bits", "3", "4, 8")),
        ("precision=auto-lowbits", ("auto-lowbits", "auto-lowbit", "int8", "fp32")),
        ("runtime=gpu", ("gpu", "cuda", "cpu")),
        ("merge.strategy=other", ("other", "shared", "three_branch", "two_branch")),
        ("merge.flag='two words'", ("two words", "use_cache_branch")),
        ("+optimize.passes.nothing=false", ("nothing", "fold_constants")),
        ("benchmark.backends=[fastest]", ("fastest", "onnx_merged")),
        ("model.weights=none", ("none", "pretrained", "random")),
        ("generate.num_beam=4", ("generate.num_beam", "generate.num_beams")),
        ("+generate.num_beam=4", ("generate.num_beam", "generate.num_beams")),
        ("generate.txt=word", ("generate.txt", "generate.text")),
    ],
)
def test_unknown_name(error_message: ErrorMessage, override: str, named: tuple[str, ...]) -> None:
    """A stage, key, group choice or option that doesn't exist is named, with the existing ones."""
    assert_names(error_message(override), *named)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["precision=int4", "precision.weight_formats=[block-48]"], ("block-48", "block-64", "4 bits")),
        (["precision=int4", "precision.weight_formats=[channel]"], ("channel", "block-32-zero-point")),
        (["precision=int8", "precision.weight_formats=[]"], ("precision.weight_formats=[]", "channel", "block-256")),
        (["precision=int8-fp16", "precision.weight_formats=[channel]"], ("channel", "float16", "block-128")),
    ],
)
def test_weights_of_few_bits(error_message: ErrorMessage, overrides: list[str], named: tuple[str, ...]) -> None:
    """A format that doesn't exist in that many bits, or a combination that can't be used, is named with the choices."""
    assert_names(error_message(*overrides), *named)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("precision.candidates=[int3]", ("int3", "Did you mean int8?", "fp32, int4, int8")),
        ("precision.candidates=[fp16,fp32]", ("fp16", "fp32, int4, int8")),
        ("precision.candidates=[auto-lowbit]", ("auto-lowbit", "fp32, int4, int8")),
        ("precision.candidates=[int8,int8]", ("int8", "twice")),
        ("precision.weight_bits=8", ("precision.weight_bits=8", "max_divergence")),
        ("stage=[export,merge]", ("auto-lowbit", "merge", "verify", "int8")),
    ],
)
def test_choice_between_precisions(error_message: ErrorMessage, override: str, named: tuple[str, ...]) -> None:
    """What can't be a candidate, or set for all of them, is named with what can."""
    assert_names(error_message("precision=auto-lowbit", override), *named)


def test_weights_of_few_bits_on_a_gpu(error_message: ErrorMessage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values in FP32 are for a CPU, and the message says what to use instead."""
    monkeypatch.setattr("accel.cli.validate.check_device", lambda device: None)
    for bits in (8, 4):
        message = error_message(f"precision=int{bits}", "runtime.device=cuda:0")
        assert_names(message, f"precision.weight_bits={bits}", "cuda:0", "runtime=cpu", f"precision=int{bits}-fp16")


def test_unknown_model(error_message: ErrorMessage) -> None:
    """The models that can be chosen are listed."""
    message = error_message(base=["model=t5-smal", "runtime=cpu"])
    assert_names(message, "t5-smal", "t5-small", "t5-large", "t5-g2p", "auto")


def test_option_of_transformers_is_accepted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Existing options are accepted, with and without Hydra's plus."""
    monkeypatch.setattr(sys, "argv", ["accel", *overrides_for(tiny, Path("unused")), "--cfg", "job"])
    for option in ("generate.num_beams=4", "+generate.top_k=5", "generate.do_sample=true"):
        monkeypatch.setattr(sys, "argv", ["accel", *overrides_for(tiny, Path("unused")), option, "--cfg", "job"])
        main()


# checkpoints


def folder_with(root: Path, **config: object) -> Path:
    """Make a folder with a config.json of these values; without any, an empty folder."""
    folder = root / "given"
    folder.mkdir()
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_missing_checkpoint(error_message: ErrorMessage, tmp_path: Path) -> None:
    """A folder that doesn't exist is named."""
    missing = tmp_path / "nowhere"
    assert_names(error_message(base=["model=auto", f"model.checkpoint={missing}"]), str(missing), "doesn't exist")


def test_no_checkpoint_at_all(error_message: ErrorMessage) -> None:
    """With model=auto alone, the message names the missing value."""
    assert_names(error_message(base=["model=auto"]), "model.checkpoint")


def test_empty_checkpoint(error_message: ErrorMessage, tmp_path: Path) -> None:
    """For a folder without a model, the message names the missing file."""
    folder = folder_with(tmp_path)
    assert_names(error_message(base=["model=auto", f"model.checkpoint={folder}"]), str(folder), "config.json")


def test_checkpoint_without_weights(error_message: ErrorMessage, tmp_path: Path) -> None:
    """A config alone is not enough, unless random weights are asked for."""
    folder = folder_with(tmp_path, model_type="t5", architectures=["T5ForConditionalGeneration"])
    message = error_message(base=["model=auto", f"model.checkpoint={folder}", "runtime=cpu", "stage=export"])
    assert_names(message, str(folder), "weights", "safetensors")


def test_inputs_of_later_stages_are_checked_first(error_message: ErrorMessage, tiny: Path, tmp_path: Path) -> None:
    """If references or a tokenizer are missing from the checkpoint's folder, no stage begins."""
    assert_names(error_message("model.references=heldout.tsv"), "can't read", str(tiny / "heldout.tsv"))
    (tmp_path / "words.txt").write_text("one\n")
    for key in ("verify.texts", "audit.texts", "generate.file"):
        message = error_message(f"{key}={tmp_path / 'words.txt'}")
        assert_names(message, f"{key}={tmp_path / 'words.txt'}", "has no tokenizer")


def test_checkpoint_that_is_a_file(error_message: ErrorMessage, tiny: Path) -> None:
    """A weights file instead of its folder is named."""
    path = tiny / "model.safetensors"
    assert_names(error_message(base=["model=auto", f"model.checkpoint={path}"]), str(path))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ("'bert'", "encoder alone", "t5", "docs/")),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, ("'mamba'", "recurrent state", "gpt2")),
        ({"model_type": "nonsense"}, ("nonsense",)),
        ({"hidden_size": 4}, ("model_type",)),
    ],
)
@pytest.mark.parametrize("architecture", ["auto", "t5"])
def test_checkpoint_of_another_type(
    error_message: ErrorMessage, tmp_path: Path, config: dict[str, object], named: tuple[str, ...], architecture: str
) -> None:
    """The message has the model type and the supported ones, also with an explicit architecture."""
    folder = folder_with(tmp_path, **config)
    message = error_message(
        base=["model=auto", f"model.checkpoint={folder}", f"architecture={architecture}", "runtime=cpu"]
    )
    assert_names(message, *named)


def test_invalid_config_json(error_message: ErrorMessage, tmp_path: Path) -> None:
    """A truncated config.json is reported with its folder, without a traceback."""
    folder = folder_with(tmp_path, model_type="t5")
    (folder / "config.json").write_text('{"model_type": ')
    assert_names(error_message(base=["model=auto", f"model.checkpoint={folder}"]), str(folder))


def test_damaged_weights(error_message: ErrorMessage, tiny: Path, tmp_path: Path) -> None:
    """A damaged weights file is reported with its folder when it is opened."""
    folder = folder_with(tmp_path, **json.loads((tiny / "config.json").read_text()))
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header at all")
    message = error_message(base=["model=auto", f"model.checkpoint={folder}", "runtime=cpu", "stage=export"], runs=True)
    assert_names(message, str(folder))


@pytest.mark.parametrize("checkpoint", ["somebody/some-model", "bert-base-uncased"])
def test_hub_is_unreachable(error_message: ErrorMessage, checkpoint: str) -> None:
    """The message gives the alternatives to the hub."""
    message = error_message(base=["model=auto", f"model.checkpoint={checkpoint}"])
    assert_names(message, checkpoint, "model.checkpoint=FOLDER", "model.weights=random")


# numbers


@pytest.mark.parametrize(
    "override",
    [
        "generate.num_beams=0",
        "generate.num_beams=-1",
        "generate.max_new_tokens=0",
        "generate.max_new_tokens=-5",
        "generate.max_new_tokens=1000000000000",
        "generate.max_new_tokens=1.5",
        "generate.max_length=-2",
        "generate.batch_size=0",
        "generate.num_return_sequences=0",
        "benchmark.num_beams=0",
        "benchmark.source_length=-3",
        "benchmark.source_length=0",
        "benchmark.new_tokens=1000000000000",
        "benchmark.batch_size=0",
        "benchmark.repeats=0",
        "benchmark.warmup=-1",
        "profile.new_tokens=0",
        "verify.num_beams=0",
        "verify.max_new_tokens=-1",
        "verify.source_length=1000000000000",
        "audit.max_length=0",
        "audit.batches=0",
        "audit.overflow_margin=0",
        "export.tolerance=-1",
        "export.opset=3",
        "runtime.threads=-1",
    ],
)
def test_number_out_of_range(error_message: ErrorMessage, override: str) -> None:
    """Numbers that are zero, negative or far too large are refused before any stage, with key and value."""
    key, _, value = override.partition("=")
    message = error_message(override)
    assert_names(message, key)
    assert value in message or f"{float(value):g}" in message


@pytest.mark.parametrize(
    "override",
    [
        *("generate.seed=abc", "generate.seed=-1", f"generate.seed={10**23}", "generate.batch_size=null"),
        *("generate.temperature=nan", "generate.temperature=0", "generate.temperature=abc", "generate.top_k=-1"),
        *("generate.eos_token_id=abc", "generate.eos_token_id=120", "generate.decoder_start_token_id=-1"),
        *("generate.forced_bos_token_id=99999", "generate.bad_words_ids=[]", "generate.bad_words_ids=[[99999]]"),
        *("generate.repetition_penalty=0", "generate.sequence_bias={}", "generate.cache_implementation=quant"),
        *("generate.text=[]", "generate.text={a:1}", "generate.top_p=2", "generate.max_time=-1"),
        *("generate.no_repeat_ngram_size=-1", "generate.length_penalty=nan", "generate.pad_token_id=-1"),
        *("generate.suppress_tokens=[-1]", "generate.suppress_tokens=0", "generate.num_beams=0"),
        *("runtime.device=cuda", "runtime.device=abc", "runtime.device=meta", "runtime.threads=1000000"),
        *("runtime.capture_batch_sizes=[1000000]", "export.seed=-1", "audit.overflow_margin=nan"),
        *("audit.overflow_margin=inf", "precision.operators=[Foo]", "model.revision=nosuch"),
        *("verify.metrics=[[1]]", "model.config=1", "export.tolerance=null", "runtime.session=null"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="runtime.device=cuda is valid there")
def test_values_that_raised_or_passed(error_message: ErrorMessage, override: str) -> None:
    """Values that once ended in a traceback, never, or in nonsense: one line that names the key."""
    message = error_message(override)
    assert len(message.splitlines()) == 1, message
    assert_names(message, override.partition("=")[0])
    assert f"Did you mean {override.partition('=')[0]}?" not in message


def test_least_beyond_most(error_message: ErrorMessage) -> None:
    message = error_message("generate.min_new_tokens=9", "generate.max_new_tokens=3")
    assert_names(message, "generate.min_new_tokens=9", "generate.max_new_tokens=3")


@pytest.mark.parametrize("override", ["benchmark.new_tokens=many", "export.opset=[1]", "audit.overflow_margin=wide"])
def test_value_of_another_type(error_message: ErrorMessage, override: str) -> None:
    """Hydra's type errors are reported with key and value, in a few lines."""
    key, _, value = override.partition("=")
    assert_names(error_message(override), key, value)


@pytest.mark.parametrize(
    ("buckets", "named"), [("[]", "such as [64,256,1024]"), ("[0,64]", "=[0, 64]: each number must be from 1 to")]
)
def test_invalid_buckets(error_message: ErrorMessage, buckets: str, named: str) -> None:
    """Static caches need at least one bucket, each of at least one token."""
    assert_names(error_message("runtime.static=true", f"runtime.buckets={buckets}"), "runtime.buckets", named)


def test_capture_without_a_static_cache(error_message: ErrorMessage) -> None:
    """Dynamic caches can't be captured, because their addresses change."""
    assert_names(error_message("runtime.capture=true"), "runtime.capture=true", "runtime.static=true")


def test_engines(error_message: ErrorMessage) -> None:
    """An unknown engine is refused with the choices, and the fused one without the static decode graph that it runs."""
    assert_names(error_message("runtime.engine=fsued"), "runtime.engine", "'fsued'", "auto, fused, onnxruntime")
    assert_names(error_message("runtime.engine=fused"), "runtime.engine=fused needs runtime.static=true")
    options = ("runtime.engine=fused", "runtime.static=true", "convert.static_decode=false")
    assert_names(error_message(*options), "runtime.engine=fused needs convert.static_decode=true")


def test_capture_batch_size_of_zero(error_message: ErrorMessage) -> None:
    assert_names(error_message("runtime.capture_batch_sizes=[0,4]"), "runtime.capture_batch_sizes=[0, 4]", "from 1 to")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("convert.fuse_attention=[encoders]", ("'encoders'", "encoder, prefill", "static_decode")),
        ("+convert.decode_passes.fuse_rotation=false", ("'fuse_rotation'", "fuse_gqa")),
        ("convert.fuse_attention=[decode]", ("convert.fuse_attention=[decode]", "merge.strategy=two_branch")),
    ],
)
def test_invalid_conversion_options(error_message: ErrorMessage, override: str, named: tuple[str, ...]) -> None:
    """Unknown components and passes are refused, and so is fused attention in `decode` with `merge.strategy=shared`."""
    assert_names(error_message(override), *named)


def test_conflicting_options(error_message: ErrorMessage) -> None:
    """Options that GenerationConfig refuses, and inputs given twice, are named."""
    assert_names(error_message("generate.num_beams=2", "generate.num_return_sequences=5"), "num_return_sequences")
    assert_names(error_message("generate.text=a", "generate.file=b"), "generate.text", "generate.file")
    assert_names(error_message("generate.output=out.txt"), "generate.output", "generate.file")


# texts and files


def test_text_with_special_characters(error_message: ErrorMessage) -> None:
    """Hydra's grammar needs quotes around `!` and `'`: the message shows the quoted form, which works."""
    for text in ("hello!", "don't", "what's that!"):
        message = error_message(f"generate.text={text}", base=["runtime=cpu"])
        suggestion = message.splitlines()[-1]
        assert_names(message, f"generate.text={text}", "quotes")
        quoted = subprocess.run(
            ["bash", "-c", f"printf %s {suggestion[suggestion.index(': ') + 2 :]}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert quoted == f'generate.text="{text}"'


def test_quoted_text_is_accepted(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quoted text reaches the configuration unchanged."""
    argv = ["accel", *overrides_for(tiny, Path("unused")), 'generate.text="don\'t!"', "--cfg", "job"]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    assert yaml.safe_load(capsys.readouterr().out)["generate"]["text"] == "don't!"


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "no text"), (b" \n\n", "no text"), (b"caf\xe9\n", "UTF-8"), (None, "input.txt")],
    ids=["empty", "blank", "not UTF-8", "missing"],
)
@pytest.mark.parametrize("key", ["generate.file", "audit.texts"])
def test_input_file(error_message: ErrorMessage, tmp_path: Path, content: bytes | None, named: str, key: str) -> None:
    """An unusable input file is named before any stage runs."""
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    assert_names(error_message(f"{key}={path}"), str(path), named)


def test_input_file_that_is_a_folder(error_message: ErrorMessage, tmp_path: Path) -> None:
    """A folder instead of an input file is named."""
    assert_names(error_message(f"generate.file={tmp_path}"), str(tmp_path))


# artifact folders


def test_unwritable_artifact_folder(error_message: ErrorMessage, tmp_path: Path) -> None:
    """An artifact folder that can't be created (here below a file) is named."""
    (tmp_path / "file").write_text("no folder")
    assert_names(error_message("stage=export", folder=tmp_path / "file", runs=True), str(tmp_path / "file"), "write")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_artifact_folder(error_message: ErrorMessage, tmp_path: Path) -> None:
    """A folder without write permission is named."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    assert_names(error_message("stage=export", folder=folder, runs=True), str(folder), "write")


# other environments, each in a process of its own


def accel(*arguments: str, prelude: str = "", folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process, after the code `prelude`."""
    code = f"{prelude}\nimport sys\nsys.argv = ['accel', *{list(arguments)!r}]\nfrom accel.__main__ import main\nmain()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)


INSTALLED = """
import importlib.metadata, sys
wheels = {wheels!r}
real = importlib.metadata.distribution
def distribution(name):
    if name.startswith("onnxruntime"):
        if name not in wheels:
            raise importlib.metadata.PackageNotFoundError(name)
        name = "numpy"  # which is in the same folder
    return real(name)
importlib.metadata.distribution = distribution
if not wheels:
    sys.modules["onnxruntime"] = None
"""


@pytest.mark.parametrize(
    ("wheels", "named"),
    [
        ([], ("onnxruntime", "accel-onnx[cpu]")),
        (["onnxruntime", "onnxruntime-gpu"], ("onnxruntime", "onnxruntime-gpu", "both")),
    ],
    ids=["none", "both"],
)
def test_wheels_of_onnx_runtime(tiny: Path, tmp_path: Path, wheels: list[str], named: tuple[str, ...]) -> None:
    """Without ONNX Runtime, or with two wheels that overwrite each other's files, the message says what to install."""
    overrides = overrides_for(tiny, tmp_path / "artifacts", "stage=export")
    done = accel(*overrides, prelude=INSTALLED.format(wheels=wheels))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= LINES
    assert_names(done.stderr, *named, "pip", "accel-onnx[cuda12]")
    assert listing(tmp_path) == {}


GPU_WHEEL = """
import onnxruntime
onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("prelude", "named"),
    [("", ("onnxruntime-gpu", "accel-onnx[cuda13]", "runtime=cpu")), (GPU_WHEEL, ("GPU", "torch", "runtime=cpu"))],
    ids=["the CPU's wheel", "no GPU"],
)
def test_cuda_is_missing(tiny: Path, tmp_path: Path, prelude: str, named: tuple[str, ...]) -> None:
    """With runtime=cuda but no onnxruntime-gpu or no GPU, the message says what is missing and what to install."""
    overrides = overrides_for(tiny, tmp_path / "artifacts", "stage=export", "runtime=cuda")
    done = accel(*overrides, prelude=prelude)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= LINES
    assert_names(done.stderr, "runtime=cuda", *named)
    assert listing(tmp_path) == {}


REPORT_IMPORTS = """
import atexit, sys
atexit.register(lambda: print("LOADED", sorted({"torch", "transformers", "onnxruntime"} & set(sys.modules))))
"""


def test_help_is_quick_and_complete() -> None:
    """`--help` doesn't import torch, and shows stages, groups and values."""
    started = time.monotonic()
    done = accel("--help", prelude=REPORT_IMPORTS)
    assert time.monotonic() - started < 10
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    assert_names(done.stdout, *STAGES, "t5-large", "fp16", "python -m accel", "benchmark:", "FOLDER_OR_HUB_ID")
    assert "__main__" not in done.stdout


def test_configuration_can_be_printed() -> None:
    """`--cfg job` prints YAML of every section with the overrides applied and every `auto` resolved."""
    done = accel("--cfg", "job", "merge.flag=with_past", "runtime=cpu")
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    assert printed["architecture"]["model_types"] == ["t5"]
    assert [printed[group]["name"] for group in ("model", "precision", "runtime")] == ["t5-g2p", "fp32", "cpu"]
    assert printed["runtime"]["session"] == {"session.force_spinning_stop": "1"}
    assert printed["merge"]["flag"] == "with_past"
    assert {"model", "precision", "runtime", *STAGES} - {"convert"} <= set(printed)
    assert "hydra" not in printed


def test_unknown_option_of_the_command() -> None:
    """An unknown command-line option exits with 2 and no traceback."""
    done = accel("--halp")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--halp" in done.stderr
