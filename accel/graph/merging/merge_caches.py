"""Two decoders in one graph that differ only where they must: in the caches that prefill alone makes.

A step with past length 0 computes what prefill computes, but for the caches of the encoder's output, which prefill
makes and step is given. So the merged graph is the step graph, and an `If` on the flag around each use of such a cache:
with past it reads the input, without past it runs prefill's own nodes for that cache. Every product with a weight then
stands once in the graph, which matters where a runtime repacks weights per node (ONNX Runtime's CPU provider packs the
weights of both branches when whole decoders are merged). That the two agree is checked by `verify`, not assumed.
"""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.control import has_subgraph
from accel.graph.merging.merge_branches import absent, join_inputs, join_opsets, share_weights


def merge_caches(decode: ir.Model, prefill: ir.Model, flag: str, cache: Mapping[str, str]) -> ir.Model:
    """One model that runs `step` if the input `flag` holds, and what `prefill` would give for past length 0 if not.

    `cache` maps each cache input of step to the output that feeds it. Inputs are the union by name, outputs those of
    prefill. Both models are taken apart. Raises `ValueError` if an output of prefill that step lacks feeds no input of
    step, or if inputs or opsets contradict each other.
    """
    order = [output.name or "" for output in prefill.graph.outputs]
    inputs = join_inputs(prefill.graph.inputs, decode.graph.inputs, flag)
    initial = share_weights((decode, prefill))
    opsets = join_opsets(decode, prefill)
    graph = decode.graph
    for model in (decode, prefill):
        for value in model.graph.inputs:
            convenience.replace_all_uses_with(value, inputs[value.name or ""], replace_graph_outputs=True)
        model.graph.inputs.clear()
    graph.inputs.extend(inputs.values())
    for value in initial:
        graph.register_initializer(value)
    results = {output.name or "": output for output in graph.outputs}
    fed = {source: name for name, source in cache.items()}
    for made in list(prefill.graph.outputs):
        if (made.name or "") not in results:
            if made.name not in fed:
                raise ValueError(f"output {made.name!r} of prefill is missing from step and feeds none of its inputs")
            results[made.name or ""] = _choose(graph, inputs[flag], inputs[fed[made.name]], made)
    graph.outputs.clear()
    graph.outputs.extend(results[name] for name in order)
    graph.opset_imports.update(opsets)
    return ir.Model(graph, ir_version=max(decode.ir_version, prefill.ir_version), producer_name="accel")


def _choose(graph: ir.Graph, flag: ir.Value, given: ir.Value, made: ir.Value) -> ir.Value:
    """Put an `If` around each use of the cache input `given`; `made` is prefill's value for it. Returns the output."""
    if any(user.graph is not graph for user in given.consumers()):
        raise ValueError(f"input {given.name!r} of the decode graph is read inside a subgraph")
    present: ir.Value | None = None
    uses = sorted((_chain(user, given) for user in set(given.consumers())), key=lambda chain: graph.index(chain[-1]))
    for number, chain in enumerate(uses):
        with_past = _copy(chain, {given: given})
        if present is None:  # the first use makes the cache, the others read it
            making = _slice(made)
            made_here = making[-1].outputs[made.index() or 0]
            without_past = [*making, *_copy(chain, {given: made_here})]
            empty = absent(made)
            with_past.append(empty)
            then_outputs = [with_past[-2].outputs[0], empty.outputs[0]]
            else_outputs = [without_past[-1].outputs[0], made_here]
        else:
            without_past = _copy(chain, {given: present})
            then_outputs, else_outputs = [with_past[-1].outputs[0]], [without_past[-1].outputs[0]]
        old = chain[-1].outputs[0]
        outputs = [ir.Value(name=old.name, type=old.type, shape=old.shape)]
        if present is None:
            present = ir.Value(name=made.name, type=made.type, shape=made.shape)
            outputs.append(present)
        branches = {
            "then_branch": ir.Graph([], then_outputs, nodes=with_past, name=f"{given.name}.given.{number}"),
            "else_branch": ir.Graph([], else_outputs, nodes=without_past, name=f"{given.name}.made.{number}"),
        }
        for branch in branches.values():
            _rename(branch)
        selector = ir.node("If", [flag], attributes=branches, outputs=outputs, name=f"{given.name}.choose.{number}")
        graph.insert_before(chain[-1], selector)
        convenience.replace_all_uses_with(old, outputs[0], replace_graph_outputs=True)
        for node in reversed(chain):
            graph.remove(node, safe=True)
    if present is None:
        raise ValueError(f"input {given.name!r} of the decode graph is never used")
    return present


def _chain(node: ir.Node, value: ir.Value) -> list[ir.Node]:
    """From `node` on, the nodes that only reshape `value`, up to and including the first that joins it with another."""
    chain = [node]
    while not any(other is not value and _varies(other) for other in chain[-1].inputs if other is not None):
        value = chain[-1].outputs[0]
        users = set(value.consumers())
        if len(users) != 1 or value.is_graph_output() or any(has_subgraph(user) for user in users):
            break
        chain.append(users.pop())
    return chain


def _varies(value: ir.Value) -> bool:
    return value.const_value is None and not value.is_initializer()


def _slice(value: ir.Value) -> list[ir.Node]:
    """Copies of all nodes that `value` is computed from, in order, itself last."""
    wanted: set[ir.Node] = set()
    frontier = [value]
    while frontier:
        producer = frontier.pop().producer()
        if producer is not None and producer not in wanted:
            wanted.add(producer)
            frontier += [other for other in producer.inputs if other is not None]
    if value.graph is None or not wanted:
        raise ValueError(f"output {value.name!r} of prefill is not computed")
    if any(has_subgraph(node) for node in wanted):
        raise ValueError(f"output {value.name!r} of prefill is computed with a subgraph")
    return _copy([node for node in value.graph if node in wanted], {})


def _copy(nodes: list[ir.Node], values: Mapping[ir.Value | None, ir.Value | None]) -> list[ir.Node]:
    """Copies of `nodes`, which read each other's outputs and `values` in place of the originals."""
    known: dict[ir.Value | None, ir.Value | None] = dict(values)
    copies = []
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [known.get(value, value) for value in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            name=node.name,
            outputs=[ir.Value(name=value.name, type=value.type, shape=value.shape) for value in node.outputs],
        )
        known.update(zip(node.outputs, copy.outputs, strict=True))
        copies.append(copy)
    return copies


def _rename(graph: ir.Graph) -> None:
    """Names inside a branch must not shadow the outer graph's, nor clash where nodes of both models meet."""
    for number, node in enumerate(graph.all_nodes()):
        node.name = f"{graph.name}/{number}.{node.op_type}"
        for value in node.outputs:
            if value.name:  # an absent output has none
                value.name = f"{graph.name}/{number}.{value.name}"
