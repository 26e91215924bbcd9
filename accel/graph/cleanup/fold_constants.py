"""Compute what doesn't depend on an input, and drop what the exporter leaves behind."""

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult, common
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir

from accel.graph.passes import GraphPass, remove_unused, snapshot


class StripMetadata(GraphPass):
    """Drop the stack traces that torch's exporter writes on every node."""

    name = "strip_metadata"
    description = "Drop the exporter's stack traces"

    def call(self, model: ir.Model) -> PassResult:
        """Clear metadata and documentation strings."""
        before = snapshot(model)
        common.ClearMetadataAndDocStringPass()(model)
        return PassResult(model, snapshot(model) != before)


class FoldConstants(GraphPass):
    """Evaluate nodes whose inputs are constants, until none is left.

    Weights stay as they are: `fold_transposes` deals with transposes of large ones.
    """

    name = "fold_constants"
    description = "Evaluate nodes whose inputs are constants"

    def call(self, model: ir.Model) -> PassResult:
        """Fold, and lift every constant to an initializer."""
        before = snapshot(model)
        nodes = None
        while nodes != model.graph.num_nodes():
            nodes = model.graph.num_nodes()
            with np.errstate(all="ignore"):  # such as log(0), where a `Where` selects the other branch
                fold_constants_ir(model, should_fold=_keep_weights)
            common.IdentityEliminationPass()(model)
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, snapshot(model) != before)


class Simplify(GraphPass):
    """Apply onnxscript's rewrite rules, such as removing casts, expands and reshapes that change nothing."""

    name = "simplify"
    description = "Apply onnxscript's rewrite rules"

    def call(self, model: ir.Model) -> PassResult:
        """Run the rules, then remove identities and unused nodes."""
        before = snapshot(model)
        rewriter.rewrite(model, _rules())
        common.IdentityEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
        return PassResult(model, snapshot(model) != before)


class MergeDuplicates(GraphPass):
    """Compute equal values once, also where they come from two equal small constants."""

    name = "merge_duplicates"
    description = "Compute equal values once"

    def call(self, model: ir.Model) -> PassResult:
        """Merge equal initializers of up to 16 elements, then equal subexpressions. A weight keeps its own name."""
        merged_initializers = common.DeduplicateInitializersPass(size_limit=16)(model).modified
        merged_nodes = common.CommonSubexpressionEliminationPass()(model).modified
        return remove_unused(model, merged_initializers or merged_nodes)


class _ByOperator:
    """A rule of onnxscript's that is tried only at nodes of the operator that its pattern ends in.

    onnxscript tries each rule at every node, and for a pattern of two outputs lists the whole graph before it compares
    the operator. The results are the same; this takes a twelfth of the time.
    """

    def __init__(self, rule: Any) -> None:
        self._rule = rule
        self._operator = rule._target_pattern.output_nodes[0].op_identifier()  # None: any

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def try_rewrite(self, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any) -> Any:
        """Rewrite the subgraph that ends in `node`; return None where it doesn't match."""
        if self._operator not in (None, node.op_identifier()):
            return None
        return self._rule.try_rewrite(model, graph, node, **options)


@cache
def _rules() -> Any:
    """Return onnxscript's default rules; None, which stands for them, if this version keeps them elsewhere."""
    try:
        return [_ByOperator(rule) for rule in rewriter._DEFAULT_REWRITE_RULES]
    except AttributeError:
        return None


def _keep_weights(node: ir.Node) -> bool | None:
    """Return False for a transposed initializer, which would become a second copy; None leaves it to the rules."""
    first = node.inputs[0] if node.inputs else None
    return False if node.op_type == "Transpose" and first is not None and first.is_initializer() else None
