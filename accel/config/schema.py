"""Types of the configuration, and bounds of its numbers: one dataclass per section. The values are in `conf/`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from accel.config.bounds import choice, number, numbers, seed
from accel.config.engines import ENGINES, ONNXRUNTIME
from accel.config.export_triton import ExportTritonConfig
from accel.config.serve import ServeConfig

STAGES = ("export", "optimize", "audit", "convert", "merge", "verify", "generate", "benchmark", "profile", "plan")
# Values of `stage` beside them, which make no artifact: serve the deployable over HTTP, or write it for Triton.
SERVE, EXPORT_TRITON = "serve", "export_triton"


@dataclass
class ModelConfig:
    """Checkpoint to export.

    Attributes:
        name: Name of the preset, that of its YAML file; with `model=auto`, the last part of `checkpoint`.
        checkpoint: Folder, id on the Hugging Face hub, or `accel://NAME` for a checkpoint that ships with accel.
        revision: Branch, tag or commit on the hub.
        weights: `pretrained` or `random`: weights initialized from `seed`.
        seed: Seed of random weights.
        config: Values of a Hugging Face config that random weights take their dimensions from; empty: the checkpoint's.
        peft_adapter: Folder of a PEFT adapter, which is merged into the weights before export.
        references: File with inputs and accepted outputs, in the checkpoint's folder unless it is an absolute path.
        trust_remote_code: Run the Python code that the checkpoint brings along, with all rights of this process.
    """

    name: str = MISSING
    checkpoint: str | None = None
    revision: str | None = None
    weights: str = "pretrained"
    seed: int = seed()
    config: dict[str, Any] = field(default_factory=dict)
    peft_adapter: str | None = None
    references: str | None = None
    trust_remote_code: bool = False


@dataclass
class PrecisionConfig:
    """Number format of the graphs, and of the weights of their matrix products.

    Attributes:
        name: Name of the preset, that of its YAML file.
        dtype: `float32`, `float16` or `bfloat16`.
        plan: How the nodes that stay in FP32 are chosen: a key of `accel.stages.audit.RULES`.
        operators: Operators that stay in FP32 under `plan=operators`.
        weight_bits: Bits of the weights of matrix products, 8 or 4; None: as `dtype`.
        weight_formats: Candidates of their format: names of `accel.graph.quantization.formats.formats`.
        max_token_changes: Share of the tokens of greedy search in a trial at which another than FP32's may be the
            likeliest, by its upper confidence bound. Near ties of FP32, which change within `max_divergence`, don't
            count.
        max_divergence: Kullback-Leibler divergence of the next token's distribution from FP32's in a trial, in nats:
            the mean over texts, with twice its standard error added.
        max_output_error: Relative error of a component's other outputs in a trial.
        strictness: Factor by which trials divide these three limits. `verify` holds the shipped graphs against
            `max_divergence` itself.
        candidates: Names of other presets, the fastest of which is taken, if its verification passes; empty: this one.
    """

    name: str = MISSING
    dtype: str = "float32"
    plan: str = "minimized"
    operators: list[str] = field(default_factory=list)
    weight_bits: int | None = number(None, 1, 16)  # validation names the two choices
    weight_formats: list[str] = field(default_factory=list)
    max_token_changes: float = number(0.02, 0, 1)
    max_divergence: float = number(0.02, 0)
    max_output_error: float = number(0.1, 0)
    strictness: float = number(1.0, 1)
    candidates: list[str] = field(default_factory=list)

    @property
    def variant(self) -> str:
        """Name of the variant of a deployable: `int8` or `int4`, or else `dtype`."""
        return self.dtype if self.weight_bits is None else f"int{self.weight_bits}"

    @property
    def exact(self) -> bool:
        """True where nothing is lowered: all is FP32."""
        return self.variant == "float32"


@dataclass
class RuntimeConfig:
    """Device and provider that a deployable runs on, and how.

    Attributes:
        name: Name of the preset, that of its YAML file.
        provider: Execution provider of ONNX Runtime.
        provider_options: Options of the provider, by ONNX Runtime's names.
        session: Session configuration entries of ONNX Runtime.
        environment: Environment variables that ONNX Runtime reads while a session opens.
        device: Device of torch.
        threads: Threads of a session; 0: one per physical core.
        compute_dtype: Dtype of a graph -> dtype that the provider computes it in. The provider has no kernels for a
            dtype that is missing here.
        merge_strategy: Default of `MergeConfig.strategy` on this runtime.
        fuse_attention: Default of `ConvertConfig.fuse_attention` on this runtime.
        fuse_causal_attention: Default of `ConvertConfig.fuse_causal_attention` on this runtime.
        fuse_transposed_matmul: Default of `ConvertConfig.fuse_transposed_matmul` on this runtime.
        transpose_weights: Default of `ConvertConfig.transpose_weights` on this runtime.
        static: Decode over static caches: of fixed length, written in place.
        buckets: Lengths of static caches, in decoder tokens. A full cache is copied into the next longer one. Longer
            ones follow by themselves, up to the model's number of positions and as memory allows; caches that grow with
            every token take their place beyond that.
        engine: What computes decode steps over static caches: `onnxruntime`; `fused`, fused operations planned from the
            static decode graph; or `auto`, the one that the deployable was verified with, where the device can run it.
        tune: On a GPU, let the fused engine measure settings of its kernel before the first step of each number of
            sequences and length of caches, for up to 30 s each. They are kept in the user's cache.
        static_session: Session entries of the static decode graph, in place of those of `session`.
        static_environment: Environment variables for that session, in place of those of `environment`.
        capture: Capture the static decode graph as a CUDA graph and replay it.
        capture_batch_sizes: Numbers of sequences, beams counted, to capture when a model is opened; others are then
            rejected. Empty: capture each number when it first occurs.
        prefill_chunk: Tokens of a prompt that are computed at once, which bounds the memory of long prompts; 0: all.
        fused_prefill: Tokens of all prompts of a call from which on the fused engine computes them on a GPU, where it
            can; half as many where some are padding. With fewer, ONNX Runtime launches its kernels faster. 0: any.
    """

    name: str = MISSING
    provider: str = "CPUExecutionProvider"
    provider_options: dict[str, Any] = field(default_factory=dict)
    session: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = number(0, 0, 1024)
    compute_dtype: dict[str, str] = field(default_factory=lambda: {"float32": "float32"})
    merge_strategy: str = "shared"
    fuse_attention: list[str] = field(default_factory=list)
    fuse_causal_attention: bool = False
    fuse_transposed_matmul: bool = False
    transpose_weights: bool = False
    static: bool = False
    buckets: list[int] = numbers()
    engine: str = choice(ONNXRUNTIME, ENGINES)
    tune: bool = False
    static_session: dict[str, str] = field(default_factory=dict)
    static_environment: dict[str, str] = field(default_factory=dict)
    capture: bool = False
    capture_batch_sizes: list[int] = numbers(1, 4096)
    prefill_chunk: int = number(4096, 0)
    fused_prefill: int = number(4096, 0)


@dataclass
class ExportConfig:
    """How the model is exported to ONNX.

    Attributes:
        opset: Version of the ONNX operator set.
        tolerance: Largest allowed difference from PyTorch, relative to an output's largest value.
        seed: Seed of the inputs that are compared.
    """

    opset: int = number(20, 18, 23)  # supported by both the exporter and the graph passes
    tolerance: float = number(1e-4, 1e-9, 1)
    seed: int = seed()


@dataclass
class OptimizeConfig:
    """Graph passes over the exported graphs.

    Attributes:
        passes: Pass -> whether it runs.
    """

    passes: dict[str, bool] = field(default_factory=dict)


@dataclass
class AuditConfig:
    """Inputs of the calibration, and how the precision plan is made from its statistics.

    Attributes:
        random: Run on random ids.
        batches: Batches to begin with.
        max_batches: Batches at most: their number doubles while values still grow towards the format's limit.
        batch_size: Sequences per batch.
        max_length: Length of the source, in tokens; the decoder gets at most a quarter of it.
        seed: Seed of the random ids.
        texts: File or folder with texts, see `accel.data.corpus.read_texts`.
        column: Column of `texts` that holds the texts.
        overflow_margin: A value that comes within this factor of the format's largest number counts as overflow.
        trials: Sensitivity trials per graph, of plans with less in FP32; 0: keep what the rules choose.
    """

    random: bool = True
    batches: int = number(8)
    max_batches: int = number(64)
    batch_size: int = number(2)
    max_length: int = number(128)
    seed: int = seed()
    texts: str | None = None
    column: str | None = None
    overflow_margin: float = number(2.0)
    trials: int = number(32, 0)


@dataclass
class ConvertConfig:
    """How graphs are converted for a precision and a runtime.

    Attributes:
        fuse_attention: Components whose attention becomes `com.microsoft.MultiHeadAttention`, where all of it has one
            precision.
        fuse_causal_attention: In FP32, self-attention over dynamic caches becomes `com.microsoft.GroupQueryAttention`.
        fuse_rotary: Rotary position embeddings become `com.microsoft.RotaryEmbedding`.
        fuse_transposed_matmul: Multiply with a tied embedding by `FusedMatMul(transB=1)`, without a transposed
            copy of it.
        transpose_weights: Store the weights of products as [out, in], as the fused engine's kernel reads them, and
            multiply with them by `FusedMatMul(transB=1)`.
        static_decode: Make a static_decode graph too: one new token, over caches of fixed length.
        decode_passes: Graph passes over decode graphs of exactly one new token, which are static_decode and the branch
            that `merge.strategy=three_branch` adds. Pass -> whether it runs.
    """

    fuse_attention: list[str] = "${runtime.fuse_attention}"  # type: ignore[assignment]
    fuse_causal_attention: bool = "${runtime.fuse_causal_attention}"  # type: ignore[assignment]
    fuse_rotary: bool = True
    fuse_transposed_matmul: bool = "${runtime.fuse_transposed_matmul}"  # type: ignore[assignment]
    transpose_weights: bool = "${runtime.transpose_weights}"  # type: ignore[assignment]
    static_decode: bool = "${runtime.static}"  # type: ignore[assignment]
    decode_passes: dict[str, bool] = field(default_factory=dict)


@dataclass
class MergeConfig:
    """How prefill and decode are merged into one file.

    Attributes:
        layout: Names and places of the files: `hub`, as Optimum, Transformers.js and the Hugging Face hub know them.
        flag: Name of the boolean input that chooses the branch; other clients know `use_cache_branch` only.
        strategy: Contents of the ONNX `If`. `shared`: only what differs between prefill and decode. `two_branch`: each
            graph as a whole in a branch. `three_branch`: the same, and a decode graph of one new token in a
            third branch.
    """

    layout: str = "hub"
    flag: str = "use_cache_branch"
    strategy: str = "${runtime.merge_strategy}"


@dataclass
class VerifyConfig:
    """Comparison with PyTorch, and the limits that a bundle must keep to pass.

    Attributes:
        texts: File or folder with inputs, see `accel.data.corpus.read_texts`; replaces `model.references`.
        column: Column of `texts` that holds the inputs.
        targets: Expected outputs, one for each of `texts`.
        targets_column: Column of `targets` that holds the outputs.
        metrics: Metrics computed where expected outputs are known.
        min_token_agreement: Share of sequences that must be identical to PyTorch's, or with weights in low bits differ
            first at a near tie of PyTorch's; None: see `accel.stages.verify.min_token_agreement`.
        max_metric_loss: Percentage points by which a metric may be worse than PyTorch's in FP32.
        latency: Measure latency and memory beside PyTorch's, for the certificate.
        session_memory: With `latency`, also measure the memory that the decoder's sessions hold, for a sweep's table.
        batch_size: Sequences per padded batch.
        inputs: Inputs to generate from.
        source_length: Length of random inputs, in tokens.
        max_new_tokens: New tokens per sequence, at most.
        num_beams: Beams of the beam search that is compared.
        references: Inputs that metrics are computed on, at most.
        unique_tokens: Generate no token twice, so that random weights don't repeat one; None: if weights are random.
        seed: Seed of random inputs and of sampling.
    """

    texts: str | None = None
    column: str | None = None
    targets: str | None = None
    targets_column: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["exact_match", "word_error_rate"])
    min_token_agreement: float | None = number(None, 0, 1)
    max_metric_loss: float = number(1.0, 0, 100)
    latency: bool = True
    session_memory: bool = False
    batch_size: int = number(8)
    inputs: int = number(8)
    source_length: int = number(24)
    max_new_tokens: int = number(24)
    num_beams: int = number(4)
    references: int = number(200, 0)
    unique_tokens: bool | None = None
    seed: int = seed()


@dataclass
class BenchmarkConfig:
    """One point at which the backends are measured.

    Attributes:
        source_length: Length of the inputs, in tokens.
        new_tokens: New tokens per sequence.
        num_beams: Beams; 1: greedy search.
        batch_size: Sequences per batch.
        repeats: Timed generations per backend, of all new tokens and of one.
        time_budget_s: Seconds per backend after which no further repeat begins (one always runs), for generations of
            all new tokens and of one; None: no limit.
        warmup: Generations before the timed ones. The second one captures whole tokens: see `TokenGraph`.
        warmup_tokens: New tokens of a warm-up generation; None: as many as `new_tokens`.
        backends: Backends to measure; empty: all that fit the runtime.
        memory: Measure each backend's memory, in a process of its own.
        unverified: Measure the bundle that `merge` made, without `verify`.
        seed: Seed of the random inputs.
    """

    source_length: int = number(32)
    new_tokens: int = number(64)
    num_beams: int = number(1)
    batch_size: int = number(1)
    repeats: int = number(5)
    time_budget_s: float | None = number(60.0, 0)
    warmup: int = number(2, 0)
    warmup_tokens: int | None = number(16)
    backends: list[str] = field(default_factory=list)
    memory: bool = True
    unverified: bool = False
    seed: int = seed()


@dataclass
class ProfileConfig:
    """One greedy generation that is profiled.

    Attributes:
        source_length: Length of the input, in tokens.
        new_tokens: New tokens.
        top: Operators shown, longest first.
        seed: Seed of the random input.
    """

    source_length: int = number(32)
    new_tokens: int = number(32)
    top: int = number(10)
    seed: int = seed()


@dataclass
class PlanConfig:
    """Lengths that a plan of the decode step is laid out for.

    Attributes:
        batch_size: Rows of the batch.
        cache_length: Length of the self-attention caches, in tokens.
        source_length: Length of the encoder's output, in tokens.
    """

    batch_size: int = number(1)
    cache_length: int = number(256)
    source_length: int = number(32)


@dataclass
class Config:
    """Whole configuration, as `--cfg job` prints it.

    Attributes:
        stage: `all`, a stage, or a list of stages; `serve` or `export_triton` runs after the others.
        artifacts: Folder that artifacts are kept in.
        output: Folder that the deployable is copied to, beside variants of the same model in other dtypes.
        architecture: Adapter of the model family: `_target_` and its options.
        generate: Options of `generate`: see `accel.config.generate_options`.
    """

    stage: Any = "all"
    artifacts: str = "artifacts"
    output: str | None = None
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
    plan: PlanConfig = field(default_factory=PlanConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    export_triton: ExportTritonConfig = field(default_factory=ExportTritonConfig)
