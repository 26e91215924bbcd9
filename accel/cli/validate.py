"""Validation of the configuration before any stage runs. Each error names the value found and the values allowed."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from accel.config import bounds
from accel.config.engines import FUSED, ONNXRUNTIME
from accel.config.generate_options import OWN_OPTIONS, check_types, generation_options
from accel.config.presets import precision_candidates
from accel.config.schema import AuditConfig, Config, PrecisionConfig, RuntimeConfig, VerifyConfig
from accel.data.corpus import read_lines, read_texts
from accel.data.texts import References, has_tokenizer
from accel.errors import AccelError, unknown
from accel.evaluation import metrics
from accel.evaluation.component_runner import max_positions
from accel.graph.precision.formats import FORMATS
from accel.graph.quantization.formats import BITS, CHANNEL, formats
from accel.models import checkpoints
from accel.models.option_check import check_options, option_names
from accel.pipeline.runner import select_stages
from accel.reporting import delivery
from accel.runtime.providers import check_device, check_provider, operator_names, supports_dtype
from accel.stages import audit, benchmark, checkpoint, choice, convert, merge, optimize, plan

MAX_NAME = 128  # characters; file systems take names of 255 bytes


def validate(config: Config) -> None:
    """Check every section of the configuration.

    Args:
        config: Configuration with every `auto` resolved.

    Raises:
        AccelError: On the first value that can't be used.
    """
    bounds.check(config)
    check_provider(config.runtime.provider)
    _check_name(config.model.name)
    check_device(config.runtime.device)
    checkpoint.check(config.model)
    optimize.check(config.optimize.passes)
    convert.check(config.convert.decode_passes)
    merge.check(config.merge, config.convert.fuse_attention)
    benchmark.check(config.benchmark, config.runtime)
    _check_audit(config.audit)
    _check_verify(config.verify)
    _check_precision(config)
    _check_static(config.runtime, config.convert.static_decode)
    if "plan" in select_stages(config.stage):
        plan.check(config.convert.static_decode)
    if config.output is not None:
        if not config.output:
            raise AccelError("output='': must be a path; an empty one stands for the working directory")
        if "verify" not in select_stages(config.stage):
            raise AccelError(
                f"output={config.output} takes what the stage verify makes: add it to stage={config.stage}"
            )
        delivery.check(Path(config.output))


@contextmanager
def _naming(key: str, value: object) -> Iterator[None]:
    """Open a context whose `AccelError` is raised with the key of a file in front. An empty path is refused."""
    if not str(value):
        raise AccelError(f"{key}='': must be a path; an empty one stands for the working directory")
    try:
        yield
    except AccelError as error:
        raise AccelError(f"{key}={value}: {error}") from error


def _check_name(name: str) -> None:
    """Raise `AccelError` on a `model.name` that isn't the name of one folder below `artifacts`."""
    separators = {"/", "\\"} & set(name)
    if separators or name in (".", "..") or not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        raise AccelError(
            f"model.name={name!r}: must be the name of a folder below the artifact folder: 1 to {MAX_NAME} printable "
            "characters, no slash or backslash, and not '.' or '..'"
        )


def _check_static(runtime: RuntimeConfig, static_decode: bool) -> None:
    """Raise `AccelError` on options of static caches, CUDA graphs and engines that don't fit together."""
    if runtime.static and not runtime.buckets:
        raise AccelError(
            "runtime.buckets=[]: runtime.static=true needs at least one bucket, a length in tokens, such as "
            "[64,256,1024]"
        )
    if runtime.capture and not runtime.static:
        raise AccelError(
            "runtime.capture=true needs runtime.static=true: a CUDA graph can only be captured over static caches, "
            "whose addresses and shapes don't change"
        )
    for key, value in (("runtime.static", runtime.static), ("convert.static_decode", static_decode)):
        if runtime.engine == FUSED and not value:
            raise AccelError(
                f"runtime.engine={FUSED} needs {key}=true: it computes decode steps over static caches. "
                f"Or take runtime.engine={ONNXRUNTIME}"
            )
    device = torch.device(runtime.device)
    if runtime.engine == FUSED and device.type == "cuda":
        from accel.engine.kernel.launch import unsupported  # here, as it brings the planner along

        if (reason := unsupported(device)) is not None:
            raise AccelError(f"runtime.engine={FUSED}: {reason}. Take runtime.engine={ONNXRUNTIME}")


