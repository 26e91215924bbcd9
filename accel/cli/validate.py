"""Refuses what can't work before any stage runs: one message that names the value and the choices."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from accel.config.generate_options import OWN_OPTIONS, generation_options
from accel.config.schema import AuditConfig, Config, RuntimeConfig, VerifyConfig
from accel.data.corpus import read_lines, read_texts
from accel.data.texts import References, has_tokenizer
from accel.errors import AccelError, unknown
from accel.evaluation import metrics
from accel.evaluation.component_runner import longest
from accel.graph.precision.formats import FORMATS
from accel.models import checkpoints
from accel.pipeline.runner import chosen
from accel.runtime.providers import check_provider, computes
from accel.stages import audit, benchmark, checkpoint, convert, merge, optimize

OPSETS = range(18, 24)  # what both the exporter and the graph passes speak
LONGEST = 1_000_000  # tokens; more is a slip of the keyboard


def validate(config: Config) -> None:
    """Raises `AccelError` on the first value that can't be used."""
    check_provider(config.runtime.provider)
    checkpoint.check(config.model)
    optimize.check(config.optimize.passes)
    convert.check(config.convert.decode_passes)
    merge.check(config.merge, config.convert.fuse_attention)
    benchmark.check(config.benchmark, config.runtime)
    _positive(config, "audit", ("batches", "max_batches", "batch_size", "max_length"))
    _positive(config, "verify", ("inputs", "batch_size", "source_length", "max_new_tokens", "num_beams"))
    _positive(config, "benchmark", ("source_length", "new_tokens", "num_beams", "batch_size", "repeats"))
    _positive(config, "profile", ("source_length", "new_tokens", "top"))
    _check_audit(config.audit)
    _check_verify(config.verify)
    _check_precision(config)
    if config.runtime.threads < 0:
        raise AccelError(f"runtime.threads={config.runtime.threads}: must be 0 (automatic) or more")
    _check_static(config.runtime)
    if config.export.opset not in OPSETS:
        raise AccelError(f"export.opset={config.export.opset}: must be from {OPSETS[0]} to {OPSETS[-1]}")
    if not 0 < config.export.tolerance < 1:
        raise AccelError(f"export.tolerance={config.export.tolerance}: must be above 0 and below 1")
    check_generate(config.generate)


def _check_static(runtime: RuntimeConfig) -> None:
    if runtime.static and min(runtime.buckets, default=0) < 1:
        raise AccelError(f"runtime.buckets={runtime.buckets}: must be lengths of 1 or more, such as [64,256,1024]")
    if runtime.capture and not runtime.static:
        raise AccelError("runtime.capture=true needs runtime.static=true: only what stays where it is can be recorded")
    if min(runtime.capture_batch_sizes, default=1) < 1:
        raise AccelError(
            f"runtime.capture_batch_sizes={runtime.capture_batch_sizes}: must be numbers of sequences, or [] for any"
        )


def _check_audit(given: AuditConfig) -> None:
    if given.overflow_margin < 1:
        raise AccelError(
            f"audit.overflow_margin={given.overflow_margin}: must be 1 or more (1: only what really overflows)"
        )
    if given.max_batches < given.batches:
        raise AccelError(f"audit.max_batches={given.max_batches}: must be audit.batches={given.batches} or more")
    if given.trials < 0:
        raise AccelError(f"audit.trials={given.trials}: must be 0 (none) or more")
    if given.texts is not None:
        read_texts(given.texts, given.column)
    elif not given.random:
        raise AccelError("audit.random=false needs audit.texts=FILE: there would be nothing to look at")


def _check_verify(verify: VerifyConfig) -> None:
    metrics.check(verify.metrics)
    least = verify.min_token_agreement
    if least is not None and not 0 <= least <= 1:
        raise AccelError(f"verify.min_token_agreement={least}: must be from 0 to 1, a share of sequences")
    if verify.max_metric_loss < 0:
        raise AccelError(f"verify.max_metric_loss={verify.max_metric_loss}: must be 0 or more, in points of percent")
    if verify.targets is not None and verify.texts is None:
        raise AccelError(f"verify.targets={verify.targets} needs verify.texts: the inputs that they belong to")
    if verify.texts is not None:
        lines = read_texts(verify.texts, verify.column)
        if verify.targets is not None:
            targets = read_texts(verify.targets, verify.targets_column)
            References.pair(lines, targets, (f"verify.texts={verify.texts}", f"verify.targets={verify.targets}"))


