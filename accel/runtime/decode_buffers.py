"""Decode buffers: tensors that the static decode graph of one batch reads and writes, at constant addresses."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from accel.runtime.beam_cache import BeamAncestry
from accel.runtime.cache_views import CacheViews
from accel.runtime.cuda_graph import CudaGraphCallable, free_dropped_graphs
from accel.runtime.decode_step import DecodeStep
from accel.runtime.layout import BUCKET, IDS, POSITION
from accel.runtime.padding import Shape, copy_padded, leading_view
from accel.runtime.protocol import C
from accel.runtime.ring_cache import copy_entries, in_order, last_entries, ring_length, windows
from accel.runtime.token_graph import MAX_TOKEN_GRAPHS, Step, TokenGraph

LOGITS = "logits"
ONE_TOKEN = {"new": 1, "kept": 1}  # lengths of the axes of new tokens and of the tokens whose logits are returned


@dataclass(frozen=True)
class DecodeGraphs:
    """Graphs that run over decode buffers.

    Attributes:
        decode: The static decode graph.
        cross: The graph that computes the cross-attention caches from the encoder's output; None without such a file.
    """

    decode: DecodeStep
    cross: DecodeStep | None = None


class DecodeBuffers:
    """Static caches, inputs and logits of one batch, with the decode graph bound to them.

    Graphs that can be captured as CUDA graphs are captured and replayed.

    Args:
        graphs: The graphs to bind.
        batch: Number of sequences, beams counted.
        bucket: Number of positions, and of entries in the self-attention caches of layers without a sliding window.
        axes: Self-attention cache input -> its token axis.
        outputs: Cache input -> the output that holds it after a run. Both are bound to the same memory, so that the
            graph updates its caches in place.
        constants: Input that stays the same for a whole generation (cross-attention cache, encoder output, its mask) ->
            its dtype and its shape in these buffers.

    Attributes:
        token_graphs: Method of a selection -> the graph that decodes and selects, the one used last at the end.
    """

    @torch.inference_mode(False)  # tensors made in inference mode can't be written outside of it, in a later generation
    def __init__(
        self,
        graphs: DecodeGraphs,
        batch: int,
        bucket: int,
        axes: Mapping[str, int],
        outputs: Mapping[str, str],
        constants: Mapping[str, tuple[torch.dtype, Shape]],
    ) -> None:
        self._step = graphs.decode
        self.batch, self.bucket, self.axes = batch, bucket, axes
        rings = {axis: ring_length(window, bucket) for axis, window in windows(self._step.inputs).items()}
        self._lengths = {**ONE_TOKEN, "batch_size": batch, BUCKET: bucket, **rings}
        device = self._step.device
        self.constants = {
            name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in constants.items()
        }
        token_inputs = [name for name in self._step.inputs if name not in axes and name not in constants]
        self.inputs = {name: self._zeros(name, self._shape(name)) for name in token_inputs}
        self.logits = self._zeros(LOGITS, self._shape(LOGITS))  # [B, 1, vocabulary]
        self.stacks = self._allocate_stacks()
        self.self_caches: dict[str, Tensor] = {}  # views into the stacks, each [B, H, S, D]
        for names, stack in self.stacks.items():
            self.self_caches.update(zip(names, stack, strict=True))
        self._cache_stacks = [(stack, axes[names[0]] + 1) for names, stack in self.stacks.items()]
        self.ancestry = BeamAncestry(batch, bucket, device)
        self._is_spread = False  # entries are in the rows that `ancestry` names, not in their own

        caches = self.self_caches | self.constants
        written = {outputs[name]: cache for name, cache in caches.items() if name in outputs}
        self._written = written | {LOGITS: self.logits}
        self._decode = self._bind(graphs.decode, self._written)
        self.run_decode = self._captured(graphs.decode, self._decode, "the decode graph")
        self.run_cross: Callable[[], None] | None = None
        if graphs.cross is not None:
            cross = self._bind(graphs.cross, written)
            self.run_cross = self._captured(graphs.cross, cross, "the cross-attention cache graph")
        self.token_graphs: OrderedDict[Hashable, TokenGraph] = OrderedDict()
        self._current: TokenGraph | None = None  # the one whose token `inputs` hold

    @property
    def bytes(self) -> int:
        """Bytes of the caches and constants."""
        return sum(tensor.nbytes for tensor in (*self.stacks.values(), *self.constants.values()))

    @property
    def capturable(self) -> bool:
        """True if steps are captured as CUDA graphs."""
        return self._step.capturable

    def _shape(self, name: str) -> Shape:
        """Return the shape of an input or output of the decode graph in these buffers."""
        axes = self._step.inputs[name] if name in self._step.inputs else self._step.outputs[name]
        return tuple(self._lengths[axis] if isinstance(axis, str) else axis for axis in axes)

    def _zeros(self, name: str, shape: Shape) -> Tensor:
        """Allocate zeros with the dtype of an input or output of the decode graph."""
        return torch.zeros(shape, dtype=self._step.dtype(name), device=self._step.device)

    def _allocate_stacks(self) -> dict[tuple[str, ...], Tensor]:
        """Allocate the self-attention caches: one tensor [N, B, H, S, D] for all of one dtype, axes and token axis.

        One tensor can be cleared, copied, or reordered by one kernel, with a single launch for all layers. The groups
        are the same for all buckets.
        """
        groups: dict[tuple[torch.dtype, Sequence[int | str], int], list[str]] = {}
        for name, axis in self.axes.items():
            groups.setdefault((self._step.dtype(name), tuple(self._step.inputs[name]), axis), []).append(name)
        stacks = {}
        for names in groups.values():
            stacks[tuple(names)] = self._zeros(names[0], (len(names), *self._shape(names[0])))
        return stacks

    def _bind(self, step: DecodeStep, outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """Bind a graph to these buffers and to those `outputs` that it has. Return a call that runs it."""
        written = {output: outputs[output] for output in step.outputs}
        return step.bind(self.self_caches | self.constants | self.inputs, written)

    @cached_property
    def _decode_by_ancestry(self) -> tuple[Step, Step] | None:
        """The decode graph bound to read entries from the rows that `ancestry` names, and its captured form.

        None if it can't, so that beams are reordered by copies. Only made for beams: reading a table takes time.
        """
        with torch.inference_mode(False):
            step = self._step
            inputs = self.self_caches | self.constants | self.inputs
            written = {output: self._written[output] for output in step.outputs}
            call = step.bind_by_ancestry(inputs, written, self.ancestry.table)
            return None if call is None else (call, self._captured(step, call, "the decode graph of beams"))

    def _captured(self, step: DecodeStep, call: Callable[[], None], name: str) -> Callable[[], None]:
        """Return a call that runs or replays `call` of a graph, if that can be captured; else `call`."""
        if not step.capturable:
            return call
        return CudaGraphCallable(call, step.device, f"{name} for batch size {self.batch} and bucket {self.bucket}")

    def reset(self, constants: Mapping[str, Tensor]) -> None:
        """Prepare the buffers for a new generation.

        Clears the caches: the mask hides what an earlier generation left there, except NaN, which spreads through the
        attention product even where its weight is 0.

        Args:
            constants: Inputs that stay the same for the whole generation. A tensor shorter than its buffer is padded
                with zeros, as is its mask. Cross-attention caches may be computed by `compute_cross_caches` instead.
        """
        for stack in self.stacks.values():
            stack.zero_()
        for name, tensor in constants.items():
            copy_padded(self.constants[name], tensor)
        self.ancestry.reset(0)
        self._is_spread = False

    def take_over(self, other: "DecodeBuffers", length: int) -> None:
        """Copy the entries of the first `length` tokens, as many as there is room for, of another bucket."""
        if other._is_spread and self._decode_by_ancestry is None:
            other._collect(length)
        self._is_spread = other._is_spread
        for (stack, axis), (theirs, _) in zip(self._cache_stacks, other._cache_stacks, strict=True):
            copy_entries(theirs, stack, axis, length)  # of all layers at once
        self.ancestry.copy_from(other.ancestry, length)

    def write(self, caches: Mapping[str, Tensor], length: int) -> None:
        """Copy the entries of the first `length` tokens, as many as there is room for, out of `caches` [B, H, S, D]."""
        for name, axis in self.axes.items():
            copy_entries(caches[name], self.self_caches[name], axis, length)
        self.ancestry.reset(0)
        self._is_spread = False

    def _spread(self) -> None:
        """Let `ancestry` say from now on where entries are: in their own rows, unless beams have spread them before."""
        if not self._is_spread:
            self.ancestry.reset(0)
            self._is_spread = True

    def _collect(self, length: int) -> None:
        """Let each row hold the entries of its first `length` tokens itself, if beams have spread them over rows."""
        if self._is_spread:
            self.ancestry.collect(length, self._cache_stacks)
            self._is_spread = False

    def clear_rows(self, rows: Tensor) -> None:
        """Clear the caches of rows, int64 [rows]: what earlier sequences left there may be NaN, which no mask hides."""
        for stack in self.stacks.values():
            stack.index_fill_(1, rows, 0)

    def write_rows(
        self, rows: Tensor, caches: Mapping[str, Tensor], tokens: int, padding: Tensor | None = None
    ) -> None:
        """Replace the entries of rows, and clear the others.

        Args:
            rows: int64 [rows].
            caches: Cache input -> [rows, H, tokens, D].
            tokens: Number of tokens in `caches`.
            padding: Number of first tokens of each row that are dropped, int64 [rows]; None for none.
        """
        self.clear_rows(rows)
        for name, axis in self.axes.items():
            target = self.self_caches[name]
            slots = min(tokens, target.shape[axis])
            entries = last_entries(caches[name], axis, slots, padding)
            target.narrow(axis, 0, slots).index_copy_(0, rows, entries.to(target.dtype))

    def copy_rows(self, rows: Tensor, other: "DecodeBuffers", other_rows: Tensor, tokens: int) -> None:
        """Replace the first entries of rows by those of other rows, int64 [rows] both, of at most `tokens` tokens.

        An entry has the same slot in both: caches that are filled in turn are of one length wherever a row has more
        tokens than one of them has slots.
        """
        for name, axis in self.axes.items():
            source, target = other.self_caches[name], self.self_caches[name]
            slots = min(tokens, source.shape[axis], target.shape[axis])
            entries = source.narrow(axis, 0, slots).index_select(0, other_rows)
            target.narrow(axis, 0, slots).index_copy_(0, rows, entries)

    def copy_constants(self, rows: Tensor, constants: Mapping[str, Tensor], other_rows: Tensor | None = None) -> None:
        """Replace the constants of rows, int64 [rows], by those of `other_rows`, or all rows, of `constants`.

        What a shorter one leaves is filled with zeros; of a longer one, the beginning is copied.
        """
        for name, tensor in constants.items():
            target = self.constants[name]
            common = tuple(min(sizes) for sizes in zip(target.shape[1:], tensor.shape[1:], strict=True))
            source = leading_view(tensor, (len(tensor), *common))
            if common != tuple(target.shape[1:]):
                target.index_fill_(0, rows, 0)
            if other_rows is not None:
                source = source.index_select(0, other_rows)
            leading_view(target, (len(target), *common)).index_copy_(0, rows, source)

    def read(self, length: int) -> CacheViews:
        """Return the first `length` tokens' entries of the self-attention caches, [B, H, length, D].

        Views where a cache has as many slots, else copies with zeros for entries that a sliding window left behind.
        """
        self._collect(length)
        return CacheViews(self.axes, lambda name: in_order(self.self_caches[name], self.axes[name], length))

    def reorder(self, index: Tensor, length: int) -> None:
        """Replace the first `length` cache entries of every sequence i by those of sequence `index[i]`; index: [B]."""
        if self._decode_by_ancestry is None:
            self.ancestry.reorder(index, length, self._cache_stacks)
        else:
            self._spread()
            self.ancestry.follow(index, length)

    def write_inputs(self, inputs: Mapping[str, Tensor], length: int) -> None:
        """Copy the inputs of one decode step to where the graph reads them.

        Args:
            inputs: Inputs for one new token of every sequence: `input_ids` [B, 1] and, where the graph takes them,
                `attention_mask` [B, length + 1] and `position_ids` [B, 1].
            length: Number of tokens in the caches, which is the position that every sequence's new entry is written to.
        """
        for name, buffer in self.inputs.items():
            if name == POSITION:
                buffer.fill_(length)  # [B]; a scalar in graphs of earlier versions
            elif buffer.shape == inputs[name].shape:
                buffer.copy_(inputs[name])
            else:  # the attention mask: shorter than the bucket, so the unused entries are masked with 0
                buffer.zero_()
                buffer[:, : inputs[name].shape[1]].copy_(inputs[name])

    def compute_cross_caches(self) -> None:
        """Compute the cross-attention caches from the constants passed to `reset`, if there is a graph for it."""
        if self.run_cross is not None:
            self.run_cross()

    def run(self) -> Tensor:
        """Run one decode step. Return its logits [B, 1, vocabulary], which the next run overwrites."""
        self._step.check()
        self._current = None
        by_ancestry = self._decode_by_ancestry if self._is_spread else None
        run = self.run_decode if by_ancestry is None else by_ancestry[1]
        run()
        return self.logits

    def decode_and_select(self, inputs: Callable[[], Mapping[str, Tensor]], length: int, selection: C) -> C:
        """Run one decode step over the ids selected last, and select the next ones.

        Args:
            inputs: Returns the step's inputs: see `write_inputs`. Called if the buffers don't hold them yet.
            length: Number of tokens in the caches.
            selection: What is continued.

        Returns:
            The selection over tensors of these buffers that continues it; from the second token on the same one.
        """
        self._step.check()
        if selection.parents is None:
            self._collect(length)
        elif self._decode_by_ancestry is not None:
            self._spread()
        graph = self._current
        if graph is None or graph.selection is not selection:
            graph = self._token_graph(selection)
            if graph.selection is not selection:
                graph.begin(selection)
            self.write_inputs(inputs(), length)
            self._current = graph
        graph()
        following: C = graph.selection
        return following

    @torch.inference_mode(False)  # as the constructor
    def _token_graph(self, selection: C) -> TokenGraph:
        """Return the graph for the method of a selection; drop the one that wasn't used for longest."""
        key, graphs = selection.method, self.token_graphs
        if key not in graphs:
            own = selection.like(self.bucket + 1, self.inputs[IDS])
            by_ancestry = None if selection.parents is None else self._decode_by_ancestry
            reorder: Callable[[Tensor, Tensor], object] = self.ancestry.follow
            if by_ancestry is None:
                reorder = partial(self.ancestry.reorder, stacks=self._cache_stacks)
            name = f"for batch size {self.batch} and bucket {self.bucket}"
            steps = by_ancestry or (self._decode, self.run_decode)
            graphs[key] = TokenGraph(*steps, self.inputs, self.logits, reorder, own, name)
        graphs.move_to_end(key)
        if len(graphs) > MAX_TOKEN_GRAPHS:
            graphs.popitem(last=False)
            free_dropped_graphs(self._step.device)
        return graphs[key]
