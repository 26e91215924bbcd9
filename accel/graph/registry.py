"""All graph passes that a configuration can switch off, by name, in the order in which they run."""

from accel.graph.cleanup.direct_lengths import DirectLengths
from accel.graph.cleanup.eliminate_expand import EliminateExpand
from accel.graph.cleanup.eliminate_identity_gather_nd import EliminateIdentityGatherNd
from accel.graph.cleanup.eliminate_noop_add import EliminateNoopAdd
from accel.graph.cleanup.fold_constants import FoldConstants, MergeDuplicates, Simplify, StripMetadata
from accel.graph.cleanup.fold_transposes import FoldTransposes
from accel.graph.cleanup.infer_shapes import InferShapes
from accel.graph.cleanup.precompute_position_bias import PrecomputePositionBias
from accel.graph.cleanup.select_tokens_early import SelectTokensEarly
from accel.graph.cleanup.shift_ranges import ShiftRanges
from accel.graph.cleanup.static_reshapes import StaticReshapes
from accel.graph.cleanup.unstack_expert_weights import UnstackExpertWeights
from accel.graph.decode.one_token import TransposeToReshape
from accel.graph.decode.split_to_slice import SplitToSlice
from accel.graph.decode.window_cache import WindowCache
from accel.graph.fusion.fuse_attention import FuseAttention
from accel.graph.fusion.fuse_gqa import FuseGqa
from accel.graph.fusion.fuse_norms import FuseNorms
from accel.graph.fusion.fuse_skip_norm import FuseSkipNorm
from accel.graph.fusion.hoist_additions import HoistAdditions
from accel.graph.fusion.pack_qkv import PackQkv
from accel.graph.passes import by_name

OPTIMIZE = by_name(  # `optimize.passes`: over every exported graph
    [
        StripMetadata,
        FoldConstants,
        Simplify,
        InferShapes,
        StaticReshapes,
        EliminateIdentityGatherNd,
        EliminateExpand,
        EliminateNoopAdd,
        ShiftRanges,
        DirectLengths,
        MergeDuplicates,
        PrecomputePositionBias,
        UnstackExpertWeights,
        FoldTransposes,
        FuseNorms,
        FuseSkipNorm,
        PackQkv,
        HoistAdditions,
        SelectTokensEarly,
    ]
)
DECODE = by_name(  # `convert.decode_passes`: over decode graphs for exactly one new token
    [WindowCache, FuseGqa, FuseAttention, TransposeToReshape, SplitToSlice]
)
