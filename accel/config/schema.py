"""The types of the configuration: one dataclass per stage. The values live in `conf/`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

STAGES = ("export", "optimize", "audit", "convert", "merge", "verify", "generate", "benchmark", "profile")


@dataclass
class ModelConfig:
    """Where the weights come from."""

    name: str = MISSING
    checkpoint: str | None = None
    revision: str | None = None
    weights: str = "pretrained"
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    references: str | None = None


@dataclass
class PrecisionConfig:
    """`plan` says how the nodes that stay in FP32 are chosen: see `accel.stages.audit.RULES`.

    `operators`: those that stay under `plan=operators`.
    """

    name: str = MISSING
    dtype: str = "float32"
    plan: str = "minimized"
    operators: list[str] = field(default_factory=list)


@dataclass
class RuntimeConfig:
    """Where a deployable runs.

    Attributes:
        name: The preset's name, that of its YAML file.
        provider: ONNX Runtime's execution provider.
        provider_options: Its options, by ONNX Runtime's names.
        session: ONNX Runtime's session configuration entries.
        environment: Environment variables that ONNX Runtime reads while a session opens.
        device: torch's device.
        threads: Threads of a session; 0 for one a physical core.
        compute_dtype: A graph's precision -> the one that the provider computes it in; a missing one has no kernels.
        merge_strategy: What suits it best: see `MergeConfig.strategy`.
        fuse_attention: What suits it best: see `ConvertConfig`.
        fuse_transposed_matmul: What suits it best: see `ConvertConfig`.
        static: Decode over a cache of fixed length, written in place.
        buckets: Lengths that a static cache may have, in decoder tokens; a full one is replaced by the next longer.
        static_session: Entries in place of those of `session`, for the session of the static decode graph.
        static_environment: Variables in place of those of `environment`, for the same.
        capture: Capture the static decode graph as a CUDA graph and replay it.
        capture_batch_sizes: Numbers of sequences, beams counted, to capture when a model is opened, and no others
            later; empty for any, when it comes.
    """

    name: str = MISSING
    provider: str = "CPUExecutionProvider"
    provider_options: dict[str, Any] = field(default_factory=dict)
    session: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 0
    compute_dtype: dict[str, str] = field(default_factory=lambda: {"float32": "float32"})
    merge_strategy: str = "shared"
    fuse_attention: list[str] = field(default_factory=list)
    fuse_transposed_matmul: bool = False
    static: bool = False
    buckets: list[int] = field(default_factory=list)
    static_session: dict[str, str] = field(default_factory=dict)
    static_environment: dict[str, str] = field(default_factory=dict)
    capture: bool = False
    capture_batch_sizes: list[int] = field(default_factory=list)


@dataclass
class ExportConfig:
    opset: int = 20
    tolerance: float = 1e-4
    seed: int = 0


@dataclass
class OptimizeConfig:
    passes: dict[str, bool] = field(default_factory=dict)


@dataclass
class AuditConfig:
    random: bool = True
    batches: int = 8
    max_batches: int = 64
    batch_size: int = 2
    max_length: int = 128
    seed: int = 0
    texts: str | None = None
    column: str | None = None
    overflow_margin: float = 2.0
    trials: int = 32


@dataclass
class ConvertConfig:
    """How graphs are converted for a runtime.

    Attributes:
        fuse_attention: Components whose attention, where all of it has one precision, becomes
            `com.microsoft.MultiHeadAttention`.
        fuse_transposed_matmul: Multiply with a tied embedding by `FusedMatMul(transB=1)`; store no transposed copy.
        static_decode: Make a decode graph over caches of fixed length as well.
        decode_passes: Graph passes over decode graphs for exactly one new token: the static one, and the branch of its
            own that `merge.strategy=three_branch` makes. Name -> whether it runs.
    """

    fuse_attention: list[str] = "${runtime.fuse_attention}"  # type: ignore[assignment]
    fuse_transposed_matmul: bool = "${runtime.fuse_transposed_matmul}"  # type: ignore[assignment]
    static_decode: bool = "${runtime.static}"  # type: ignore[assignment]
    decode_passes: dict[str, bool] = field(default_factory=dict)


@dataclass
class MergeConfig:
    """How both decoders become one file.

    Attributes:
        flag: Name of the boolean input that chooses the branch.
        strategy: What the `If` holds. `shared`: only what prefill alone computes. `two_branch`: each graph as a whole.
            `three_branch`: the same, and a decode graph for one token in a branch of its own.
    """

    flag: str = "enable_cache"
    strategy: str = "${runtime.merge_strategy}"


@dataclass
class VerifyConfig:
    """`texts` and `targets` stand in for `model.references`; the least and the most that are allowed: see `verify`."""

    texts: str | None = None
    column: str | None = None
    targets: str | None = None
    targets_column: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["exact_match", "word_error_rate"])
    min_token_agreement: float | None = None
    max_metric_loss: float = 1.0
    latency: bool = True
    batch_size: int = 4
    inputs: int = 8
    source_length: int = 24
    max_new_tokens: int = 24
    num_beams: int = 4
    references: int = 200
    unique_tokens: bool | None = None
    seed: int = 0


@dataclass
class BenchmarkConfig:
    source_length: int = 32
    new_tokens: int = 64
    num_beams: int = 1
    batch_size: int = 1
    repeats: int = 5
    time_budget_s: float | None = 60.0
    warmup: int = 1
    warmup_tokens: int | None = 16
    backends: list[str] = field(default_factory=list)
    memory: bool = True
    unverified: bool = False
    seed: int = 0


@dataclass
class ProfileConfig:
    source_length: int = 32
    new_tokens: int = 32
    top: int = 10
    seed: int = 0


@dataclass
class Config:
    """The whole configuration, as `--cfg job` prints it."""

    stage: Any = "all"
    artifacts: str = "artifacts"
    model: ModelConfig = field(default_factory=ModelConfig)
    architecture: dict[str, Any] = field(default_factory=dict)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    generate: dict[str, Any] = field(default_factory=dict)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