def _check_precision(config: Config) -> None:
    """Raises `AccelError` on a format or a plan that doesn't exist, or a format that the runtime can't run."""
    dtype, runtime = config.precision.dtype, config.runtime
    if dtype not in FORMATS:
        raise unknown("precision.dtype", dtype, FORMATS)
    if config.precision.plan not in audit.RULES:
        raise unknown("precision.plan", config.precision.plan, audit.RULES)
    if dtype == "float32" or (dtype in runtime.compute_dtype and computes(dtype, runtime.device)):
        return
    stages = [name for name in chosen(config.stage) if name in ("generate", "benchmark", "profile")]
    if stages or runtime.device != "cpu":
        lacks = "has no kernels for" if dtype not in runtime.compute_dtype else "is on a GPU that lacks"
        others = ", ".join(name for name in runtime.compute_dtype if name != dtype)
        raise AccelError(
            f"precision.dtype={dtype}: {runtime.provider} {lacks} {dtype}, which {', '.join(stages) or 'verify'} "
            f"would run. Precisions that it runs: {others}. On the CPU, stage=verify proves it by emulation"
        )


def _positive(config: Config, section: str, keys: Iterable[str]) -> None:
    for key in keys:
        value = getattr(getattr(config, section), key)
        if not 1 <= value <= LONGEST:
            raise AccelError(f"{section}.{key}={value}: must be from 1 to {LONGEST}")


def check_lengths(config: Config, description: PretrainedConfig, stages: Collection[str]) -> None:
    """Raises `AccelError` where a stage would need more positions than the model knows."""
    known = longest(description)
    if known is None:
        return
    verify, benchmark, profile = config.verify, config.benchmark, config.profile
    for stage, source, new, key in (
        ("verify", verify.source_length, verify.max_new_tokens, "max_new_tokens"),
        ("benchmark", benchmark.source_length, benchmark.new_tokens, "new_tokens"),
        ("profile", profile.source_length, profile.new_tokens, "new_tokens"),
    ):
        needed = max(source, new + 1) if description.is_encoder_decoder else source + new
        if stage in stages and needed > known:
            raise AccelError(
                f"{stage}.source_length={source} and {stage}.{key}={new} need {needed} positions, and a model of type "
                f"{description.model_type!r} with these weights knows {known}"
            )


def check_texts(config: Config, stages: Collection[str]) -> None:
    """Raises `AccelError` on references that are not there, or text for a model that comes without a tokenizer.

    Both lie in the checkpoint's folder, and a stage that needs them may come an hour after the first.
    """
    given = {"audit.texts": config.audit.texts, "verify.texts": config.verify.texts}
    if "generate" in stages:
        given |= {f"generate.{key}": config.generate.get(key) for key in ("text", "file")}
    named = {key: value for key, value in given.items() if value is not None}
    if config.model.references is None and not named:
        return
    random = config.model.weights == "random"  # made here, without a tokenizer
    folder = None if random else checkpoints.locate(config.model, weights=False)
    for key, value in named.items():
        if folder is None or not has_tokenizer(folder):
            raise AccelError(f"{key}={value}: the checkpoint has no tokenizer to read text with")
    if folder is not None and config.model.references is not None:
        References.read(folder / config.model.references)


def check_generate(options: dict[str, Any]) -> None:
    """Raises `AccelError` on an option that neither accel nor transformers' `GenerationConfig` has, or a bad value."""
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
    for name in options:
        if name not in known | OWN_OPTIONS:
            raise unknown(
                "generation option", f"generate.{name}", sorted(f"generate.{key}" for key in known | OWN_OPTIONS)
            )
    for name in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences", "batch_size"):
        value = options.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LONGEST):
            raise AccelError(f"generate.{name}={value}: must be a whole number from 1 to {LONGEST}")
    sources = [f"generate.{name}" for name in ("text", "file", "audio") if options.get(name) is not None]
    if len(sources) > 1:
        raise AccelError(f"{' and '.join(sources)} exclude each other; give one")
    if not isinstance(options.get("chat", False), bool):
        raise AccelError(f"generate.chat={options['chat']}: must be true or false")
    if "output" in options and "file" not in options:
        raise AccelError("generate.output goes with generate.file")
    if options.get("file") is not None:
        read_lines(Path(str(options["file"])))
    sounds = options.get("audio")
    for path in sounds if isinstance(sounds, list) else [sounds] if sounds is not None else []:
        if not Path(str(path)).is_file():
            raise AccelError(f"generate.audio: can't read {path}: no such file")
    try:
        GenerationConfig(**generation_options(options)).validate()
    except (ValueError, TypeError) as error:
        raise AccelError(f"generate: {str(error).splitlines()[0]}") from error
