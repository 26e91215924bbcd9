"""A plan as the kernel's list of operations, over tensors whose addresses stay the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from accel.engine.executor import Executor
from accel.engine.kernel import records, shapes
from accel.engine.kernel.limits import check_rows, weights_dtype
from accel.engine.kernel.placement import NotRunnableError, Placement
from accel.engine.kernel.tabulate import tabulate
from accel.engine.kernel.tuning import DEFAULT, Tuning
from accel.engine.nodes import Graph, Node, classify
from accel.engine.operations import attention, normalize, product
from accel.engine.planning.plan import DOMAIN, Plan


@dataclass
class Program:
    """The list of operations, and what the compiled kernel must have room for.

    Attributes:
        rows: Rows of the batch.
        dtype: Dtype of weights and exchanged values.
        blocks: Blocks that the kernel runs as.
        tuning: Its settings.
        position: Address of the positions, int64 [rows], that new keys and values are written at; 0 if none are.
        operations: The list.
        shapes: Shapes of its operations; a record has the index of its own.
        scale_bytes: Bytes of scales in a slot of the ring, the most of all weights of 8 or 4 bits; 0 if there are none.
        max_k: Most features of a row that a product reads.
        max_norm: Most features of a row that is normalised.
        max_bias: Most numbers of biases that one block keeps.
        wide: A row in FP32 is normalised.
        heads: (features of a head, query heads for each head of the cache) of every attention.
        keep: Tensors whose addresses are in the list.
    """

    rows: int
    dtype: torch.dtype
    blocks: int
    tuning: Tuning = DEFAULT
    position: int = 0
    operations: list[records.Record] = field(default_factory=list)
    shapes: list[records.Shape] = field(default_factory=list)
    scale_bytes: int = 0
    max_k: int = 128
    max_norm: int = 128
    max_bias: int = 1024
    wide: bool = False
    heads: set[tuple[int, int]] = field(default_factory=set)
    keep: list[Tensor] = field(default_factory=list)


def split(plan: Plan) -> tuple[Graph, list[Node]]:
    """Return the graph of the nodes that run before the kernel, and the fused operations.

    Raises:
        NotRunnableError: A node runs after a fused operation, or between two, or computes an output.
    """
    fused = [node for node in plan.graph.nodes if node.kind[0] == DOMAIN]
    made = {name for node in fused for name in node.outputs}
    before = [node for node in plan.graph.nodes if node.kind[0] != DOMAIN]
    for node in before:
        late = made.intersection(node.inputs)
        if late:
            raise NotRunnableError(f"node {node.name} reads {', '.join(sorted(late))}, which the kernel computes")
    missing = sorted(set(plan.graph.outputs) - made)
    if missing:
        raise NotRunnableError(f"the outputs {', '.join(missing)} are not computed by fused operations")
    computed = {name for node in before for name in node.outputs}
    read = {name for node in fused for name in node.inputs}
    outputs = sorted(computed & read)
    return classify(replace(plan.graph, nodes=before, outputs=outputs)), fused


class Builder:
    """Builds the program of one set of decode buffers.

    Args:
        plan: The plan.
        tensors: Inputs and outputs of the graph at constant addresses.
        rows: Rows of the batch.
        device: The device.
        weights: Weights in the kernel's layout and tables of `tabulate` made so far, by name; shared by all sets of
            buffers.
        blocks: Blocks that the kernel runs as, one a multiprocessor.
        tuning: Settings of the kernel.
        positions: Number of positions that a row may have; 0: unknown.

    Attributes:
        program: The program.
        run_before: Call that computes what operations read of the nodes before the kernel.

    Raises:
        NotRunnableError: The kernel can't run the plan.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        rows: int,
        device: torch.device,
        weights: dict[str, Tensor],
        blocks: int,
        tuning: Tuning = DEFAULT,
        positions: int = 0,
    ) -> None:
        check_rows(rows)
        before, self._fused = split(plan)
        self._plan, self._device = plan, device
        dtype = weights_dtype(plan, self._fused)
        self.program = Program(rows, dtype, blocks, tuning)
        self.run_before: Callable[[], object]
        known = {**tensors, **self._compute_before(before, tensors, positions, weights)}
        dtypes = {name: value.dtype for name, value in plan.trace.values.items()}
        read = {name for node in self._fused for name in node.inputs}
        self._place = Placement(known, plan.graph.constants, dtypes, read, dtype, rows, device, weights)
        self._bias_sets: dict[Any, int] = {}
        for node in self._fused:
            self._add(node)
        self.program.keep = self._place.keep

    def _compute_before(
        self, before: Graph, tensors: Mapping[str, Tensor], positions: int, tables: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run the nodes before the kernel once, and return what operations read of it, at constant addresses."""
        tabulated = tabulate(before, tensors, self._device, positions, tables)
        looked_up = {name: lookup.value for name, lookup in tabulated.lookups.items()}
        rest = tabulated.graph
        executor = Executor(rest, self._device)
        given = {**tensors, **looked_up}
        feeds = {name: given[name] for name in rest.inputs}
        computed = {name: value.contiguous().clone() for name, value in executor.run(feeds).items()}
        targets = {name: value for name, value in computed.items() if name in rest.runtime}

        def run_before() -> None:
            tabulated.look_up()
            executor.run(feeds, targets)

        self.run_before = run_before
        return {**computed, **looked_up}

    def _add(self, node: Node) -> None:
        """Add a fused operation."""
        record, spec = records.Record(), node.attributes["spec"]
        if isinstance(spec, product.Product):
            shape = self._product(record, node, spec)
        elif isinstance(spec, attention.Attention):
            shape = self._attention(record, node, spec)
        else:
            shape = self._normalize(record, node, spec)
        if shape not in self.program.shapes:
            self.program.shapes.append(shape)
        record.shape = self.program.shapes.index(shape)
        self.program.operations.append(record)

    def _norm(
        self,
        record: records.Record,
        norm: normalize.Norm | None,
        names: list[str],
        width: int,
        form: int,
        pad: int = 32,
    ) -> str:
        """Set the norm of an operation's input, and return its part of the shape.

        Args:
            record: The operation.
            norm: The norm, or None.
            names: Names of its weight and bias.
            width: Features of a row.
            form: Format of the input.
            pad: Number whose next multiple of features the kernel reads.
        """
        for index, name in enumerate(names):
            record.pointers[1 + index] = self._place.vector(name)
        if norm is not None:
            wide = form in (records.WORDS_F32, records.PLAIN_F32)
            if wide and width % 32:
                raise NotRunnableError(f"a norm of {width} features in FP32, no multiple of 32")
            self.program.max_norm = max(self.program.max_norm, width)
            self.program.wide |= wide
        self.program.max_k = max(self.program.max_k, -(-width // pad) * pad)
        kind = records.NORMS[norm.kind if norm is not None else None]
        constants = records.enum(
            K=width, PAD=pad, IN=form, NORM=kind, NORM_WEIGHT=len(names) > 0, NORM_BIAS=len(names) > 1
        )
        return f"{constants} {records.number('epsilon', norm.epsilon if norm is not None else 0.0)}"

    def _residuals(self, record: records.Record, first: int, names: list[str]) -> str:
        """Set the residuals of an operation, and return their part of the shape."""
        formats = []
        for index, name in enumerate(names):
            record.pointers[first + index], form = self._place.value(name)
            formats.append(form)
        return f"{records.enum(RESIDUALS=len(names))} {records.function('int', 'residual', formats)}"

    def _product(self, record: records.Record, node: Node, spec: product.Product) -> records.Shape:
        """Fill in a product, and return its shape."""
        source, *rest = node.inputs
        record.pointers[0], form = self._place.value(source)
        norms = [rest.pop(0) for has in (spec.norm_weight, spec.norm_bias) if has]
        first = records.FIRST_PART + len(spec.parts) * len(records.PART)
        if first + spec.residuals > records.MAX_POINTERS:
            raise NotRunnableError(f"{node.name} joins {len(spec.parts)} products, too many for one operation")
        sizes, widths, outs = [], set(), []
        for index, (part, output) in enumerate(zip(spec.parts, node.outputs, strict=True)):
            begin = records.FIRST_PART + index * len(records.PART)
            n, width = self._part(record, begin, part, rest)
            record.pointers[begin + records.PART.index("out")], out = self._place.output(output, spec.dtype, n)
            sizes.append(n)
            widths.add(width)
            outs.append(out)
        (k,), low = widths, spec.parts[0].low_bits
        if k % 8:
            raise NotRunnableError(f"{node.name} reads {k} features, no multiple of 8")
        body = [
            self._norm(record, spec.norm, norms, k, form, 512 // low.bits if low else 32),
            self._residuals(record, first, rest),
            records.enum(BITS=low.bits, BLOCK=low.block, ZEROS=low.zero_points)
            if low
            else records.enum(BITS=16, BLOCK=0, ZEROS=False),
            *shapes.product_parts(spec.parts, sizes, outs),
        ]
        return records.Shape("product", "\n  ".join(body))

    def _part(self, record: records.Record, first: int, part: product.Part, names: list[str]) -> tuple[int, int]:
        """Set the weights and biases of a part, the next of `names`, and return the shape of its weight, [N, K]."""
        weights = list(part.take(names))
        for weight, matrix, bias in zip(weights, ("weight", "gate"), ("bias", "gate_bias"), strict=False):
            placed = self._place.weight(weight.matrix, part.transposed)
            record.pointers[first + records.PART.index(matrix)] = placed.data_ptr()
            if weight.bias is not None:
                record.pointers[first + records.PART.index(bias)] = self._place.vector(weight.bias)
        if part.low_bits is None:
            return placed.shape[0], placed.shape[1]
        scales = self._place.scales([weight.scales for weight in weights], part.low_bits, records.UNITS // len(weights))
        record.pointers[first + records.PART.index("scales")] = scales
        self.program.scale_bytes = max(self.program.scale_bytes, records.scale_bytes(part.low_bits))
        return placed.shape[0], part.low_bits.features

    def _normalize(self, record: records.Record, node: Node, spec: normalize.Normalize) -> records.Shape:
        """Fill in a norm, and return its shape."""
        source, *rest = node.inputs
        record.pointers[0], form = self._place.value(source)
        norms = [rest.pop(0) for has in (spec.has_weight, spec.has_bias) if has]
        width = self._plan.trace.values[node.outputs[0]].shape[-1]
        record.pointers[records.FIRST_PART + records.PART.index("out")], out = self._place.output(
            node.outputs[0], spec.dtype, width
        )
        body = [
            self._norm(record, spec.norm, norms, width, form),
            self._residuals(record, records.FIRST_PART + len(records.PART), rest),
            records.function("int", "out", [out]),
        ]
        return records.Shape("normalize", "\n  ".join(body))

    def _attention(self, record: records.Record, node: Node, spec: attention.Attention) -> records.Shape:
        """Fill in attention, and return its shape."""
        rest = list(node.inputs)
        if spec.ancestry:
            table = self._place.plain(rest.pop())
            record.pointers[11], record.positions = table.data_ptr(), table.shape[1]
        rows = [rest.pop(0)]
        if spec.key is not None:
            rows += [rest.pop(0), rest.pop(0)]
            position = self._place.plain(rest.pop(0)).data_ptr()
            if self.program.position not in (0, position):
                raise NotRunnableError("caches are written at several positions")
            self.program.position = position
        keys, values = self._place.plain(rest.pop(0)), self._place.plain(rest.pop(0))
        self._check_caches(node, keys, values)
        record.length = keys.shape[2]
        out, out_format = self._place.output(node.outputs[0], spec.dtype, spec.query.count * spec.query.size)
        for index, address in ((3, out), (4, keys.data_ptr()), (5, values.data_ptr())):
            record.pointers[index] = address
        body = []
        cuts = (("Query", spec.query), ("Key", spec.key), ("Value", spec.value))
        for index, ((name, heads), row) in enumerate(zip(cuts, rows, strict=False)):
            record.pointers[index], form = self._place.value(row)
            if heads is not None and heads.norm is not None:
                record.pointers[8 + index] = self._place.vector(rest.pop(0))
            repeat = heads.count // spec.kv_heads if heads is not None and index else 1
            body.append(f"struct {name} {{ {shapes.cut_of(heads, form, self._place.width(row), repeat, index < 2)} }};")
        group = spec.query.count // spec.kv_heads
        self.program.heads.add((spec.query.size, group))
        splits = self._splits(record, spec, group)
        body += [
            records.enum(D=spec.query.size, G=group, KV=spec.kv_heads, SELF=spec.key is not None),
            records.enum(OUT_FORMAT=out_format, BY_ANCESTRY=spec.ancestry, SPLITS=splits),
            records.number("scale", spec.scale),
            records.enum(SOFT=spec.softcap > 0),
            records.number("softcap", spec.softcap),
            self._rotary(record, spec.rotary, rest),
            self._biases(record, spec, rest),
        ]
        return records.Shape("attention", "\n  ".join(body))

    def _splits(self, record: records.Record, spec: attention.Attention, group: int) -> int:
        """Set where blocks that share keys of one head and row put their parts; return how many they are at most.

        As many as there are blocks for, so that none has two parts of one operation, and waits for what it is to write.
        """
        tasks = spec.kv_heads * self.program.rows
        splits = max(1, min(self.program.tuning.max_splits, self.program.blocks // tasks))
        slots = -(-record.length // records.keys_in_slot(spec.query.size))
        parts = max(1, min(splits, slots // self.program.tuning.least_slots))
        words = self._place.words((parts - 1) * tasks * group * (spec.query.size + 2))
        record.pointers[10] = words.data_ptr()
        return splits

    def _check_caches(self, node: Node, keys: Tensor, values: Tensor) -> None:
        """Raise `NotRunnableError` if the kernel can't read an attention's caches, or update them in place."""
        if {keys.dtype, values.dtype} != {self.program.dtype}:
            raise NotRunnableError(f"caches are of {keys.dtype} and {values.dtype}, not of {self.program.dtype}")
        if keys.shape != values.shape or keys.shape[3] % 8:
            raise NotRunnableError(
                f"caches of {list(keys.shape)} and {list(values.shape)}: the sizes must agree, and divide by 8"
            )
        for name, cache in zip(node.outputs[1:], (keys, values), strict=False):
            if self._place.plain(name).data_ptr() != cache.data_ptr():
                raise NotRunnableError(f"{name} is not in the memory of the cache that it updates")

    def _rotary(self, record: records.Record, rotary: attention.Rotary | None, rest: list[str]) -> str:
        """Set cosines and sines, the next of `rest`, and return their part of the shape."""
        if rotary is None:
            return records.enum(ROTATED=0, INTERLEAVED=0, ANGLES=0, ANGLE_STRIDE=0, ANGLE_FORMAT=0)
        cos, sin = rest.pop(0), rest.pop(0)
        tensor, other = self._place.plain(cos), self._place.plain(sin)
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise NotRunnableError(f"{cos} and {sin} differ in shape or dtype")
        record.pointers[6], record.pointers[7] = tensor.data_ptr(), other.data_ptr()
        count = rotary.size if rotary.angles == "full" else rotary.size // 2
        return records.enum(
            ROTATED=rotary.size,
            INTERLEAVED=rotary.interleaved,
            ANGLES=records.ANGLES.index(rotary.angles),
            ANGLE_STRIDE=count if tensor.numel() > count else 0,
            ANGLE_FORMAT=self._place.format(cos, words=False),
        )

    def _biases(self, record: records.Record, spec: attention.Attention, names: list[str]) -> str:
        """Set the biases, and return their part of the shape."""
        record.set = self._bias_sets.setdefault((tuple(names), spec.biases), len(self._bias_sets))
        formats = []
        for index, name in enumerate(names):
            tensor = self._place.plain(name)
            if tensor.shape[-1] != record.length:
                raise NotRunnableError(f"the bias {name} has {tensor.shape[-1]} numbers for {record.length} keys")
            record.pointers[12 + index] = tensor.data_ptr()
            formats.append(self._place.format(name, words=False))
        per_head = any(bias.per_head for bias in spec.biases)
        needed = record.length * (spec.query.count // spec.kv_heads if per_head else 1)
        while names and self.program.max_bias < needed:
            self.program.max_bias *= 2
        kinds = spec.biases
        return "\n  ".join(
            [
                records.enum(BIASES=len(names), PER_HEAD=per_head),
                records.function("bool", "batched", [bias.batched for bias in kinds]),
                records.function("bool", "per_head", [bias.per_head for bias in kinds]),
                records.function("int", "bias_format", formats),
                records.function("float", "bias_scale", [float(bias.scale) for bias in kinds]),
            ]
        )