def _check_audit(audit_config: AuditConfig) -> None:
    """Raise `AccelError` on a number out of range, or if the audit has no inputs to run on."""
    if audit_config.max_batches < audit_config.batches:
        raise AccelError(
            f"audit.max_batches={audit_config.max_batches}: must be audit.batches={audit_config.batches} or more"
        )
    if audit_config.texts is not None:
        with _naming("audit.texts", audit_config.texts):
            read_texts(audit_config.texts, audit_config.column)
    elif not audit_config.random:
        raise AccelError("audit.random=false needs audit.texts=FILE: without random ids, the audit has no other inputs")


def _check_verify(verify: VerifyConfig) -> None:
    """Raise `AccelError` on an unknown metric, a number out of range, or texts that can't be read."""
    metrics.check(verify.metrics)
    if verify.targets is not None and verify.texts is None:
        raise AccelError(
            f"verify.targets={verify.targets} needs verify.texts=FILE: the inputs that the targets belong to"
        )
    if verify.texts is not None:
        with _naming("verify.texts", verify.texts):
            lines = read_texts(verify.texts, verify.column)
        if verify.targets is not None:
            with _naming("verify.targets", verify.targets):
                targets = read_texts(verify.targets, verify.targets_column)
            References.pair(lines, targets, (f"verify.texts={verify.texts}", f"verify.targets={verify.targets}"))


def _check_precision(config: Config) -> None:
    """Raise `AccelError` on an unknown format or plan, or a format that a selected stage can't run on this runtime."""
    dtype, runtime = config.precision.dtype, config.runtime
    if config.precision.candidates:
        for candidate in precision_candidates(config.precision).values():
            _check_precision(replace(config, precision=candidate))
        choice.check(config)
        return
    if dtype not in FORMATS:
        raise unknown("precision.dtype", dtype, FORMATS)
    _check_weights(config.precision, runtime)
    if config.precision.plan not in audit.RULES:
        raise unknown("precision.plan", config.precision.plan, audit.RULES)
    for operator in config.precision.operators:
        if operator not in operator_names():
            raise unknown("operator in precision.operators", operator, operator_names())
    if dtype == "float32" or (dtype in runtime.compute_dtype and supports_dtype(dtype, runtime.device)):
        return
    stages = [name for name in select_stages(config.stage) if name in ("generate", "benchmark", "profile")]
    if not stages and runtime.device == "cpu":
        return  # verify emulates the format
    if dtype not in runtime.compute_dtype:
        reason = f"{runtime.provider} has no kernels for {dtype}"
    else:
        reason = f"this GPU doesn't compute in {dtype}"
    supported = ", ".join(name for name in runtime.compute_dtype if name != dtype)
    raise AccelError(
        f"precision.dtype={dtype}: {reason}, which {', '.join(stages) or 'verify'} would run. "
        f"Use a precision of dtype {supported}; or run stage=verify with runtime=cpu, which emulates {dtype}"
    )


def _check_weights(precision: PrecisionConfig, runtime: RuntimeConfig) -> None:
    """Raise `AccelError` on weights in a number of bits, or in a format, that doesn't exist or can't be used here."""
    bits, names = precision.weight_bits, precision.weight_formats
    if bits is None:
        return
    if bits not in BITS:
        raise unknown("precision.weight_bits", bits, [str(each) for each in BITS])
    choices = formats(bits)
    if not names:
        raise AccelError(f"precision.weight_formats=[] names no format. Choices: {', '.join(choices)}")
    for name in names:
        if name not in choices:
            raise unknown(f"format of {bits} bits in precision.weight_formats", name, choices)
    if precision.dtype == "float32" and runtime.device != "cpu":
        raise AccelError(
            f"precision.weight_bits={bits} with precision.dtype=float32 is for a CPU, and runtime={runtime.name} "
            f"computes on {runtime.device}. Use precision=int{bits}-fp16, or runtime=cpu"
        )
    if precision.dtype != "float32" and CHANNEL in names:
        raise AccelError(
            f"precision.weight_formats={names} with precision.dtype={precision.dtype}: the operator of {CHANNEL} takes "
            "float32 only. Use blocks, such as block-128"
        )


