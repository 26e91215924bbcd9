"""Compute what does not depend on an input, and drop what the exporter leaves behind."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir


def fold_constants(models: Sequence[ir.Model]) -> None:
    """In place, until nothing changes. Weights are left alone: the transposes of large ones are `fold_transposes`'s."""
    for model in models:
        before = None
        while before != (before := model.graph.num_nodes()):
            with np.errstate(all="ignore"):  # such as the logarithm of 0, which another branch stands in for
                fold_constants_ir(model, should_fold=_keep_weights)
            common.IdentityEliminationPass()(model)
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            common.RemoveUnusedNodesPass()(model)


def simplify(models: Sequence[ir.Model]) -> None:
    """In place: onnxscript's own rules, such as casts, expands and reshapes that change nothing."""
    for model in models:
        rewriter.rewrite(model)
        common.IdentityEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)


def merge_duplicates(models: Sequence[ir.Model]) -> None:
    """In place: a value computed twice is computed once, also where it comes from two equal small constants."""
    for model in models:
        common.DeduplicateInitializersPass(size_limit=16)(model)  # elements; a weight keeps its own name
        common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)


def strip_metadata(models: Sequence[ir.Model]) -> None:
    """In place: drop the stack traces the exporter writes on every node."""
    for model in models:
        common.ClearMetadataAndDocStringPass()(model)


def _keep_weights(node: ir.Node) -> bool | None:
    """False for a transposed initializer, which would become a second copy; None leaves it to the rules."""
    first = node.inputs[0] if node.inputs else None
    return False if node.op_type == "Transpose" and first is not None and first.is_initializer() else None
