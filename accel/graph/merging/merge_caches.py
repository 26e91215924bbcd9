"""Merge strategy shared: prefill and decode in one graph, with an `If` only around the cross-attention caches.

With past length 0 the decode graph computes what prefill computes, except the cross-attention caches: prefill computes
these from the encoder's output, and the decode graph has them as inputs. So the merged graph is the decode graph, with
an `If` around each use of such a cache: with past it reads the input, without past it runs prefill's nodes for that
cache. Each product with a weight then occurs once in the graph. That matters where a runtime repacks weights per node:
ONNX Runtime's CPU provider packs the weights of both branches when whole decoders are merged. Stage `verify` checks
that the two graphs agree; it is not checked here.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.control import has_subgraph
from accel.graph.merging.merge_branches import empty_constant, join_inputs, join_opsets, share_weights


def merge_caches(decode: ir.Model, prefill: ir.Model, flag: str, cache: Mapping[str, str]) -> ir.Model:
    """Merge two models into one that decodes with past, or computes what prefill computes, depending on a flag.

    Inputs of the merged model are those of both, by name; outputs are those of prefill. With past, the outputs that
    the decode graph lacks have length 0 on their dynamic axes.

    Args:
        decode: Model to run if the flag is true. Unusable afterwards: its nodes become part of the result.
        prefill: Model whose results to compute if the flag is false, given cache inputs of length 0. Unusable
            afterwards.
        flag: Name of the boolean input.
        cache: Cache input of the decode graph -> output whose content becomes that input at the next decode step.

    Raises:
        ValueError: An output of prefill is neither an output of the decode graph nor a cache that it reads, a cache is
            read or computed inside a subgraph, or inputs or opsets contradict each other.
    """
    output_names = [output.name or "" for output in prefill.graph.outputs]
    inputs = join_inputs(prefill.graph.inputs, decode.graph.inputs, flag)
    shared_weights = share_weights((decode, prefill))
    opsets = join_opsets(decode, prefill)
    graph = decode.graph
    for model in (decode, prefill):
        for value in model.graph.inputs:
            convenience.replace_all_uses_with(value, inputs[value.name or ""], replace_graph_outputs=True)
        model.graph.inputs.clear()
    graph.inputs.extend(inputs.values())
    for value in shared_weights:
        graph.register_initializer(value)
    outputs = {output.name or "": output for output in graph.outputs}
    input_names = {output: name for name, output in cache.items()}
    for computed in list(prefill.graph.outputs):
        name = computed.name or ""
        if name in outputs:
            continue
        if name not in input_names:
            raise ValueError(
                f"prefill's output {name!r} is no output of the decode graph, and no cache input of it takes it"
            )
        outputs[name] = _insert_ifs(graph, inputs[flag], inputs[input_names[name]], computed)
    graph.outputs.clear()
    graph.outputs.extend(outputs[name] for name in output_names)
    graph.opset_imports.update(opsets)
    return ir.Model(graph, ir_version=max(decode.ir_version, prefill.ir_version), producer_name="accel")


def _insert_ifs(graph: ir.Graph, flag: ir.Value, past: ir.Value, computed: ir.Value) -> ir.Value:
    """Replace each use of a cache input by an `If` that reads the input or computes the cache.

    Args:
        graph: Decode graph, changed in place.
        flag: Condition of the `If` nodes.
        past: Cache input.
        computed: The cache in the prefill graph, whose nodes are copied.

    Returns:
        The cache as an output of the graph: empty with past, computed without.
    """
    if any(user.graph is not graph for user in past.consumers()):
        raise ValueError(f"input {past.name!r} of the decode graph is read inside a subgraph")
    chains = [_chain(user, past) for user in set(past.consumers())]
    if not chains:
        raise ValueError(f"input {past.name!r} of the decode graph is never used")
    chains.sort(key=lambda chain: graph.index(chain[-1]))
    compute, present = _copy_producers(computed)
    empty = empty_constant(computed)
    cache_output = ir.Value(name=computed.name, type=computed.type, shape=computed.shape)
    for number, chain in enumerate(chains):
        is_first = number == 0  # the first `If` also returns the cache that it computes, for the others to read
        then_nodes = _copy_nodes(chain, {})
        else_nodes = _copy_nodes(chain, {past: present if is_first else cache_output})
        then_outputs, else_outputs = [then_nodes[-1].outputs[0]], [else_nodes[-1].outputs[0]]
        result = chain[-1].outputs[0]
        if_outputs = [ir.Value(name=result.name, type=result.type, shape=result.shape)]
        if is_first:
            then_nodes, else_nodes = [*then_nodes, empty], [*compute, *else_nodes]
            then_outputs.append(empty.outputs[0])
            else_outputs.append(present)
            if_outputs.append(cache_output)
        branches = {
            "then_branch": _make_branch(f"{past.name}.with_past.{number}", then_nodes, then_outputs),
            "else_branch": _make_branch(f"{past.name}.without_past.{number}", else_nodes, else_outputs),
        }
        if_node = ir.node("If", [flag], attributes=branches, outputs=if_outputs, name=f"{past.name}.if.{number}")
        convenience.replace_nodes_and_values(graph, chain[-1], chain, [if_node], [result], [if_outputs[0]])
    return cache_output


def _chain(node: ir.Node, value: ir.Value) -> list[ir.Node]:
    """Return `node`, which reads `value`, and the nodes behind it up to the first that has another variable input.

    Those before the last only transform `value`, as a transpose does. The whole chain moves into the branches of an
    `If`.
    """
    chain = [node]
    while not any(other is not value and _is_variable(other) for other in chain[-1].inputs if other is not None):
        value = chain[-1].outputs[0]
        users = set(value.consumers())
        if len(users) != 1 or value.is_graph_output() or any(has_subgraph(user) for user in users):
            break
        chain.append(users.pop())
    return chain


def _is_variable(value: ir.Value) -> bool:
    """Return whether `value` is neither a constant nor an initializer."""
    return value.const_value is None and not value.is_initializer()


def _copy_producers(value: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """Copy all nodes that a value is computed from.

    Returns:
        Copies in topological order, and the copy of the value.

    Raises:
        ValueError: No node computes the value, or one of the nodes has a subgraph.
    """
    producers: set[ir.Node] = set()
    frontier = [value]
    while frontier:
        producer = frontier.pop().producer()
        if producer is not None and producer not in producers:
            producers.add(producer)
            frontier += [operand for operand in producer.inputs if operand is not None]
    if value.graph is None or not producers:
        raise ValueError(f"output {value.name!r} of prefill is not computed")
    if any(has_subgraph(node) for node in producers):
        raise ValueError(f"output {value.name!r} of prefill is computed with a subgraph")
    copies = _copy_nodes([node for node in value.graph if node in producers], {})
    return copies, copies[-1].outputs[value.index() or 0]


def _copy_nodes(nodes: Sequence[ir.Node], replacements: Mapping[ir.Value, ir.Value]) -> list[ir.Node]:
    """Copy nodes; the copies read each other's outputs, and the replacements of other values."""
    copied = dict(replacements)
    copies = []
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else copied.get(value, value) for value in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            name=node.name,
            outputs=[ir.Value(name=value.name, type=value.type, shape=value.shape) for value in node.outputs],
        )
        copied.update(zip(node.outputs, copy.outputs, strict=True))
        copies.append(copy)
    return copies


def _make_branch(name: str, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> ir.Graph:
    """Return a branch of an `If`, its names changed to ones that exist nowhere else in the model.

    Names must not hide those of the outer graph, nor clash with each other: the nodes come from two models.
    """
    branch = ir.Graph([], outputs, nodes=nodes, name=name)
    for number, node in enumerate(branch.all_nodes()):
        node.name = f"{name}/{number}.{node.op_type}"
        for value in node.outputs:
            if value.name:  # an omitted optional output has none
                value.name = f"{name}/{number}.{value.name}"
    return branch