def check_lengths(config: Config, description: PretrainedConfig, stages: Collection[str]) -> None:
    """Check that the model has enough positions for the source lengths and new tokens of the stages.

    Args:
        config: Configuration.
        description: Hugging Face config of the model.
        stages: Stages that are going to run; the lengths of others are not checked.

    Raises:
        AccelError: If a stage needs more positions than the model has.
    """
    positions = max_positions(description)
    if positions is None:
        return
    verify, benchmark, profile = config.verify, config.benchmark, config.profile
    for stage, source, new, key in (
        ("verify", verify.source_length, verify.max_new_tokens, "max_new_tokens"),
        ("benchmark", benchmark.source_length, benchmark.new_tokens, "new_tokens"),
        ("profile", profile.source_length, profile.new_tokens, "new_tokens"),
    ):
        needed = max(source, new + 1) if description.is_encoder_decoder else source + new
        if stage in stages and needed > positions:
            raise AccelError(
                f"{stage}.source_length={source} and {stage}.{key}={new} need {needed} positions, but this model of "
                f"type {description.model_type!r} has {positions}: reduce one of the two"
            )


def check_texts(config: Config, stages: Collection[str]) -> None:
    """Check that the model's references exist, and that a model that gets text has a tokenizer.

    Both are files of the checkpoint that a late stage reads, maybe an hour after the first one began.

    Args:
        config: Configuration.
        stages: Stages that are going to run.

    Raises:
        AccelError: If the references can't be read, or text is given and there is no tokenizer.
    """
    texts = {"audit.texts": config.audit.texts, "verify.texts": config.verify.texts}
    if "generate" in stages:
        texts |= {f"generate.{key}": config.generate.get(key) for key in ("text", "file")}
    texts = {key: value for key, value in texts.items() if value is not None}
    if config.model.references is None and not texts:
        return
    random = config.model.weights == "random"  # such a checkpoint is made by accel, without a tokenizer
    folder = None if random else checkpoints.locate(config.model, weights=False)
    for key, value in texts.items():
        if folder is None or not has_tokenizer(folder):
            raise AccelError(
                f"{key}={value}: the checkpoint has no tokenizer to encode text with. Use a checkpoint with the "
                f"tokenizer's files, or leave {key} out"
            )
    if folder is not None and config.model.references is not None:
        with _naming("model.references", config.model.references):
            References.read(folder / config.model.references)


def check_generate(options: dict[str, Any], description: PretrainedConfig) -> None:
    """Check the section `generate`.

    Args:
        options: The section: options of accel's own and those of transformers' `generate`.
        description: Hugging Face config of the model.

    Raises:
        AccelError: On an unknown option, a value that can't be used, options that exclude each other, or an input file
            that can't be read.
    """
    names = option_names(description) | OWN_OPTIONS
    for name in options:
        if name not in names:
            raise unknown("generation option", f"generate.{name}", sorted(f"generate.{key}" for key in names))
    check_types(options)
    inputs = [f"generate.{name}" for name in ("text", "file", "audio") if options.get(name) is not None]
    if len(inputs) > 1:
        raise AccelError(f"{' and '.join(inputs)} are set, but only one of them may be")
    if "output" in options and "file" not in options:
        raise AccelError(
            f"generate.output={options['output']} needs generate.file=FILE, whose outputs it takes, one a line"
        )
    if options.get("file") is not None:
        with _naming("generate.file", options["file"]):
            read_lines(Path(str(options["file"])))
        _check_output(Path(str(options["file"])), options.get("output"))
    _check_audio(options.get("audio"))
    check_options(generation_options(options), description)


def _check_output(source: Path, output: Any) -> None:
    """Raise `AccelError` if `generate.output` would overwrite `generate.file`, by whatever path or link."""
    if output is not None and Path(str(output)).exists() and source.samefile(str(output)):
        raise AccelError(
            f"generate.output={output} is the same file as generate.file={source}: it would be overwritten"
        )


def _check_audio(audio: Any) -> None:
    """Raise `AccelError` if a file of `generate.audio`, one path or a list of them, doesn't exist."""
    if audio is None:
        return
    for path in audio if isinstance(audio, list) else [audio]:
        if not Path(str(path)).is_file():
            raise AccelError(f"generate.audio={audio}: can't read {path}: no such file")
